"""convert_shared_head: heads whose loop over feature levels stays as it is, by hand and from torchvision."""

import copy
import functools
import io
import itertools
import threading
from collections.abc import Callable
from typing import NoReturn

import pytest
import torch
import torch.nn.functional as F
from conftest import values_of
from interrupting import Lines, Nth
from model_zoo import Picture
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from precisebn import (
    InputError,
    convert_concat_shared,
    convert_frozen_batchnorm,
    convert_shared_head,
    convert_to_batchnorm,
    update_bn_stats,
)
from precisebn.conversion.towers import LevelTower
from precisebn.nn import (
    ConcatSharedBN,
    CycleBatchNormList,
    DomainSpecificBN,
    FrozenBatchNorm2d,
    MultiInputSequential,
    one_cycle,
)

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = (8, 6, 4)


def conv_bn() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3), nn.ReLU(inplace=True))


class Tower(nn.Module):
    """A loop over levels, as users write it."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Sequential(conv_bn(), nn.Dropout(0.0), conv_bn())
        self.predict = nn.Conv2d(3, 2, 1)

    def forward(self, levels: list[Tensor]) -> list[Tensor]:
        return [self.predict(self.tower(features)) for features in levels]


class Head(nn.Module):
    """Two of them, called on the same levels."""

    def __init__(self) -> None:
        super().__init__()
        self.classes, self.boxes = Tower(), Tower()

    def forward(self, levels: list[Tensor]) -> list[Tensor]:
        return self.classes(levels) + self.boxes(levels)


def new_head(seed: int = 0) -> Head:
    torch.manual_seed(seed)
    head = Head().double()
    for layer in head.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 2.0)
            nn.init.normal_(layer.bias)
    return head


def levels(seed: int = 1, requires_grad: bool = False) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(2, 3, size, size + 1, generator=generator, dtype=torch.float64) * (k + 1) + k).requires_grad_(
            requires_grad
        )
        for k, size in enumerate(SIZES)
    ]


def by_hand(head: Head, xs: list[Tensor], how: str) -> list[Tensor]:
    """What a head computes in training, in torch's own operations."""
    outputs = []
    for part in (head.classes, head.boxes):
        ys = xs
        for block in (part.tower[0], part.tower[2]):
            zs = [block[0](y) for y in ys]
            if how == "concat":
                flat = torch.cat([z.transpose(0, 1).flatten(1) for z in zs], dim=1)
                var, mean = torch.var_mean(flat, dim=1, correction=0)
                statistics = [(mean, var)] * len(zs)
            else:
                statistics = [torch.var_mean(z, dim=(0, 2, 3), correction=0)[::-1] for z in zs]
            shape, bn = (1, -1, 1, 1), block[1]
            ys = [
                F.relu(
                    (z - mean.view(shape)) / (var + bn.eps).sqrt().view(shape) * bn.weight.view(shape)
                    + bn.bias.view(shape)
                )
                for z, (mean, var) in zip(zs, statistics, strict=True)
            ]
        outputs += [part.predict(y) for y in ys]
    return outputs


HOWS = ("concat", "domain", "cycle")
EVERY_HOW = pytest.mark.parametrize("how", HOWS)
TOWERS = pytest.mark.parametrize("how", ["concat", "domain"])


def loss_of(outputs: list[Tensor]) -> Tensor:
    return torch.stack([(y * (k + 1)).square().mean() for k, y in enumerate(outputs)]).sum()


# ---- What it computes ---------------------------------------------------------------------------------------------


@EVERY_HOW
def test_outputs_gradients_and_state_are_those_computed_by_hand(how):
    head, reference = new_head(), new_head()
    assert convert_shared_head(head, how, levels=3) is head
    for _ in range(2):  # and again, in the same head
        for p in (*head.parameters(), *reference.parameters()):
            p.grad = None
        xs, same = levels(requires_grad=True), levels(requires_grad=True)
        ys, expected = head(xs), by_hand(reference, same, how)
        loss_of(ys).backward()
        loss_of(expected).backward()
        torch.testing.assert_close(ys, expected)
        torch.testing.assert_close([x.grad for x in xs], [x.grad for x in same])
        torch.testing.assert_close([p.grad for p in head.parameters()], [p.grad for p in reference.parameters()])


