"""modules=: which layers are recalibrated, and that all others stay still."""

import pytest
import torch
from conftest import state_of
from torch import nn

from precisebn import InputError, get_bn_modules, update_bn_stats
from precisebn.models.selection import named_modules, select, select_modules

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ["stem.1", "body.0.bn", "body.1.bn", "head"]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.bn = nn.BatchNorm1d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(self.fc(x)).relu()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
        self.body = nn.Sequential(Block(), Block())
        self.head = nn.BatchNorm1d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.stem(x)))


@pytest.fixture
def model() -> Net:
    return Net()


SELECTIONS = {
    "training": (lambda m: "training", NAMES[:3]),
    "all": (lambda m: "all", NAMES),
    "a name": (lambda m: "body.0.bn", ["body.0.bn"]),
    "a pattern": (lambda m: "body.*", ["body.0.bn", "body.1.bn"]),
    "a pattern with ?": (lambda m: "body.?.bn", ["body.0.bn", "body.1.bn"]),
    "the name of a container": (lambda m: "body", ["body.0.bn", "body.1.bn"]),
    "a layer": (lambda m: m.head, ["head"]),
    "a container": (lambda m: m.body, ["body.0.bn", "body.1.bn"]),
    "the model": (lambda m: m, NAMES),
    "several": (lambda m: [m.head, "stem.*", m.body[1]], ["stem.1", "body.1.bn", "head"]),
    "a generator": (lambda m: (name for name in ("head", "stem.1")), ["stem.1", "head"]),
    "one thing twice": (lambda m: ["head", m.head], ["head"]),
    "what get_bn_modules gives": (get_bn_modules, NAMES[:3]),
}


@pytest.mark.parametrize("selection", SELECTIONS)
def test_chosen_layers_in_the_models_order_and_no_others(model, selection):
    choose, expected = SELECTIONS[selection]
    model.head.eval()
    before = state_of(model)
    report = update_bn_stats(model, [torch.randn(8, 3)] * 3, 3, modules=choose(model))
    assert [layer.name for layer in report.layers] == expected
    assert set(before.differences(state_of(model))) == {
        f"{name}.{buffer}" for name in expected for buffer in ("running_mean", "running_var", "num_batches_tracked")
    }


def test_layers_that_are_not_chosen_keep_their_mode_while_the_model_runs(model):
    modes = []
    model.body[0].bn.register_forward_hook(lambda module, args, output: modes.append(module.training))
    update_bn_stats(model, [torch.randn(8, 3)], 1, modules=["stem.1", "head"])
    assert modes == [True]


def test_eval_and_all_recalibrates_with_dropout_off(model):
    model.eval()
    batches, outputs = [torch.randn(8, 3)] * 2, []
    update_bn_stats(model, batches, 2, modules="all", forward=lambda m, x: outputs.append(m(x)))
    assert torch.equal(outputs[0], outputs[1])
    assert not model.stem[1].running_mean.eq(0).all()
    assert not any(module.training for module in model.modules())


def test_training_mode_has_dropout_on(model):
    outputs = []
    update_bn_stats(model, [torch.randn(8, 3)] * 2, 2, forward=lambda m, x: outputs.append(m(x)))
    assert not torch.equal(outputs[0], outputs[1])


def test_a_layer_used_in_two_places_is_one_layer_under_its_first_name():
    bn = nn.BatchNorm1d(2)
    model = nn.Sequential(bn, nn.ReLU(), bn)
    report = update_bn_stats(model, [torch.randn(4, 2)], 1)
    assert [(layer.name, layer.count) for layer in report.layers] == [("0", 8)]
    assert get_bn_modules(model) == [bn]


def test_a_layer_with_two_names_is_found_by_either():
    bn = nn.BatchNorm1d(2)
    model = nn.Sequential(bn, nn.ReLU(), bn)
    report = update_bn_stats(model, [torch.randn(4, 2)], 1, modules="2")
    assert [layer.name for layer in report.layers] == ["0"]


@pytest.mark.parametrize("wrong", ["heads", "tail.*", nn.BatchNorm1d(4), "stem.0", ["head", "bdy.*"]], ids=repr)
def test_a_selection_of_nothing_lists_the_layers_there_are(model, wrong):
    before = state_of(model)
    with pytest.raises(InputError, match=r"matches no BatchNorm layer of Net; it has 4: 'stem\.1', .*'head'"):
        update_bn_stats(model, [torch.randn(8, 3)], 1, modules=wrong)
    assert state_of(model) == before


