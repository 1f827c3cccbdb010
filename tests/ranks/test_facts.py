"""What is compared of a model; and that a check of one process is trivially equal."""

import pytest
import torch
from torch import nn

from precisebn import InputError, RanksDifferError, check_ranks, convert_domain_specific, convert_frozen_batchnorm
from precisebn.nn import GhostBN
from precisebn.ranks.facts import Facts
from precisebn.ranks.report import Difference, RankReport, Variant, _shown_ranks


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU())


def digest(model: nn.Module) -> str:
    return Facts(model).digest()


def changed_parameter(model: nn.Module) -> None:
    model[0].weight.data[0, 0, 0, 0].neg_()


def buffer_outside_of_the_state_dict(model: nn.Module) -> None:
    model.register_buffer("cache", torch.ones(2), persistent=False)


CHANGES = {
    "parameter": changed_parameter,
    "running mean": lambda model: model[1].running_mean.add_(1),
    "num_batches_tracked": lambda model: model[1].num_batches_tracked.add_(1),
    "mode": lambda model: model[2].eval(),
    "requires_grad": lambda model: model[0].bias.requires_grad_(False),
    "dtype": lambda model: model[1].half(),
    "shape": lambda model: setattr(model[1], "running_mean", torch.zeros(1, 6)),
    "another buffer": buffer_outside_of_the_state_dict,
    "no bias": lambda model: setattr(model[0], "bias", None),
    "tied parameters": lambda model: setattr(model[1], "bias", model[0].bias),
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_changes_shows(change):
    model = net()
    with torch.no_grad():
        CHANGES[change](model)
    assert digest(model) != digest(net())
    assert digest(net()) == digest(net())


@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, torch.optim.swa_utils.AveragedModel, lambda m: torch.compile(m, backend="eager")]
)
def test_wrappers_do_not_count_in_names(wrap):
    wrapped = {key: fact for key, fact in Facts(wrap(net())).by_key.items() if key[1] != "n_averaged"}
    assert wrapped == Facts(net()).by_key


def test_what_has_no_values_is_listed():
    model = nn.Sequential(nn.LazyBatchNorm2d(), nn.Conv2d(3, 3, 1, device="meta"), nn.BatchNorm2d(2))
    report = check_ranks(model)
    assert report.equal
    assert report.num_tensors == 5 + 1  # those of the last, and the counter of the lazy one
    assert set(report.skipped) == {"0.weight", "0.bias", "0.running_mean", "0.running_var", "1.weight", "1.bias"}
    assert "2 tensors not compared: on the meta device, where nothing has values: 1.weight, 1.bias" in str(report)


def test_what_the_first_version_of_fsdp_has_cut_is_listed():
    """Put together by hand, as its constructor demands a GPU; what it holds are plain parameters of any size."""
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    wrapper = fsdp.FullyShardedDataParallel.__new__(fsdp.FullyShardedDataParallel)
    nn.Module.__init__(wrapper)
    wrapper.training_state = None
    wrapper._modules["_fsdp_wrapped_module"] = net()
    report = check_ranks(nn.Sequential(wrapper, nn.Linear(2, 2)))
    assert set(report.skipped) == {"0.0.weight", "0.0.bias", "0.1.weight", "0.1.bias"}
    assert report.num_tensors == 3 + 2  # running statistics, which are whole on every rank, and the rest


def test_running_statistics_of_any_kind_are_known_with_their_scale():
    model = convert_domain_specific(net(), num_domains=2)
    facts = Facts(nn.Sequential(model, GhostBN(4, 2), nn.InstanceNorm2d(3, track_running_stats=True)))
    kinds = {fact.name: fact.kind for fact in facts.by_key.values() if "running" in fact.name}
    assert set(kinds.values()) == {"statistic"}
    assert len(kinds) == 6
    assert set(facts.scales) == set(kinds)
    assert facts.scales["0.1.running_mean"].var_name == "0.1.running_var"
    assert facts.scales["0.1.running_mean"].eps == 1e-5


class Opaque(torch.Tensor):
    """Of another library, say: its values lie elsewhere."""

    def contiguous(self, *_, **__):
        raise NotImplementedError


@pytest.mark.filterwarnings("ignore:.*nested tensors")
def test_odd_tensors_are_compared_or_listed():
    model = nn.Module()
    model.register_buffer("opaque", torch.ones(3).as_subclass(Opaque))
    model.register_buffer("nested", torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]))
    model.register_buffer("sparse", torch.eye(3).to_sparse())
    model.register_buffer("complex", torch.ones(3, dtype=torch.complex64))
    model.register_buffer("expanded", torch.ones(1).expand(5))
    model.register_buffer("empty", torch.empty(0))
    model.register_buffer("packed", torch.zeros(4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2))
    model.register_buffer("conjugate", torch.ones(3, dtype=torch.complex64).conj())
    report = check_ranks(model)
    assert report.equal
    assert report.skipped == {"opaque": "of a kind whose bits torch does not show"}
    assert report.num_tensors == 7
    assert [fact.name for fact in Facts(model).by_key.values() if fact.size] == ["complex", "expanded", "conjugate"]


def test_one_process_is_equal_to_itself_and_nothing_changes():
    model = convert_frozen_batchnorm(net())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    shown: list[str] = []
    report = check_ranks(model, log=shown.append)
    report.raise_if_different()
    assert shown == [str(report)]
    assert report.to_dict()["equal"] is True
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_wrong_calls_say_what_is_wrong():
    with pytest.raises(InputError, match=r"model must be an nn.Module, not Tensor"):
        check_ranks(torch.ones(1))
    with pytest.raises(InputError, match="log=3 must be what to call with a text"):
        check_ranks(net(), log=3)
    with pytest.raises(InputError, match=r"torch.distributed is not initialized"):
        check_ranks(net(), object())


def test_a_report_of_differences():
    variants = (Variant((0, 1, 2, 5), "float32 (6,)"), Variant((3,), "float32 (6,)", 1.0, 0.5, 2.0, 1.0))
    mean = Difference("1.running_mean", "statistic", variants)
    mode = Difference("1", "training", (Variant((0,), "training"), Variant((1, 2, 3, 5), "eval mode")))
    report = RankReport(6, 0, (mode, mean), {"0.weight": "sharded: every rank holds a part of it"}, 7)
    text = str(report)
    assert "NOT equal; from rank 0 differ: 1 training flag, 1 running statistic" in text
    assert report["1.running_mean"] is mean
    assert report.max_drift == 2.0
    with pytest.raises(KeyError, match="'2' does not differ"):
        report["2"]
    with pytest.raises(RanksDifferError, match=r"1.running_mean +statistic +3 +other values +1 +0.5 +2"):
        report.raise_if_different()
    assert report.to_dict()["differences"][1]["variants"][1]["max_drift"] == 2.0
    assert repr(report) == "<RankReport: 2 differences, 7 tensors, 6 ranks>"


def test_ranks_are_shown_in_short():
    assert _shown_ranks([0, 1, 2, 5]) == "0-2, 5"
    assert _shown_ranks(range(0, 40, 2)) == "0, 2, 4, 6, 8, ..."