@EVERY_HOW
def test_evaluation_with_the_statistics_of_a_mini_batch_is_training_on_it(how):
    """Which it is not for a plain BatchNorm: each level by itself in training, by the average of all in evaluation."""
    for converted in (True, False):
        head = convert_shared_head(new_head(), how, levels=3) if converted else new_head()
        in_training = head(levels())
        update_bn_stats(head, [levels()], 1, forward=lambda model, batch: model(batch))
        in_evaluation = head.eval()(levels())
        if converted:
            torch.testing.assert_close(in_evaluation, in_training)
        else:
            assert not torch.allclose(in_evaluation[0], in_training[0], rtol=0.1)


@EVERY_HOW
def test_the_state_dict_keeps_its_keys_and_plain_checkpoints_load(how):
    plain = new_head()
    head = convert_shared_head(new_head(seed=5), how, levels=3)
    if how == "cycle":
        assert "classes.tower.0.1.2.running_mean" in head.state_dict()
    else:
        assert list(head.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in head.named_parameters()] == [name for name, _ in plain.named_parameters()]
    head.load_state_dict(plain.state_dict())
    torch.testing.assert_close(head.eval()(levels()), plain.eval()(levels()))


@EVERY_HOW
def test_recalibration_measures_all_levels(how):
    head, batches = convert_shared_head(new_head(), how, levels=3), [levels(seed) for seed in range(4)]
    report = update_bn_stats(head, batches, 4, forward=lambda model, batch: model(batch))
    values = [2 * 4 * size * (size + 1) for size in SIZES]
    if how == "concat":
        assert [layer.count for layer in report.layers] == [sum(values)] * 4
    else:
        assert [layer.count for layer in report.layers] == values * 4
    first = new_head().classes.tower[0]
    zs = [torch.cat([first[0](batch[k]).transpose(0, 1).flatten(1) for batch in batches], dim=1) for k in range(3)]
    expected = [torch.cat(zs, dim=1).mean(1)] if how == "concat" else [z.mean(1) for z in zs]
    layer = head.classes.tower[0][1]
    measured = [member.running_mean for member in layer] if how == "cycle" else list(layer.running_mean.view(-1, 3))
    torch.testing.assert_close(measured, expected)
    head.eval()
    update_bn_stats(head, batches, 4, modules="all", forward=lambda model, batch: model(batch))
    measured = [member.running_mean for member in layer] if how == "cycle" else list(layer.running_mean.view(-1, 3))
    torch.testing.assert_close(measured, expected)


@EVERY_HOW
def test_torchvisions_heads_need_no_patching(torchvision, how):
    from torchvision.models.detection import fcos, retinanet

    xs = [torch.randn(2, 32, size, size) for size in (8, 4, 2)]
    for head in (
        retinanet.RetinaNetHead(32, 2, 3, norm_layer=nn.BatchNorm2d),
        fcos.FCOSHead(32, 2, 3, num_convs=2),
    ):
        for tower in (part for part in head.modules() if isinstance(part, nn.Sequential)):
            for key, layer in tower.named_children():
                if isinstance(layer, nn.GroupNorm):
                    tower[int(key)] = nn.BatchNorm2d(32)
        plain = copy.deepcopy(head)
        before = Picture(head)
        convert_shared_head(head, how, levels=3)
        outputs = head(xs)
        sum(y.square().mean() for y in outputs.values()).backward()
        assert all(p.grad is not None for p in head.parameters())
        if how != "concat":  # levels apart, as one by one
            torch.testing.assert_close(outputs, plain(xs), rtol=1e-4, atol=1e-6)
        if how != "cycle":
            counts = [int(c.max()) for key, c in head.state_dict().items() if key.endswith("num_batches_tracked")]
            assert set(counts) == {1}
        convert_to_batchnorm(head, domain=None if how == "concat" else 0)
        assert Picture(head).modules == before.modules


