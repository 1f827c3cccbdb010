"""Conversions: what they keep, that they lead back bit for bit, and what they refuse, on models of every family."""

import copy
import io
from collections.abc import Iterator

import pytest
import torch
from conftest import values_of
from hypothesis import given, settings
from hypothesis import strategies as st
from model_zoo import (
    CONVERSIONS,
    EVERY_CONVERSION,
    EVERY_FAMILY,
    NEW_CLASSES,
    Member,
    Picture,
    X,
    built,
    convnet,
    find_layers,
    image,
    lived_in,
    run,
    tensors_of,
    timm_model,
    train,
)
from torch import nn

from precisebn import InputError, update_bn_stats
from precisebn.conversion.converters import (
    convert_concat_shared,
    convert_cycle,
    convert_domain_specific,
    convert_frozen_batchnorm,
    convert_ghost,
    convert_sync_batchnorm,
    convert_to_batchnorm,
)
from precisebn.nn import (
    ConcatSharedBN,
    CycleBatchNormList,
    DomainSpecificBN,
    FrozenBatchNorm1d,
    FrozenBatchNorm2d,
    FrozenBatchNorm3d,
    GhostBN,
    SyncBN,
    use_domain,
)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # torch.compile of 2.10 to 2.13, and torch.ao, warn of the use of deprecated parts of torch.
    pytest.mark.filterwarnings("ignore::FutureWarning:torch.*"),
]


@pytest.fixture
def member(family: str, request: pytest.FixtureRequest) -> Iterator[Member]:
    failed = request.session.testsfailed
    yield built(family)
    if request.session.testsfailed != failed:
        built.cache_clear()


# ---- Laws ----------------------------------------------------------------------------------------------------


@EVERY_CONVERSION
@EVERY_FAMILY
def test_there_and_back_is_the_identity(member, convert):
    model, before, _ = member
    old = find_layers(model)
    others = set(model.modules()) - {part for layer in old.values() for part in layer.modules()}
    assert convert(model) is model
    new = find_layers(model)
    assert list(new) == list(old)
    assert all(isinstance(layer, NEW_CLASSES) for layer in new.values())
    assert set(model.modules()) - {part for layer in new.values() for part in layer.modules()} == others
    assert convert_to_batchnorm(model) is model
    assert Picture(model) == before


EQUAL_AT_TEST_TIME = {name: convert for name, convert in CONVERSIONS.items() if name != "batch-stat"}


@pytest.mark.parametrize("convert", EQUAL_AT_TEST_TIME.values(), ids=EQUAL_AT_TEST_TIME)
@EVERY_FAMILY
def test_the_output_at_test_time_stays_the_same(family, member, convert):
    outputs = run(family, convert(member.model))
    convert_to_batchnorm(member.model)
    # Each layer rounds differently by some ulps, which some fifty layers with random weights amplify.
    for output, y in zip(outputs, member.outputs, strict=True):
        torch.testing.assert_close(output, y, rtol=1e-3, atol=1e-4 * float(y.abs().max()))


@EVERY_CONVERSION
def test_parameters_and_buffers_are_the_same_objects_wherever_shapes_agree(convert):
    model = convnet()
    before = {(name, key): t for name, layer in find_layers(model).items() for key, t in tensors_of(layer).items()}
    convert(model)
    after = {(name, key): t for name, layer in find_layers(model).items() for key, t in tensors_of(layer).items()}
    for (name, key), old in before.items():
        new = after.get((name, key))
        if new is None:
            assert isinstance(find_layers(model)[name], CycleBatchNormList)
        elif isinstance(old, nn.Parameter) == isinstance(new, nn.Parameter) and old.shape == new.shape:
            assert new is old
        elif old.shape == new.shape:  # a frozen affine
            assert torch.equal(new, old)
            assert not new.requires_grad
            assert new.data_ptr() != old.data_ptr()
        else:
            assert new.shape == (2, *old.shape)
            assert torch.equal(new[0], old)
            assert torch.equal(new[1], old)
            assert new.requires_grad == old.requires_grad
            assert new.is_contiguous()