NEAR_MISSES = {
    "a letter too many": ("heads", "Did you mean 'head'?"),
    "a pattern with a typo": ("bdy.*", "Did you mean 'body.1' or 'body.0' or 'body'?"),
    "the wrapper's name in front": ("module.body.0.bn", "Did you mean 'body.0.bn' or"),
    "a part of a block that holds none": ("body.0.fc", "'body.0'"),
}


@pytest.mark.parametrize("argument", ["modules", "include", "exclude"])
@pytest.mark.parametrize("miss", NEAR_MISSES)
def test_what_comes_near_is_suggested(model, miss, argument):
    item, suggestion = NEAR_MISSES[miss]
    included, excluded = (None, item) if argument == "exclude" else (item, None)
    with pytest.raises(InputError, match=rf"^{argument}='.*' matches no BatchNorm layer of Net; it has 4: ") as error:
        select(model, included, excluded, argument=argument)
    assert suggestion in str(error.value).partition(". ")[2]


@pytest.mark.parametrize("argument", ["modules", "include", "exclude"])
def test_what_is_far_from_all_is_met_with_no_suggestion(model, argument):
    with pytest.raises(InputError, match=r"'head'$"):
        select(model, *((None, "zzz") if argument == "exclude" else ("zzz", None)), argument=argument)


EXCLUSIONS = {
    "of those in training": ("training", "body", ["stem.1"]),
    "of all": ("all", ["body.0", "head"], ["stem.1", "body.1.bn"]),
    "of a pattern's": ("body.*", "body.1.bn", ["body.0.bn"]),
    "of the one that is chosen": ("head", lambda m: m.head, []),
    "of none": ("all", [], NAMES),
}


@pytest.mark.parametrize("name", EXCLUSIONS)
def test_exclude(model, name):
    modules, exclude, expected = EXCLUSIONS[name]
    model.head.eval()
    selection = select_modules(model, modules, exclude(model) if callable(exclude) else exclude)
    assert list(selection.chosen) == expected


def test_a_selection_says_what_was_named_one_by_one(model):
    selection = select(model, ["body.0.bn", "stem", "body.?.bn", model.head])
    assert list(selection.chosen) == NAMES
    assert selection.named == {model.body[0].bn, model.head}
    assert list(selection.found) == NAMES


def test_a_choice_walks_the_model_once(model, monkeypatch):
    """Every walk over a network of a thousand modules costs a millisecond."""
    walks = []

    def walked(*args, **kwargs):
        walks.append(args)
        return named_modules(*args, **kwargs)

    monkeypatch.setattr("precisebn.models.selection.named_modules", walked)
    select(model, ["body.*", model.head, "stem.1"], ["head", "body.1"])
    assert len(walks) == 1


def test_modules_are_walked_as_torch_walks_them(model):
    shared = nn.Sequential(model, nn.ModuleList([model.body, None, model.stem]))
    shared.register_module("nothing", None)
    for remove_duplicate in (True, False):
        expected = list(shared.named_modules(remove_duplicate=remove_duplicate))
        assert list(named_modules(shared, remove_duplicate)) == expected


def test_modules_inside_a_scripted_one_are_walked(model):
    scripted = nn.Sequential(torch.jit.script(nn.Sequential(nn.Conv2d(3, 3, 1))), nn.BatchNorm2d(3))
    assert [name for name, _ in named_modules(scripted)] == [name for name, _ in scripted.named_modules()]


def test_get_bn_modules_lists_training_layers_as_fvcore_does(fvcore_bn, model):
    model.body[0].eval()
    assert get_bn_modules(model) == fvcore_bn.get_bn_modules(model) == [model.stem[1], model.body[1].bn, model.head]


def test_get_bn_modules_finds_subclasses_and_lazy_layers():
    class Own(nn.BatchNorm2d):
        pass

    layers = [Own(2), nn.SyncBatchNorm(2), nn.LazyBatchNorm3d()]
    assert get_bn_modules(nn.ModuleList([*layers, nn.InstanceNorm2d(2), nn.GroupNorm(1, 2)])) == layers


def test_a_pattern_selects_the_layers_inside_what_it_matches():
    model = nn.ModuleDict({name: nn.Sequential(nn.BatchNorm1d(2)) for name in ("layer1", "layer2", "head")})
    assert list(select_modules(model, "layer[12]").chosen) == ["layer1.0", "layer2.0"]


def test_names_are_those_without_wrappers():
    model = nn.Sequential(nn.BatchNorm1d(2), torch.optim.swa_utils.AveragedModel(nn.Sequential(nn.BatchNorm1d(2))))
    assert list(select(nn.DataParallel(model), None).found) == ["0", "1.0"]