def test_the_way_round_a_whole_detector(torchvision):
    from torchvision.models.detection import retinanet

    model = torchvision.models.detection.retinanet_resnet50_fpn(weights=None, weights_backbone=None, num_classes=2)
    model.head = retinanet.RetinaNetHead(256, 9, 2, norm_layer=nn.BatchNorm2d)
    convert_shared_head(model.head)
    model.transform.min_size, model.transform.max_size = (64,), 64
    boxes = torch.tensor([[4.0, 4.0, 40.0, 40.0]])
    losses = model([torch.rand(3, 64, 64)] * 2, [{"boxes": boxes, "labels": torch.tensor([1])}] * 2)
    sum(losses.values()).backward()
    layers = [layer for layer in model.head.modules() if isinstance(layer, ConcatSharedBN)]
    assert len(layers) == 8
    assert {int(layer.num_batches_tracked) for layer in layers} == {1}
    update_bn_stats(model.eval(), [[torch.rand(3, 64, 64)] * 2], 1, modules="head.*")


# ---- There and back -----------------------------------------------------------------------------------------------


@EVERY_HOW
def test_there_and_back_is_the_identity(how):
    head = new_head()
    head.classes.tower.note = "mine"
    calls: list[nn.Module] = []
    head.boxes.tower.register_forward_hook(lambda module, args, output: calls.append(module))
    head.register_forward_pre_hook(lambda module, args: None)
    before = Picture(head)
    convert_shared_head(head, how, levels=3)
    assert head.classes.tower.note == "mine"
    head(levels())
    assert set(calls) == {head.boxes.tower}
    handle = head.boxes.tower.register_forward_hook(lambda *args: None)
    handle.remove()
    head.load_state_dict(new_head().state_dict())
    convert_to_batchnorm(head)
    assert Picture(head).modules == before.modules
    assert values_of(head) == values_of(new_head())
    head.zero_grad()
    assert Picture(head) == before


@EVERY_HOW
def test_converting_twice_changes_nothing(how):
    head = convert_shared_head(new_head(), how, levels=3)
    before = Picture(head)
    convert_shared_head(head, how, levels=3)
    assert Picture(head) == before


@pytest.mark.parametrize("first", HOWS)
@EVERY_HOW
def test_from_one_to_another(first, how):
    head, before = new_head(), None
    before = Picture(head)
    convert_shared_head(convert_shared_head(head, first, levels=3), how, levels=3)
    direct = convert_shared_head(new_head(), how, levels=3)
    torch.testing.assert_close(head(levels()), direct(levels()))
    assert values_of(head) == values_of(direct)
    assert [len(m._forward_hooks) for m in head.modules()] == [len(m._forward_hooks) for m in direct.modules()]
    head.load_state_dict(new_head().state_dict())
    convert_to_batchnorm(head)
    assert Picture(head) == before


def test_another_number_of_levels():
    head = convert_shared_head(new_head(), "concat", levels=2)
    with pytest.raises(InputError, match=r"the head Head was converted for 2 levels, but is called on 3; .*levels=3"):
        head(levels())
    convert_shared_head(head, "concat", levels=3)(levels())
    assert len(convert_shared_head(head, "concat")(levels()[:2])) == 4
    convert_shared_head(head, "domain", levels=3)(levels())
    with pytest.raises(InputError, match="converted for 3 levels, but is called on 2"):
        head(levels()[:2])


@TOWERS
def test_where_no_layer_takes_lists_any_more_the_containers_are_what_they_were(how):
    head = convert_shared_head(new_head(), how, levels=3)
    convert_frozen_batchnorm(head)
    assert isinstance(head.classes.tower[0][1], FrozenBatchNorm2d)
    assert not any(isinstance(part, MultiInputSequential) for part in head.modules())
    assert not head._forward_hooks
    assert not head._forward_pre_hooks


def test_a_part_that_goes_back_alone_leaves_the_other_at_work():
    head = new_head()
    convert_shared_head(head)
    convert_to_batchnorm(head, include="boxes")
    assert type(head.boxes.tower) is nn.Sequential
    expected = by_hand(new_head(), levels(), "concat")[:3]
    torch.testing.assert_close(head(levels())[:3], expected)