@EVERY_CONVERSION
@pytest.mark.filterwarnings("ignore:ConcatSharedBN:UserWarning")  # one layer in two places, called on one tensor each
def test_an_optimizer_made_before_goes_on_training_what_is_still_there(convert):
    model = convert_to_batchnorm(convert(convnet()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    weight, before = model[1].weight, model[1].weight.detach().clone()
    convert(model)
    kept = model[1].weight is weight
    train(model, X)
    optimizer.step()
    assert torch.equal(weight, before) == (not kept)
    assert (model[0].weight.grad != 0).any()


@EVERY_CONVERSION
def test_a_layer_in_several_places_is_replaced_by_one(convert):
    model = convnet()
    model.add_module("again", nn.ModuleDict({"bn": model[1], "net": nn.Sequential(model[0], model[1])}))
    model.add_module("parent again", model.again.net)
    old = model[1]
    before = Picture(model)
    convert(model)
    places = [module for _, module in model.named_modules(remove_duplicate=False) if module is model[1]]
    assert len(places) == 5
    assert old not in list(model.modules())
    assert len(find_layers(model)) == 2
    assert model.again.net is model.get_submodule("parent again")
    convert_to_batchnorm(model)
    assert Picture(model) == before


@EVERY_CONVERSION
def test_a_model_that_is_itself_a_layer_is_returned_new(convert):
    bn = lived_in(nn.BatchNorm2d(3)).eval()
    before = Picture(bn)
    new = convert(bn)
    assert isinstance(new, NEW_CLASSES)
    assert not new.training
    assert convert_to_batchnorm(new) is bn
    assert Picture(bn) == before


@EVERY_CONVERSION
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_mode_dtype_device_and_requires_grad_are_kept(convert, dtype):
    model = convnet().to(dtype)
    model[1].eval().weight.requires_grad_(False)
    convert(model)
    assert [part.training for part in model[1].modules()] == [False] * len(list(model[1].modules()))
    assert model[7].training
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        assert tensor.dtype == (torch.int64 if name.endswith("num_batches_tracked") else dtype)
        if name == "1.weight":
            assert not tensor.requires_grad
    with use_domain(0):
        assert model(X.to(dtype)).dtype == dtype
    on_meta = convert(convnet().to("meta"))
    assert {t.device.type for t in (*on_meta.parameters(), *on_meta.buffers())} == {"meta"}
    convert_to_batchnorm(on_meta)


@EVERY_CONVERSION
def test_momentum_eps_and_what_users_put_on_a_layer_are_kept(convert):
    model = convnet()
    model[1].eps, model[1].momentum, model[7].momentum = 0.1, None, 0.3
    model[1].note = "mine"
    model[1].register_buffer("seen", torch.zeros(2), persistent=False)
    seen, before = model[1].seen, Picture(model)
    new = convert(model)[1]
    for member in new if isinstance(new, CycleBatchNormList) else [new]:
        assert (member.eps, member.momentum) == (0.1, None)
    assert new.note == "mine"
    assert new.seen is seen
    assert "1.seen" not in model.state_dict()
    convert_to_batchnorm(model)
    assert Picture(model) == before
    assert model[1].note == "mine"

    new = convert(model)[1]
    new.note, new.later = "changed", [1]
    for member in new if isinstance(new, CycleBatchNormList) else [new]:
        member.momentum = 0.5
    convert_to_batchnorm(model)
    assert (model[1].note, model[1].later, model[1].momentum, model[7].momentum) == ("changed", [1], 0.5, 0.3)


@EVERY_CONVERSION
def test_without_affine_bias_or_running_statistics(convert):
    tracked = convert is CONVERSIONS["frozen"] or convert is CONVERSIONS["frozen, trainable affine"]
    model = nn.Sequential(
        nn.BatchNorm2d(3, affine=False), nn.BatchNorm2d(3, track_running_stats=tracked), nn.BatchNorm2d(3)
    )
    model[2].bias = None
    before = Picture(model)
    convert(model)
    assert model[0].weight is None
    assert model[2].bias is None
    assert model[2].weight is not None
    if not tracked:
        assert not [name for name, _ in model.named_buffers() if name.startswith("1.")]
    convert_to_batchnorm(model)
    assert Picture(model) == before


@EVERY_CONVERSION
def test_statistics_switched_on_or_off_later_stay_so(convert):
    """``bn.track_running_stats = False`` and ``bn.running_mean = None`` are idioms of those who calibrate by hand."""
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    model[0].track_running_stats = False
    if convert not in (CONVERSIONS["frozen"], CONVERSIONS["frozen, trainable affine"]):
        model[1].running_mean = model[1].running_var = None
    before = Picture(model)
    convert(model)
    for layer, tracks in ((model[0], False), (model[1], True)):
        for member in layer if isinstance(layer, CycleBatchNormList) else [layer]:
            assert member.track_running_stats == tracks
            assert (member.running_mean is None) == (before.modules[2][1].running_mean is None and tracks)
    convert_to_batchnorm(model)
    assert Picture(model) == before


@EVERY_CONVERSION
def test_nothing_remembered_shows_in_parameters_buffers_and_state_dict(convert):
    model, plain = convnet(), convnet()
    convert(model)
    expected = set(plain.state_dict())
    if isinstance(model[1], CycleBatchNormList):
        statistics = {key for key in expected if "running" in key or "tracked" in key}
        prefixed = {f"{head}.{k}.{tail}" for head, tail in (s.split(".") for s in statistics) for k in range(2)}
        expected = expected - statistics | prefixed
    assert set(model.state_dict()) == expected
    assert len(list(model.parameters())) <= len(list(plain.parameters()))
    if not isinstance(model[1], CycleBatchNormList):
        plain.load_state_dict(convert_to_batchnorm(model).state_dict())


@EVERY_CONVERSION
def test_copies_and_pickles_of_a_converted_model_lead_back_too(convert):
    model = convert(convnet())
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        new = twin[1]
        assert isinstance(new, type(model[1]))
        convert_to_batchnorm(twin)
        assert type(twin[1]) is nn.BatchNorm2d
        assert twin[1] is twin[4]
        assert values_of(twin) == values_of(convnet())
        if new._parameters.get("weight") is not None and new.weight.dim() == 1:
            assert twin[1].weight is new.weight
        assert not {id(t) for t in twin.parameters()} & {id(t) for t in model.parameters()}
    assert isinstance(model[1], NEW_CLASSES)


# ---- Training in between --------------------------------------------------------------------------------------------


@EVERY_CONVERSION
def test_what_was_trained_in_between_comes_back(convert):
    model = convert(convnet())
    new = model[1]
    rows = isinstance(new, CycleBatchNormList | DomainSpecificBN)
    with torch.no_grad():
        for layer in (new, *(new if isinstance(new, CycleBatchNormList) else ())):
            for tensor in tensors_of(layer).values():
                tensor.copy_(torch.arange(tensor.numel()).reshape(tensor.shape) + 1)
    members = new[1] if isinstance(new, CycleBatchNormList) else new
    expected = {key: t.clone() for key, t in tensors_of(members).items()}
    expected |= {key: t.detach().clone() for key, t in tensors_of(new).items()}
    parameters = set(map(id, new.parameters()))
    convert_to_batchnorm(model, domain=1 if rows else None)
    assert isinstance(model[1].weight, nn.Parameter)
    for key, t in tensors_of(model[1]).items():
        dims = 0 if key == "num_batches_tracked" else 1
        assert torch.equal(t, expected[key][1] if expected[key].dim() > dims else expected[key])
    if not rows and parameters:
        assert parameters == set(map(id, model[1].parameters()))


def test_a_frozen_affine_comes_back_as_the_parameters_that_it_was():
    model = convnet()
    weight, optimizer = model[1].weight, torch.optim.SGD(model.parameters(), lr=1.0)
    convert_frozen_batchnorm(model)
    model[1].weight.fill_(3.0)
    convert_to_batchnorm(model)
    assert model[1].weight is weight
    assert weight.tolist() == [3.0] * 4
    model(X).square().sum().backward()
    optimizer.step()
    assert weight.tolist() != [3.0] * 4


@EVERY_CONVERSION
@pytest.mark.parametrize("how", ["assign", "to_empty", "away"])
def test_values_that_come_or_go_in_between_are_those_of_the_restored_one(convert, how):
    """Large models are made on the meta device, converted, and loaded then; or freed by ``to("meta")``."""
    trained = convnet()
    trained(X)
    model = convert(convnet() if how == "away" else convnet().to("meta"))
    if how == "assign":
        model.load_state_dict(trained.state_dict(), assign=True)
    elif how == "to_empty":
        model.to_empty(device="cpu").load_state_dict(trained.state_dict())
    else:
        model.to("meta")
    convert_to_batchnorm(model)
    if how == "away":
        assert all(t.is_meta for t in (*model.parameters(), *model.buffers()))
        return
    assert values_of(model) == values_of(trained)
    assert all(isinstance(p, nn.Parameter) and p.requires_grad for p in model.parameters())
    model(X).square().sum().backward()


@EVERY_CONVERSION
def test_another_dtype_in_between_is_the_restored_one(convert):
    model = convnet()
    weight = model[1].weight
    model(X).sum().backward()
    convert(model).to(torch.float64)
    convert_to_batchnorm(model)
    assert model[1].weight is weight
    assert {t.dtype for t in (*model.parameters(), *model.buffers())} == {torch.float64, torch.int64}
    assert weight.grad is None or weight.grad.dtype == torch.float64
    reference = convnet()
    reference(X)  # the forward above
    assert values_of(model) == values_of(reference.to(torch.float64))
    model(X.double()).sum().backward()


@EVERY_CONVERSION
def test_training_with_activations_in_place(convert):
    """The activation of timm's BatchNormAct2d works in place, on what the new layer returns."""
    model = convert(timm_model("test_efficientnet.r160_in1k"))
    train(model, image(64))
    assert all(p.grad is not None for p in model.parameters())
    assert (model.conv_stem.weight.grad != 0).any()


def test_recalibration_sees_through_conversions():
    batches = [torch.randn(6, 3, 8, 8) for _ in range(3)]
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    converted = convert_concat_shared(copy.deepcopy(plain))
    update_bn_stats(plain, batches, 3)
    update_bn_stats(converted, batches, 3)
    convert_to_batchnorm(converted)
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(converted.state_dict()[key], value)


# ---- Again, and from one to another ---------------------------------------------------------------------------------


@EVERY_CONVERSION
def test_converting_twice_changes_nothing(convert):
    model = convert(convnet())
    before = Picture(model)
    convert(model)
    assert Picture(model) == before
    convert_to_batchnorm(model)
    before = Picture(model)
    convert_to_batchnorm(model)
    assert Picture(model) == before


@EVERY_CONVERSION
@pytest.mark.parametrize("first", [n for n in CONVERSIONS if "frozen" not in n])
def test_from_one_to_another_goes_by_way_of_what_the_layer_was(first, convert):
    model, direct = convnet(), convert(convnet())
    before = Picture(model)
    convert(CONVERSIONS[first](model))
    assert type(model[1]) is type(direct[1])
    assert type(model[7]) is type(direct[7])
    assert values_of(model) == values_of(direct)
    assert set(vars(model[1])) == set(vars(direct[1]))
    convert_to_batchnorm(model)
    assert Picture(model) == before


@settings(max_examples=30)
@given(st.lists(st.sampled_from(sorted(CONVERSIONS)), max_size=6))
def test_any_chain_of_conversions_leads_back(chain):
    model = convnet()
    before, outputs = Picture(model), model.eval()(X)
    for name in chain:
        CONVERSIONS[name](model, include=["1", "7"])  # by name, so that frozen ones go on too
        assert type(model[1]) is type(CONVERSIONS[name](nn.BatchNorm2d(4)))
        if name != "batch-stat":
            with use_domain(1):
                torch.testing.assert_close(model(X), outputs)
            for layer in find_layers(model).values():
                if isinstance(layer, CycleBatchNormList):
                    layer.reset()
    convert_to_batchnorm(model.train())
    assert Picture(model) == before


def test_other_settings_make_a_layer_anew():
    model = convert_ghost(convnet(), 4)
    before = model[1]
    assert convert_ghost(model, 8)[1].ghost_size == 8
    assert model[1] is not before
    assert model[1].weight is before.weight
    frozen = convert_frozen_batchnorm(model)[1]
    assert convert_frozen_batchnorm(model, trainable_affine=True)[1] is not frozen
    assert model[1].weight is before.weight
    assert convert_cycle(model, 2, include="1")[1].length == 2
    assert len(convert_cycle(model, 3)[1]) == 3
    assert convert_domain_specific(model, 3, affine="domain", include="1")[1].weight.shape == (3, 4)
    assert convert_domain_specific(model, 3)[1].weight is before.weight
    assert type(convert_to_batchnorm(model)[1]) is nn.BatchNorm2d


def test_the_rows_of_domains_stay_the_same_parameters_where_they_can():
    model = convert_domain_specific(convnet(), 2, affine="domain")
    weight = model[1].weight
    convert_domain_specific(model, 2, affine="domain", normalize="shared")
    assert model[1].weight is weight


@EVERY_CONVERSION
def test_frozen_layers_are_not_unfrozen_by_accident(convert):
    model = convert_frozen_batchnorm(convnet(), include="1")
    frozen, other = model[1], model[7]
    freezing = convert in (CONVERSIONS["frozen"], CONVERSIONS["frozen, trainable affine"])
    convert(model)
    assert (model[1] is frozen) == (not freezing or convert is CONVERSIONS["frozen"])
    assert model[7] is not other
    if freezing:
        return
    with pytest.warns(UserWarning, match="frozen"):
        convert(model, include=["?"], exclude="7")
    assert model[1] is frozen
    convert(model, include=[model[1]])
    assert model[1] is not frozen
    convert_frozen_batchnorm(model, include="1")
    convert(model, include=["1", "7"])
    assert not isinstance(model[1], FrozenBatchNorm2d)


# ---- Domains ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["domain", "domain, shared affine", "cycle"])
def test_domains_that_have_parted_need_a_choice(name):
    model = CONVERSIONS[name](convnet())
    with torch.no_grad():
        second = model[1][1].running_mean if isinstance(model[1], CycleBatchNormList) else model[1].running_mean[1]
        second.add_(1.0)
    expected = second.tolist()
    before = Picture(model)
    for convert in (*CONVERSIONS.values(), convert_to_batchnorm):
        if convert is CONVERSIONS[name]:
            continue
        with pytest.raises(InputError, match=r"layer '1' \(\w+\) has 2 domains, whose running_mean differ.*domain=k"):
            convert(model)
        assert Picture(model) == before
    with pytest.raises(InputError, match=r"domain=2: layer '1' .* has domains 0 to 1"):
        convert_to_batchnorm(model, domain=2)
    assert Picture(model) == before
    convert_to_batchnorm(model, domain=1)
    assert model[1].running_mean.tolist() == expected


def test_layers_of_precisebn_that_were_no_others_become_bn_class():
    model = nn.ModuleList(
        [
            FrozenBatchNorm1d(3, eps=0.1),
            FrozenBatchNorm2d(3, trainable_affine=True),
            FrozenBatchNorm3d(3, affine=False),
            GhostBN(3, 2, momentum=0.3),
            DomainSpecificBN(3, 2),
            CycleBatchNormList(2, nn.BatchNorm1d, num_features=3),
            CycleBatchNormList(2, num_features=3, affine=False),
            ConcatSharedBN(3, track_running_stats=False, affine=False),
            nn.SyncBatchNorm(3),
        ]
    )
    lived_in(model[:4])
    weight, mean, values = model[1].weight, model[0].running_mean, model[0].weight.clone()
    convert_to_batchnorm(model, bn_class=nn.BatchNorm3d)
    dims = [1, 2, 3, 3, 3, 1, 2, 3, 3]
    assert [type(layer) for layer in model] == [getattr(nn, f"BatchNorm{d}d") for d in dims]
    assert (model[0].eps, model[3].momentum) == (0.1, 0.3)
    assert model[1].weight is weight
    assert model[0].running_mean is mean
    assert isinstance(model[0].weight, nn.Parameter)
    assert torch.equal(model[0].weight, values)
    assert model[2].weight is model[6].weight is model[7].weight is None
    assert model[7].running_mean is None
    before = Picture(model)
    convert_to_batchnorm(convert_ghost(model, 2))
    assert Picture(model) == before


def test_a_frozen_layer_for_any_dimension_is_for_that_of_bn_class():
    model = nn.ModuleList([nn.SyncBatchNorm(3), nn.BatchNorm1d(3), GhostBN(3, 2)])
    convert_sync_batchnorm(model, include=["0", "1"])
    convert_frozen_batchnorm(model, bn_class=nn.BatchNorm3d)
    assert [type(layer) for layer in model] == [FrozenBatchNorm3d, FrozenBatchNorm1d, FrozenBatchNorm3d]
    convert_to_batchnorm(model)
    assert [type(layer) for layer in model] == [nn.SyncBatchNorm, nn.BatchNorm1d, nn.BatchNorm3d]


def test_synchronized_layers_become_those_of_the_other_implementation_and_keep_their_ranks():
    """The ranks of a layer that has some of its own, unless others are named; what is done already stays."""
    some, others = object(), object()
    model = nn.ModuleList([nn.SyncBatchNorm(3, process_group=some), nn.BatchNorm2d(3), SyncBN(3, process_group=some)])
    before = Picture(model)
    parameters = [layer.weight for layer in model]
    own = model[2]
    convert_sync_batchnorm(model, implementation="precisebn")
    assert [type(layer) for layer in model] == [SyncBN] * 3
    assert [layer.process_group for layer in model] == [some, None, some]
    assert model[2] is own
    convert_sync_batchnorm(model, others, include=["0", "1"], implementation="precisebn")
    assert [layer.process_group for layer in model] == [others, others, some]
    assert all(layer.weight is weight for layer, weight in zip(model, parameters, strict=True))
    convert_sync_batchnorm(model, include=["0", "1"], implementation="torch")
    assert [type(layer) for layer in model] == [nn.SyncBatchNorm, nn.SyncBatchNorm, SyncBN]
    convert_to_batchnorm(model, include=["0", "1"])
    assert Picture(model) == before
