"""diff_state: what differs, of what kind, and what is said of it."""

import copy
import json
import math
from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn

import precisebn
from precisebn import InputError, diff_state, snapshot
from precisebn.nn import CycleBatchNormList, DomainSpecificBN
from precisebn.nn.population import Recordable, RunningStatistics
from precisebn.state.diff import DIFFERENT

pytestmark = pytest.mark.usefixtures("one_thread")


class Net(nn.Module):
    """A parameter of its own, tied weights, BatchNorm, buffers in the state dict and not."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.embed = nn.Embedding(5, 4)
        self.bn = nn.BatchNorm1d(4, eps=1e-3)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("cache", torch.zeros(3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.bn(self.embed(x))) * self.scale


def statuses(diff: precisebn.StateDiff) -> dict[str, str]:
    return {row.name: row.status for row in diff.rows if row.status != "unchanged"}


def test_nothing_differs_in_a_copy():
    model = Net()
    diff = diff_state(model, copy.deepcopy(model))
    assert not diff
    assert diff.is_empty
    assert len(diff.unchanged) == len(diff.rows) == 9
    assert "nothing differs in 9 tensors" in str(diff)


def test_a_forward_moves_statistics_and_nothing_else():
    model = Net()
    before = snapshot(model)
    model(torch.arange(5))
    diff = diff_state(before, model)
    assert statuses(diff) == dict.fromkeys(("bn.running_mean", "bn.running_var", "bn.num_batches_tracked"), "changed")
    assert diff.counts() == {
        "parameter": {"unchanged": 4}, "statistic": {"changed": 3}, "buffer": {"unchanged": 2}
    }  # fmt: skip


def test_drift_is_in_units_of_the_layer():
    model = Net()
    nn.init.constant_(model.bn.running_var, 3.0)
    before = snapshot(model)
    model.bn.running_mean += torch.tensor([0.0, 0.0, 1.0, 2.0])
    model.bn.running_var.mul_(2)
    mean, var = diff_state(before, model).changed
    assert mean.unit == "std"
    assert mean.max_drift == pytest.approx(2 / math.sqrt(3 + 1e-3), rel=1e-7)
    assert mean.drift == pytest.approx(math.sqrt(5 / 4 / (3 + 1e-3)), rel=1e-7)
    assert var.unit == "log"
    assert var.drift == var.max_drift == pytest.approx(math.log((6 + 1e-3) / (3 + 1e-3)), rel=1e-7)


def test_the_kind_comes_from_a_model_where_there_is_one_and_from_names_elsewhere():
    model = Net()
    for other in (model, model.state_dict()):
        rows = {row.name: row.kind for row in diff_state(copy.deepcopy(model.state_dict()), other).rows}
        assert rows["bn.running_mean"] == rows["bn.num_batches_tracked"] == "statistic"
        assert rows["bn.weight"] == rows["embed.weight"] == "parameter"
        assert rows["steps"] == "buffer"
    lone = diff_state({"running_mean": torch.zeros(2)}, {"running_mean": torch.ones(2)})
    assert lone.rows[0].kind == "parameter"  # no variance beside it: of no normalization layer


def test_buffers_that_no_state_dict_has_are_not_missed_in_one():
    model = Net()
    diff = diff_state(model, copy.deepcopy(model.state_dict()))
    assert not diff
    assert "1 buffer is in no state dict, and is left out (persistent=False)" in str(diff)
    other = Net()
    del other.cache
    assert statuses(diff_state(snapshot(model), other))["cache"] == "only before"


def test_a_shared_tensor_is_one_row_whose_names_are_all_there():
    model = Net()
    before = snapshot(model)
    with torch.no_grad():
        model.head.weight += 1
    [row] = diff_state(before, model).changed
    assert (row.name, row.shared_with) == ("embed.weight", ("head.weight",))
    assert "head" in diff_state(before, model)

    kept_once = {key: value for key, value in model.state_dict().items() if key != "head.weight"}
    assert not diff_state(model, copy.deepcopy(kept_once))
    assert not diff_state(copy.deepcopy(kept_once), model)


def test_what_was_shared_and_is_no_longer():
    model = Net()
    before = snapshot(model)
    model.head.weight = nn.Parameter(model.embed.weight.detach() + 1)
    diff = diff_state(before, model)
    assert statuses(diff) == {"head.weight": "changed"}
    assert "'embed.weight' and 'head.weight' no longer share memory" in str(diff)
    assert "share now" in str(diff_state(model, before))


def test_keys_on_one_side_shapes_and_dtypes():
    before = {"a": torch.ones(2), "b": torch.ones(2, 3), "c": torch.ones(4), "e": torch.ones(1)}
    after = {"a": torch.ones(2), "b": torch.ones(3, 2), "c": torch.ones(4).half(), "d": torch.ones(1)}
    diff = diff_state(before, after)
    assert statuses(diff) == {"b": "other shape", "c": "changed", "e": "only before", "d": "only after"}
    assert (diff.other_shape[0].shape_before, diff.other_shape[0].shape_after) == ((2, 3), (3, 2))
    assert diff["c"].rows[0].remark == "float32 to float16"
    assert diff["c"].rows[0].max_abs == 0
    for shown in ("2x3 -> 3x2", "only before", "only after", "float32 to float16"):
        assert shown in str(diff)


def test_flips_of_modes_are_said_and_are_no_change():
    model = Net()
    before = snapshot(model)
    model.bn.eval()
    model.scale.requires_grad_(False)
    diff = diff_state(before, model)
    assert diff.is_empty
    assert diff.training == {"bn": (True, False)}
    assert diff.requires_grad == {"scale": (True, False)}
    assert "training mode is now False in 1: 'bn'" in str(diff)
    assert diff["bn"].training == {"bn": (True, False)}
    assert diff["bn"].requires_grad == {}


def test_the_table_shows_the_largest_and_says_how_many_more():
    before = {f"l{i}.weight": torch.ones(2) for i in range(30)}
    after = {key: value * (1 + i) for i, (key, value) in enumerate(before.items())}
    diff = diff_state(before, after)
    lines = str(diff).splitlines()
    assert lines[0] == "29 of 30 tensors differ, in 29 layers"
    assert "l29.weight" in lines[5]
    assert "... and 9 more" in lines
    assert "l1.weight" in diff.table(None)
    assert len({line.rindex("parameter") for line in lines[5:25]}) == 1  # aligned


def test_a_table_is_made_of_numbers_that_can_be_read():
    """Golden: what a user sees of an encoder that moved."""
    before = {
        "bn.weight": torch.ones(2),
        "bn.running_mean": torch.zeros(2),
        "bn.running_var": torch.ones(2),
        "bn.num_batches_tracked": torch.tensor(10),
    }
    after = before | {
        "bn.running_mean": torch.tensor([0.5, 0.0]),
        "bn.running_var": torch.tensor([1.0, math.nan]),
        "bn.num_batches_tracked": torch.tensor(12),
    }
    assert str(diff_state(before, after)).splitlines() == [
        "3 of 4 tensors differ, in 1 layer",
        "                    changed  unchanged",
        "parameters                -          1",
        "running statistics        3          -",
        "",
        "tensor                  kind       shape        changed  max |d|  rms d      drift",
        "bn.running_var          statistic  2      1 (1 NaN/Inf)        0      0      0 log",
        "bn.running_mean         statistic  2                  1      0.5  0.354  0.354 std",
        "bn.num_batches_tracked  statistic  ()          10 to 12        2      2",
        "(drift: rms over channels; of a mean in std before, of a variance |log ratio|)",
        "note: eps taken to be 1e-05: state dicts do not say theirs",
    ]


def test_json():
    model = Net()
    before = snapshot(model)
    with torch.no_grad():
        model.bn.running_mean.fill_(math.nan)
        model.scale.zero_()
        nn.init.zeros_(model.bn.bias)
    model.eval()
    found = json.loads(json.dumps(diff_state(before, model).to_dict(), allow_nan=False))
    assert found["different"] is True
    assert found["counts"]["statistic"] == {"changed": 1, "unchanged": 2}
    assert {row["name"]: row["status"] for row in found["rows"]}["scale"] == "changed"
    assert found["training"][""] == [True, False]


def test_a_part_is_found_by_layer_and_by_tensor_and_near_misses_are_named():
    model = nn.ModuleDict({"backbone": nn.ModuleDict({"bn1": nn.BatchNorm1d(2)}), "head": nn.Linear(2, 2)})
    diff = diff_state(model, copy.deepcopy(model))
    assert len(diff["backbone"].rows) == len(diff["backbone.bn1"].rows) == 5
    assert [row.name for row in diff["head.bias"].rows] == ["head.bias"]
    assert len(diff[""].rows) == 7
    with pytest.raises(KeyError, match=r"did you mean 'backbone\.bn1'"):
        diff["bn1"]
    with pytest.raises(KeyError, match=r"`rows` has all"):
        diff[0]
    assert "backbon" not in diff
    assert list(diff.layers) == ["backbone.bn1", "head"]


# ---- Names -----------------------------------------------------------------------------------------------------------


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + key: value.clone() for key, value in state.items()}


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_what_wrappers_put_in_front_of_names_is_set_aside(prefix):
    model = Net()
    state = prefixed(model.state_dict(), prefix)
    state[f"{prefix}bn.running_mean"] += 1
    for before, after in ((model, state), (state, model), (model.state_dict(), state), (snapshot(model), state)):
        diff = diff_state(before, after)
        assert statuses(diff) == {"bn.running_mean": "changed"}
        assert diff.changed[0].unit == "std"


def test_names_inside_of_a_model_and_a_users_own_module_called_module():
    own = nn.ModuleDict({"module": nn.BatchNorm1d(2)})
    diff = diff_state(own, copy.deepcopy(own.state_dict()))
    assert diff.rows[0].name == "module.weight"
    assert not diff
    inside = {f"backbone.module.{key}": value.clone() for key, value in own["module"].state_dict().items()}
    assert not diff_state(nn.ModuleDict({"backbone": own["module"]}), inside)


def test_averages_have_a_counter_beside_the_module():
    model = Net()
    average = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    assert statuses(diff_state(model, average)) == {"n_averaged": "only after"}
    assert statuses(diff_state(model, copy.deepcopy(average.state_dict()))) == {"n_averaged": "only after"}


def test_compiled_and_data_parallel_models_have_the_names_of_the_model():
    model = Net()
    other = copy.deepcopy(model)
    compiled = torch.compile(nn.DataParallel(other), backend="eager")
    assert not diff_state(model, compiled)
    other.steps += 1
    assert statuses(diff_state(model, compiled)) == {"steps": "changed"}
    assert list(snapshot(compiled)) == list(snapshot(model))


def test_nothing_in_common_says_which_prefix_is_in_the_way():
    model = Net()
    lightning = prefixed(model.state_dict(), "net.")
    with pytest.raises(InputError, match=r"Those of after have 'net\.' in front: pass \{key\.removeprefix\('net\.'\)"):
        diff_state(model, lightning)
    with pytest.raises(InputError, match=r"no name in common: 'a' against 'b'$"):
        diff_state({"a": torch.ones(1)}, {"b": torch.ones(1)})


# ---- Populations of other modules ------------------------------------------------------------------------------------


def test_modules_with_populations_of_their_own():
    model = nn.ModuleList([DomainSpecificBN(3, 2), CycleBatchNormList(2, num_features=3)])
    before = snapshot(model)
    model[0].running_mean[1] += 1
    model[1][1].running_var.mul_(2)
    diff = diff_state(before, model)
    assert {row.name: (row.kind, row.unit) for row in diff.changed} == {
        "0.running_mean": ("statistic", "std"),
        "1.1.running_var": ("statistic", "log"),
    }
    assert diff["0"].changed[0].shape_before == (2, 3)


class Centered(Recordable):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(3))
        self.register_buffer("spread", torch.full((3,), 4.0))
        self.register_buffer("other", torch.zeros(3))

    def populations(self) -> list[RunningStatistics]:
        return [RunningStatistics(self.centre, self.spread, None, eps=0.0)]


def test_declared_populations_under_other_names():
    model = nn.Sequential(Centered())
    before = snapshot(model)
    model[0].centre += 1
    model[0].other += 1
    diff = diff_state(before, model)
    assert {row.name: (row.kind, row.unit, row.drift) for row in diff.changed} == {
        "0.centre": ("statistic", "std", 0.5),
        "0.other": ("buffer", "", None),
    }


# ---- Hostile state dicts ---------------------------------------------------------------------------------------------


def test_empty_sides():
    assert diff_state({}, {}).is_empty
    assert str(diff_state({}, {})) == "nothing differs in 0 tensors"
    assert statuses(diff_state({}, {"a": torch.ones(1)})) == {"a": "only after"}
    assert diff_state(nn.ReLU(), nn.ReLU()).is_empty


def test_zero_dimensions_empty_tensors_and_expanded_ones():
    before = {"scalar": torch.tensor(1.0), "empty": torch.empty(0, 3), "wide": torch.ones(1).expand(1 << 20)}
    after = {"scalar": torch.tensor(2.0), "empty": torch.empty(0, 3), "wide": torch.ones(1 << 20)}
    assert statuses(diff_state(before, after)) == {"scalar": "changed"}


def test_optimizer_states_nested_mappings_lists_and_keys_that_are_no_strings():
    model = Net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    model(torch.arange(5)).sum().backward()
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    assert diff_state(before, optimizer.state_dict()).is_empty
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.2
    diff = diff_state(before, optimizer.state_dict())
    assert diff["state.0.step"].rows[0].remark == "1.0 to 2.0"
    [lr] = diff["param_groups.0.lr"].rows
    assert (lr.kind, lr.status, lr.remark) == ("value", "changed", "0.1 to 0.2")
    assert "exp_avg" in str(diff)


def test_keys_that_look_alike_stay_apart():
    before = {0: torch.ones(1), "0": torch.zeros(1), "a": {"b": torch.ones(1)}, "a.b": torch.zeros(1), None: 1}
    diff = diff_state(before, copy.deepcopy(before))
    assert diff.is_empty
    assert [row.name for row in diff.rows] == ["0", "0'", "a.b", "a.b'", "None"]


def test_a_mapping_inside_of_itself_ends():
    before: dict[str, object] = {"a": torch.ones(1)}
    before["again"] = before
    assert diff_state(before, {"a": torch.ones(1)}).is_empty


def test_values_that_are_no_tensors():
    class Odd:
        pass

    before = {"w": torch.ones(1), "s": "x", "f": math.nan, "o": Odd(), "t": 1, "n": None, "big": "y" * 99}
    after = {"w": torch.ones(1), "s": "y", "f": math.nan, "o": Odd(), "t": torch.ones(1), "n": None, "big": "z" * 99}
    diff = diff_state(before, after)
    assert statuses(diff) == {"s": "changed", "o": "not compared", "t": "changed", "big": "changed"}
    assert diff["o"].rows[0].remark == "a value of Odd"
    assert "1 not compared: a value of Odd: o" in str(diff)


def test_meta_tensors_and_lazy_modules_are_said_not_to_be_compared():
    model = nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d())
    before = snapshot(model)
    assert diff_state(before, model).not_compared
    model(torch.randn(4, 2))
    diff = diff_state(before, model)
    assert {row.remark for row in diff.not_compared} == {"not initialized yet (before)"}
    meta = copy.deepcopy(model).to("meta")
    diff = diff_state(model, meta)
    assert diff.is_empty
    assert len(diff.not_compared) == len(diff.rows) == 7
    assert diff["0"].rows[0].shape_after == (3, 2)


def test_the_same_tensors_on_both_sides_cannot_show_a_change():
    """The trap of ``before = model.state_dict()``."""
    model = Net()
    before = model.state_dict()
    with pytest.warns(UserWarning, match=r"state_dict\(\) does not copy; take snapshot\(model\) before"):
        diff_state(before, model)
    part = OrderedDict(before, **{"bn.weight": before["bn.weight"].clone()})
    diff_state(part, model)  # a copy that shares some of them is nothing to warn of


class Extra(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.state = {"calls": 0, "history": torch.zeros(2)}

    def get_extra_state(self) -> object:
        return self.state

    def set_extra_state(self, state: object) -> None:
        self.state = state


def test_the_extra_state_of_modules():
    model = nn.Sequential(Extra())
    before, dictionary = snapshot(model), copy.deepcopy(model.state_dict())
    model[0].state["calls"] = 3
    model[0].state["history"] += 1
    for side in (before, dictionary):
        assert statuses(diff_state(side, model)) == {
            "0._extra_state.calls": "changed",
            "0._extra_state.history": "changed",
        }


def test_an_inference_mode_of_ones_own_is_no_obstacle():
    with torch.inference_mode():
        model = Net()
        before = snapshot(model)
        model.bn.running_mean += 1
    assert statuses(diff_state(before, model)) == {"bn.running_mean": "changed"}


def test_neither_side_is_changed_and_no_graph_is_made():
    model, other = Net(), Net()
    versions = [(t._version, t.grad_fn) for t in (*model.state_dict().values(), *other.state_dict().values())]
    diff = diff_state(model, other)
    assert versions == [(t._version, t.grad_fn) for t in (*model.state_dict().values(), *other.state_dict().values())]
    assert all(row.status in DIFFERENT for row in diff.changed)


# ---- Wrong calls -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("side", "message"),
    [
        (3, "before must be a model, a snapshot, a state dict or the path of a checkpoint, not int$"),
        ([torch.ones(1)], "not list$"),
        (torch.ones(1), "not Tensor$"),
        (torch.optim.SGD([torch.ones(1)]), r"not SGD; pass its state_dict\(\)$"),
    ],
)
def test_what_is_no_side(side, message):
    with pytest.raises(InputError, match=message):
        diff_state(side, {})


# ---- Models of others ------------------------------------------------------------------------------------------------


def test_resnets_of_torchvision(torchvision):
    model = torchvision.models.resnet18()
    before = snapshot(model)
    model.train()(torch.randn(2, 3, 32, 32))
    diff = diff_state(before, model)
    assert diff.counts() == {"parameter": {"unchanged": 62}, "statistic": {"changed": 60}}
    assert len({row.layer for row in diff.changed}) == 20
    assert {row.unit for row in diff["layer1.0.bn1"].changed} == {"std", "log", ""}


@pytest.mark.parametrize("name", ["efficientnet_b0", "vit_tiny_patch16_224", "resnet18d"])
def test_models_of_timm(timm, name):
    model = timm.create_model(name)
    state = copy.deepcopy(model.state_dict())
    assert diff_state(state, model).is_empty
    with torch.no_grad():
        next(model.parameters()).add_(1)
    [row] = diff_state(state, model).changed
    assert row.max_abs == pytest.approx(1, rel=1e-6)


def test_the_picture(tmp_path):
    pytest.importorskip("matplotlib")
    model = Net()
    before = snapshot(model)
    model(torch.arange(5))
    with torch.no_grad():
        model.scale.fill_(3)
        model.bn.bias.copy_(-model.bn.bias)  # -0.0
        model.bn.weight.fill_(math.nan)
    diff = diff_state(before, model)
    figure = diff.plot(tmp_path / "diff.png")
    assert (tmp_path / "diff.png").stat().st_size > 1000
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["parameters and buffers", "running means", "running variances"]
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == ["(the model)", "bn"]
    diff_state({}, {}).plot()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors(layout):
    def nested(*values, length=3):
        return torch.nested.nested_tensor([torch.ones(2) * values[0], torch.ones(length) * values[1]], layout=layout)

    assert diff_state({"a": nested(1, 2)}, {"a": nested(1, 2)}).is_empty
    [row] = diff_state({"a": nested(1, 2)}, {"a": nested(1, 4)}).changed
    assert (row.shape_before, row.num_changed, row.max_abs) == ((2, -1), 3, 2.0)
    diff = diff_state({"a": nested(1, 2)}, {"a": nested(1, 2, length=4)})
    assert len(diff.other_shape) == 1
    json.dumps(diff.to_dict())


def test_the_remedy_for_names_that_do_not_meet_can_be_run(tmp_path):
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    values = model.state_dict()
    path = tmp_path / "a.pt"
    outer = nn.ModuleDict({"net": model})
    for given in (
        {"epoch": 1, "state_dict_ema": values},
        {"epoch": 1, "state_dict": {f"net.{key}": value for key, value in values.items()}},
        {f"net.{key}": value for key, value in values.items()},
        {"epoch": 1, "model": outer},
        outer,
        snapshot(outer),
        path,
    ):
        torch.save({"epoch": 1, "state_dict_ema": values}, path)
        with pytest.raises(InputError) as refused:
            diff_state(given, model)
        remedy = str(refused.value).partition(": pass ")[2]
        assert not remedy or diff_state(eval(remedy, {"torch": torch, "before": given}), snapshot(model)).is_empty
        assert remedy or "no name in common" not in str(refused.value)