@TOWERS
def test_copies_and_pickles_have_levels_of_their_own(how):
    head = convert_shared_head(new_head(), how, levels=3)
    file = io.BytesIO()
    torch.save(head, file)
    file.seek(0)
    for twin in (copy.deepcopy(head), torch.load(file, weights_only=False)):
        torch.testing.assert_close(twin(levels()), convert_shared_head(new_head(), how, levels=3)(levels()))
        assert all(int(layer.num_batches_tracked.max()) == 0 for layer in head.modules() if "eps" in vars(layer))
        convert_to_batchnorm(twin, domain=0 if how == "domain" else None)
        assert type(twin.classes.tower) is nn.Sequential
        assert not twin._forward_hooks
    assert isinstance(head.classes.tower, LevelTower)


@TOWERS
@pytest.mark.parametrize("direction", ["there", "back"])
def test_interrupted_at_any_line_it_is_done_or_not_begun(how, direction):
    """Real signals, at every line of towers.py, where hooks and containers change places."""
    for number in itertools.count():
        head = nn.ModuleDict({"tower": conv_bn()})
        if direction == "back":
            convert_shared_head(head, how, levels=3)
            convert = functools.partial(convert_to_batchnorm, head)
        else:
            convert = functools.partial(convert_shared_head, head, how, levels=3)
        before = Picture(head)
        lines = Lines(Nth("towers.py", number)).run(convert)
        if not lines.interrupted:
            break
        assert Picture(head) == before
    assert number > 50
    assert isinstance(head["tower"], LevelTower) == (direction == "there")


class Refusing(Head):
    def register_forward_hook(self, *args: object, **kwargs: object) -> NoReturn:
        raise RuntimeError("no hooks here")


@TOWERS
def test_what_fails_at_the_end_leaves_the_head_as_it_was(how):
    head = Refusing()
    before = Picture(head)
    with pytest.raises(RuntimeError, match="no hooks here"):
        convert_shared_head(head, how, levels=3)
    assert Picture(head) == before


# ---- Loops of all kinds -------------------------------------------------------------------------------------------


def with_loop(loop: Callable[[nn.Module, list[Tensor]], object]) -> nn.Module:
    """A converted head with a tower of one block, and a loop of one's own."""

    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.tower = conv_bn().double()
            self.predict = nn.Identity()

        def forward(self, levels: object) -> object:
            return loop(self, levels)

    return Loop()


def concat_of(xs: list[Tensor]) -> list[Tensor]:
    torch.manual_seed(0)
    conv, _, relu = conv_bn().double()
    concat = ConcatSharedBN(3, dtype=torch.float64)
    return [relu(y) for y in concat([conv(x) for x in xs])]


LOOPS = {
    "backwards": lambda head, xs: [head.tower(x) for x in reversed(xs)][::-1],
    "two after each other": lambda head, xs: [[head.tower(x) for x in xs] for _ in range(2)].pop(),
    "a mapping": lambda head, xs: [head.tower(x) for x in dict(enumerate(xs)).values()],
}


@pytest.mark.parametrize("name", LOOPS)
def test_loops_that_work(name):
    head = convert_shared_head(with_loop(LOOPS[name]))
    torch.testing.assert_close(head(levels()), concat_of(levels()))


def test_levels_as_a_mapping_a_tuple_or_a_keyword_with_others():
    def loop(self, levels):
        return [self.tower(x) for x in (levels.values() if isinstance(levels, dict) else levels)]

    head = convert_shared_head(with_loop(loop))
    xs = levels()
    for given in (dict(enumerate(xs)), tuple(xs)):
        torch.testing.assert_close(head(given), concat_of(xs))
    torch.testing.assert_close(head(levels=xs), concat_of(xs))
    assert not any(layer._forward_hooks for layer in head.tower.modules())


def test_one_tensor_given_for_several_levels():
    x = levels()[0]
    head = convert_shared_head(with_loop(lambda head, xs: [head.tower(x) for x in xs]))
    torch.testing.assert_close(head([x, x, levels()[1]]), concat_of([x, x, levels()[1]]))


WRONG_LOOPS = {
    "something before": (
        lambda head, xs: [head.tower(x * 2) for x in xs],
        "tower 'tower' .* is none of the 3 levels .*cycle",
    ),
    "some levels only": (
        lambda head, xs: [head.tower(x) for x in xs[1:]],
        "tower 'tower' of the head Loop was called on 2 of 3 levels",
    ),
    "twice on each": (lambda head, xs: [head.tower(x) + head.tower(x) for x in xs], "called twice on level 0 before"),
    "in place": (lambda head, xs: [head.tower(x.mul_(2)) for x in xs], "level 1 was changed in place"),
    "no list": (
        lambda head, xs: [head.tower(x) for x in xs.split(1)],
        "called without a list of levels, .* convert the",
    ),
    "an exception": (lambda head, xs: [head.tower(x) for x in xs] + [xs["x"]], "list indices"),
}


@pytest.mark.parametrize("name", WRONG_LOOPS)
def test_loops_that_cannot_work_are_errors_and_the_next_forward_is_right(name):
    loop, message = WRONG_LOOPS[name]
    fails = True
    head = convert_shared_head(with_loop(lambda head, xs: loop(head, xs) if fails else [head.tower(x) for x in xs]))
    xs = levels()
    with pytest.raises((InputError, TypeError), match=message):
        head(torch.cat(levels()[:1] * 2) if name == "no list" else xs)
    assert head.tower._levels.tensors is None
    assert not head.tower._levels.rounds
    fails = False
    torch.testing.assert_close(head(levels()), concat_of(levels()))


@TOWERS
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_checkpoint_around_the_tower_is_an_error_and_around_the_head_works(how, use_reentrant):
    inside = convert_shared_head(
        with_loop(lambda head, xs: [checkpoint(head.tower, x, use_reentrant=use_reentrant) for x in xs]),
        how,
        levels=3,
    )
    with pytest.raises(InputError, match=r"activation checkpointing|of which domain"):
        loss_of(inside(levels(requires_grad=True))).backward()
    head, plain = (convert_shared_head(new_head(), how, levels=3) for _ in range(2))
    xs, same = levels(requires_grad=True), levels(requires_grad=True)
    loss_of(checkpoint(lambda *xs: tuple(head(list(xs))), *xs, use_reentrant=use_reentrant)).backward()
    loss_of(plain(same)).backward()
    torch.testing.assert_close([x.grad for x in xs], [x.grad for x in same])
    torch.testing.assert_close([p.grad for p in head.parameters()], [p.grad for p in plain.parameters()])
    assert values_of(head) == values_of(plain)


def test_threads_have_levels_of_their_own():
    """The replicas of DataParallel share hooks."""
    head = convert_shared_head(new_head())
    expected = [convert_shared_head(new_head())(levels(seed)) for seed in range(4)]
    barrier, got = threading.Barrier(4), {}

    def meet(*args: object) -> None:
        barrier.wait(30)

    handle = head.classes.tower[0][0].register_forward_hook(meet)

    def forward(seed: int) -> None:
        got[seed] = head(levels(seed))

    threads = [threading.Thread(target=forward, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    handle.remove()
    torch.testing.assert_close([got[seed] for seed in range(4)], expected)


def test_an_unchanged_loop_is_told_of_if_layers_alone_are_converted():
    head = convert_concat_shared(new_head())
    with pytest.warns(UserWarning, match="convert_shared_head"):
        head(levels())
    convert_shared_head(head)
    torch.testing.assert_close(head(levels()), by_hand(new_head(), levels(), "concat"))


@TOWERS
def test_a_graph_of_one_level_cannot_be_had_in_training(how):
    with pytest.raises(InputError, match="is not running"):
        torch.fx.symbolic_trace(convert_shared_head(new_head(), how, levels=3).classes.tower)


def test_compiled_in_evaluation_and_an_error_in_training():
    torch._dynamo.reset()
    head = convert_shared_head(new_head()).eval()
    expected = head(levels())
    compiled = torch.compile(head, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(levels()), expected)
    with pytest.raises(Exception, match=r"torch\.compile cannot see"):
        compiled.train()(levels())
    torch._dynamo.reset()


@TOWERS
def test_compiled_in_parts_it_is_an_error_too(how):
    torch._dynamo.reset()
    compiled = torch.compile(convert_shared_head(new_head(), how, levels=3), backend="eager")
    with pytest.raises(InputError, match=r"torch\.compile"):
        compiled(levels())
    torch._dynamo.reset()


@TOWERS
def test_a_tower_in_several_places(how):
    """Of one head, or inside another tower: it is one tower still, and works in each."""
    head = new_head()
    head.boxes = head.classes
    head.classes.tower[2] = head.classes.tower[0]
    before, plain = Picture(head), copy.deepcopy(head)
    convert_shared_head(head, how, levels=3)
    torch.testing.assert_close(head(levels()), by_hand(plain, levels(), how))
    assert head.classes.tower[0] is head.classes.tower[2]
    assert int(head.classes.tower[0][1].num_batches_tracked.max()) == 4
    head.load_state_dict(plain.state_dict())
    convert_to_batchnorm(head)
    assert Picture(head) == before


def test_a_slice_of_a_tower_is_no_part_of_the_head():
    head = convert_shared_head(new_head())
    part = head.classes.tower[:1]
    assert [len(part), isinstance(part[0][1], ConcatSharedBN)] == [1, True]
    with pytest.raises(InputError, match="is not running"):
        part(levels()[0])
    assert len(part(levels())) == 3


# ---- Wrong calls --------------------------------------------------------------------------------------------------


class Loose(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 1).double(), nn.BatchNorm2d(3).double()

    def forward(self, levels: list[Tensor]) -> list[Tensor]:
        return [self.bn(self.conv(x)) for x in levels]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bn(x)


def blocks() -> nn.Module:
    return nn.ModuleDict({"tower": nn.Sequential(nn.Conv2d(3, 3, 1), Block())})


WRONG_CALLS = {
    "how": (Loose, {"how": "all"}, "how='all' must be 'concat', 'domain' or 'cycle'"),
    "no levels": (Loose, {"how": "domain"}, r"how='domain' needs levels="),
    "no levels to count": (Loose, {"how": "cycle"}, r"how='cycle' needs levels="),
    "levels": (Loose, {"how": "concat", "levels": 0}, "levels=0 must be a whole number"),
    "loose": (Loose, {}, r"layer 'bn' is in no nn\.Sequential .* how='cycle'"),
    "in a block": (blocks, {}, r"layer 'tower\.1' \(Block\) holds a BatchNorm layer, and has a forward of its own"),
    "a block, domains": (blocks, {"how": "domain", "levels": 3}, r"layer 'tower\.1' \(Block\)"),
    "a tower": (conv_bn, {}, "the head given is an nn.Sequential, .* pass the module whose forward takes the list"),
    "no such layer": (new_head, {"include": "classes.towr"}, "matches no BatchNorm layer of Head.*'classes.tower'"),
}


@pytest.mark.parametrize("name", WRONG_CALLS)
def test_wrong_calls_change_nothing(name):
    build, arguments, message = WRONG_CALLS[name]
    head = build()
    before = Picture(head)
    with pytest.raises(InputError, match=message):
        convert_shared_head(head, **arguments)
    assert Picture(head) == before


def test_a_head_without_towers_can_count():
    head = convert_shared_head(Loose(), "cycle", levels=3)
    assert isinstance(head.bn, CycleBatchNormList)
    with one_cycle(head):
        head(levels())
    assert [int(member.num_batches_tracked) for member in head.bn] == [1, 1, 1]


def test_a_head_that_takes_lists_already_is_left_to_do_so():
    head = MultiInputSequential(*conv_bn()).double()
    convert_shared_head(head)
    assert not head._forward_hooks
    assert type(head) is MultiInputSequential
    assert len(head(levels())) == 3
    assert int(head[1].num_batches_tracked) == 1


@TOWERS
def test_nothing_to_convert_warns(how):
    with pytest.warns(UserWarning, match="nothing is converted") as caught:
        convert_shared_head(nn.ModuleDict({"tower": nn.Sequential(nn.ReLU())}), how, levels=2)
    assert caught[0].filename == __file__


def test_other_layers_of_several_domains_keep_out_of_it():
    """include= says which; the rest of the head goes on level by level."""
    head = convert_shared_head(new_head(), "domain", levels=3, include="boxes")
    assert isinstance(head.boxes.tower[0][1], DomainSpecificBN)
    assert isinstance(head.classes.tower[0][1], nn.BatchNorm2d)
    assert type(head.classes.tower) is nn.Sequential
    head(levels())
    assert int(head.classes.tower[0][1].num_batches_tracked) == 3
