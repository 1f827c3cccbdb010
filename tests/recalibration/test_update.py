"""update_bn_stats and adapt_bn_stats: exact, the same as fvcore where fvcore is right, and a transaction always."""

import copy
import itertools
import math
import os
import re
import types
import unittest
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import tqdm
from conftest import Refusing, state_of, values_of
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from precisebn import (
    InputError,
    InsufficientDataError,
    NonFiniteStatisticsError,
    PreciseBNError,
    adapt_bn_stats,
    freeze,
    get_bn_modules,
    update_bn_stats,
)
from precisebn.distributed import Ranks
from precisebn.models.interrupts import HeldBack
from precisebn.nn import DomainSpecificBN
from precisebn.recalibration.loop import Loop
from precisebn.recalibration.settings import Settings
from precisebn.statistics.estimator import Population, PopulationEstimator

pytestmark = pytest.mark.usefixtures("one_thread")

EPS = torch.finfo(torch.float32).eps
# fvcore accumulates some ten mini-batches in float32, and its E[x^2] - E[x]^2 loses another (1 + mean^2 / var): a few
# ulps each. A layer's input besides differs by what a convolution before it makes of one ulp.
FLOAT32_ROUNDING = 64 * EPS


def bn_layers(model: nn.Module) -> list[_BatchNorm]:
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


def assert_statistics(bn: _BatchNorm, mean: Any, var: Any, tolerance: float = FLOAT32_ROUNDING) -> None:
    """The layer's statistics are these: the mean to ``tolerance`` standard deviations, the variance relatively."""
    mean, var = np.asarray(mean, dtype=np.float64), np.asarray(var, dtype=np.float64)
    assert np.max(np.abs(bn.running_mean.double().numpy() - mean) / np.sqrt(var)) <= tolerance
    assert np.max(np.abs(bn.running_var.double().numpy() - var) / var) <= tolerance


def numpy_statistics(values: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Mean and biased variance per channel of (N, C, *), in float64 by NumPy."""
    array = values.double().numpy()
    axes = (0, *range(2, array.ndim))
    return array.mean(axes), array.var(axes)


# ---- Parity with fvcore, and with float64 NumPy -------------------------------------------------------------------

EQUAL, VARYING = [8] * 9, [8, 3, 16, 2, 11, 8, 5, 24, 1]
NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "1d (N, C)": (lambda: _two_layers(nn.Linear, nn.BatchNorm1d), (4,)),
    "1d (N, C, L)": (lambda: _two_layers(nn.Conv1d, nn.BatchNorm1d, 3), (4, 20)),
    "2d": (lambda: _two_layers(nn.Conv2d, nn.BatchNorm2d, 3), (4, 9, 8)),
    "3d": (lambda: _two_layers(nn.Conv3d, nn.BatchNorm3d, 3), (4, 5, 7, 6)),
}


def _two_layers(linear: Callable[..., nn.Module], bn: Callable[..., nn.Module], *kernel: int) -> nn.Module:
    return nn.Sequential(linear(4, 7, *kernel), bn(7), nn.ReLU(), linear(7, 5, *kernel), bn(5))


def _batches(sizes: list[int], shape: tuple[int, ...]) -> list[Tensor]:
    # fvcore's BatchNorm refuses a single value per channel, so the smallest mini-batch of vectors has two.
    return [2.0 + torch.randn(max(n, 2) if len(shape) == 1 else n, *shape) for n in sizes]


@pytest.mark.parametrize("sizes", [EQUAL, VARYING], ids=["equal sizes", "varying sizes"])
@pytest.mark.parametrize("kind", NETS)
def test_agrees_with_fvcore(fvcore_bn, kind, sizes):
    build, shape = NETS[kind]
    ours, batches = build(), _batches(sizes, shape)
    theirs = copy.deepcopy(ours)
    update_bn_stats(ours, batches, len(batches))
    fvcore_bn.update_bn_stats(theirs, batches, len(batches))
    for our, their in zip(bn_layers(ours), bn_layers(theirs), strict=True):
        assert_statistics(our, their.running_mean, their.running_var)
        assert torch.equal(our.num_batches_tracked, their.num_batches_tracked)
        assert our.momentum == their.momentum
    assert [id(m) for m in get_bn_modules(ours)] == [id(m) for m in fvcore_bn.get_bn_modules(ours)]


@pytest.mark.parametrize("kind", NETS)
def test_batch_mean_agrees_with_fvcores_other_estimator(fvcore_bn, monkeypatch, kind):
    build, shape = NETS[kind]
    ours, batches = build(), _batches(VARYING, shape)
    theirs = copy.deepcopy(ours)
    monkeypatch.setattr(fvcore_bn, "_PopulationVarianceEstimator", fvcore_bn._MeanOfBatchVarianceEstimator)
    fvcore_bn.update_bn_stats(theirs, batches, len(batches))
    assert update_bn_stats(ours, batches, None, estimator="batch-mean").estimator == "batch-mean"
    for our, their in zip(bn_layers(ours), bn_layers(theirs), strict=True):
        assert_statistics(our, their.running_mean, their.running_var)


@pytest.mark.parametrize("kind", NETS)
def test_agrees_with_float64_numpy_on_what_each_layer_sees_in_training(kind):
    build, shape = NETS[kind]
    model, batches = build(), _batches(VARYING, shape)
    seen: dict[nn.Module, list[Tensor]] = {}
    in_training = copy.deepcopy(model)
    for bn in bn_layers(in_training):
        bn.register_forward_pre_hook(lambda module, args: seen.setdefault(module, []).append(args[0].detach()))
    for batch in batches:
        in_training(batch)
    update_bn_stats(model, batches, len(batches))
    for bn, inputs in zip(bn_layers(model), seen.values(), strict=True):
        assert_statistics(bn, *numpy_statistics(torch.cat(inputs)))


@pytest.mark.parametrize("ratio", [1e3, 1e4])
def test_variance_is_exact_where_fvcore_loses_it(fvcore_bn, ratio):
    batches = [ratio + torch.randn(32, 6, 8, 8) for _ in range(20)]
    ours, theirs = nn.BatchNorm2d(6), nn.BatchNorm2d(6)
    update_bn_stats(ours, batches, 20)
    fvcore_bn.update_bn_stats(theirs, batches, 20)
    mean, var = numpy_statistics(torch.cat(batches))
    np.testing.assert_allclose(ours.running_var.double().numpy(), var, rtol=1e-6)
    np.testing.assert_allclose(ours.running_mean.double().numpy(), mean, rtol=EPS)
    assert np.max(np.abs(theirs.running_var.double().numpy() / var - 1)) > 1e-2


@given(st.floats(-1e4, 1e4), st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(0, 2**31))
def test_however_the_data_is_cut_the_statistics_are_those_of_all_of_it(location, sizes, seed):
    data = location + torch.randn(sum(sizes), 3, 2, generator=torch.Generator().manual_seed(seed))
    bn = nn.BatchNorm1d(3).double()
    update_bn_stats(bn, [batch.double() for batch in data.split(sizes)], None)
    mean, var = numpy_statistics(data)
    # Sums of 54 float64 values at most: 64 ulps of the mean, and of the variance what they do to deviations from it.
    ulp = 64 * torch.finfo(torch.float64).eps
    np.testing.assert_allclose(bn.running_mean.numpy(), mean, rtol=0, atol=ulp * (abs(location) + 10))
    np.testing.assert_allclose(bn.running_var.numpy(), var, rtol=1e-9)


def test_constant_channel_has_variance_zero():
    bn = nn.BatchNorm2d(2)
    update_bn_stats(bn, [torch.full((4, 2, 5, 5), 1e4 / 3)] * 7, None)
    assert torch.equal(bn.running_var, torch.zeros(2))
    assert torch.equal(bn.running_mean, torch.full((2,), 1e4 / 3))


@pytest.mark.parametrize(
    ("bn", "shape"),
    [(nn.BatchNorm1d, (16, 8, 24)), (nn.BatchNorm2d, (16, 8, 24, 8)), (nn.BatchNorm3d, (16, 8, 4, 12, 6))],
)
def test_what_fvcores_unit_test_asserts(bn, shape):
    model = bn(8)
    weight = model.weight.detach().clone()
    tensors = [torch.randn(shape) for _ in range(8)]
    mean, var = numpy_statistics(torch.cat(tensors))
    update_bn_stats(model, itertools.cycle(tensors), 800)
    assert np.allclose(model.running_mean.numpy(), mean)
    assert np.allclose(model.running_var.numpy(), var)
    update_bn_stats(model, itertools.cycle(torch.cat(tensors).split([2, 2, 4, 8, 16, 32, 64])), 7)
    assert np.allclose(model.running_mean.numpy(), mean)
    assert np.allclose(model.running_var.numpy(), var)
    assert torch.equal(model.weight, weight)
    with pytest.raises(AssertionError):
        update_bn_stats(model, itertools.repeat(tensors[0], 10), 20)


FVCORE_TEST_FILE = "FVCORE_TEST_FILE"


@pytest.mark.skipif(
    FVCORE_TEST_FILE not in os.environ,
    reason=f"set {FVCORE_TEST_FILE} to a copy of tests/test_precise_bn.py of facebookresearch/fvcore to run it on ours",
)
def test_fvcores_own_unit_test_passes_with_only_the_import_changed():
    source = Path(os.environ[FVCORE_TEST_FILE]).read_text()
    theirs, ours = "from fvcore.nn import update_bn_stats", "from precisebn import update_bn_stats"
    assert source.count(theirs) == source.count("fvcore") == 1
    module = types.ModuleType("fvcore_test_precise_bn")
    exec(compile(source.replace(theirs, ours), FVCORE_TEST_FILE, "exec"), vars(module))
    result = unittest.TestResult()
    unittest.defaultTestLoader.loadTestsFromModule(module).run(result)
    assert result.testsRun >= 2
    assert result.errors + result.failures + result.skipped == []


# ---- What is used of the loader, and which layers count -----------------------------------------------------------


def test_takes_exactly_num_iters_from_the_loader():
    batches = iter([torch.full((2, 1), float(i)) for i in range(6)])
    bn = nn.BatchNorm1d(1)
    assert update_bn_stats(bn, batches, 4).num_iters == 4
    assert bn.running_mean.item() == 1.5
    assert next(batches)[0].item() == 4.0


def test_two_hundred_mini_batches_by_default_and_all_with_none():
    bn = nn.BatchNorm1d(1)
    assert update_bn_stats(bn, itertools.repeat(torch.randn(2, 1))).num_iters == 200
    assert update_bn_stats(bn, [torch.randn(2, 1)] * 3, num_iters=None).num_iters == 3


def test_a_short_loader_says_how_short():
    with pytest.raises(InsufficientDataError, match=r"num_iters=20.*ended after 10 mini-batches.*num_iters=None"):
        update_bn_stats(nn.BatchNorm1d(1), [torch.randn(2, 1)] * 10, 20)


class UsedTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(torch.cat([self.bn(x), 3 * x]))


def test_all_uses_of_a_layer_in_one_forward_merge():
    model, batches = UsedTwice(), [torch.randn(6, 2) for _ in range(5)]
    report = update_bn_stats(model, batches, 5)
    normalized = [nn.BatchNorm1d(2)(batch).detach() for batch in batches]
    values = [part for x, y in zip(batches, normalized, strict=True) for part in (x, y, 3 * x)]
    assert_statistics(model.bn, *numpy_statistics(torch.cat(values)))
    assert (report.layers[0].count, report.layers[0].num_batches) == (5 * 18, 5)
    assert model.bn.num_batches_tracked == 5


def test_momentum_none_is_handled_and_kept():
    bn = nn.BatchNorm1d(3, momentum=None)
    batches = [torch.randn(8, 3) + 5 for _ in range(4)]
    bn(batches[0])
    update_bn_stats(bn, batches, 4)
    assert_statistics(bn, *numpy_statistics(torch.cat(batches)))
    assert bn.momentum is None
    assert bn.num_batches_tracked == 5


def test_a_count_that_no_float_holds_is_counted_on():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    model[0].num_batches_tracked.fill_(2**60 + 1)
    model[1].num_batches_tracked = torch.tensor(2.5)  # as of an average of weights and buffers
    update_bn_stats(model, [torch.randn(8, 3)] * 2, 2)
    assert [layer.num_batches_tracked.item() for layer in model] == [2**60 + 3, 4.5]


def test_layers_without_running_statistics_are_left_alone_and_listed():
    model = nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False), nn.BatchNorm1d(3))
    report = update_bn_stats(model, [torch.randn(8, 3)] * 2, 2)
    assert [layer.name for layer in report.layers] == ["1"]
    assert "track_running_stats=False" in report.skipped["0"]
    assert model[0].running_mean is None


def test_layers_that_no_mini_batch_reached_keep_their_statistics_and_are_listed():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    before = state_of(model[1])
    report = update_bn_stats(model, [torch.randn(8, 3)], 1, forward=lambda m, x: m[0](x))
    assert report.skipped == {"1": "no mini-batch came through __call__"}
    assert state_of(model[1]) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_buffers_are_written_in_place(dtype):
    bn = nn.BatchNorm1d(3, affine=False, dtype=dtype)
    before = state_of(bn)
    batches = [(5 + torch.randn(16, 3)).to(dtype) for _ in range(4)]
    update_bn_stats(bn, batches, 4)
    # Not "another tensor", nor "another place in memory".
    changed = {".running_mean": "values", ".running_var": "values", ".num_batches_tracked": "values"}
    assert before.differences(state_of(bn)) == changed
    assert bn.running_mean.dtype == bn.running_var.dtype == dtype
    assert_statistics(bn, *numpy_statistics(torch.cat(batches)), tolerance=64 * torch.finfo(dtype).eps)  # of 64 values


def test_what_a_good_run_changes_is_the_statistics_and_what_any_forward_changes():
    """The vectors of spectral norm go on; the statistics of InstanceNorm, and of layers not chosen, do not."""
    model = odd_layers()
    before = state_of(model)
    report = update_bn_stats(model, BATCHES, None)
    tracked = ("running_mean", "running_var", "num_batches_tracked")
    by_the_forward = {f"spectral.parametrizations.weight.0.{name}" for name in ("_u", "_v")}
    recalibrated = {f"{layer.name}.{buffer}" for layer in report.layers for buffer in tracked}
    assert set(before.differences(state_of(model))) == recalibrated | by_the_forward
    assert {layer.name for layer in report.layers} == {"cumulative", "twice", "doubling", "usual"}


@pytest.mark.parametrize("fails", [False, True])
def test_what_a_forward_counts_it_has_counted_unless_the_run_fails(fails):
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(1))
            self.bn = nn.BatchNorm1d(2)

        def forward(self, x: Tensor) -> Tensor:
            self.calls.data.add_(1)  # .data: the version counter of the buffer does not move
            return self.bn(x)

    model = Counter()
    with pytest.raises(InsufficientDataError) if fails else nullcontext():
        update_bn_stats(model, [torch.randn(4, 2)] * 3, 4 if fails else 3)
    assert model.calls == (0 if fails else 3)


def test_a_model_poisoned_by_nan_is_cured():
    bn = nn.BatchNorm1d(2)
    bn(torch.tensor([[math.nan, 1.0], [1.0, 2.0]]))
    batch = torch.randn(8, 2)
    report = update_bn_stats(bn, [batch], 1)
    assert_statistics(bn, *numpy_statistics(batch))
    assert report.to_dict()["layers"][0]["mean_drift"] is None


def test_works_in_inference_mode_and_the_model_trains_on():
    bn, batch = nn.BatchNorm1d(2), torch.randn(8, 2)
    with torch.inference_mode():
        update_bn_stats(bn, [batch], 1)
    assert_statistics(bn, *numpy_statistics(batch))
    bn(batch).sum().backward()
    assert not bn.running_mean.is_inference()


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (nn.Sequential(nn.BatchNorm1d(1)).eval(), r"of 1 BatchNorm layer of .*, 1 is in eval mode; call model\.train"),
        (nn.Linear(1, 1), r"Linear has no BatchNorm layer"),
        (nn.BatchNorm1d(1, track_running_stats=False), r"of 1 .*, 1 keeps no running statistics \(track.*False\)$"),
        (
            nn.Sequential(freeze(nn.BatchNorm1d(1)), nn.BatchNorm1d(1, track_running_stats=False)),
            r"of 2 BatchNorm layers of Sequential, 1 is frozen, 1 keeps no running statistics .*; pass modules='\*'",
        ),
    ],
    ids=["eval", "none", "no statistics", "frozen and no statistics"],
)
def test_nothing_to_do_is_told_where_the_user_called(model, reason):
    with pytest.warns(UserWarning, match=reason) as caught:
        report = update_bn_stats(model, [torch.randn(2, 1)], 1)
    assert caught[0].filename == __file__
    assert report.layers == ()


@pytest.mark.parametrize("modules", ["training", "all"])
def test_frozen_layers_are_recalibrated_as_the_message_says(modules):
    """Both words leave them out, so neither is the remedy; what the message names is."""
    model = freeze(nn.Sequential(nn.Flatten(), nn.Sequential(nn.BatchNorm1d(1))))
    with pytest.warns(UserWarning, match="1 is frozen") as caught:
        report = update_bn_stats(model, [torch.randn(2, 1)], 1, modules=modules)
    named = {re.search(r"modules='([^']+)',", text)[1] for text in (str(caught[0].message), report.skipped["1.0"])}
    assert f"modules={modules!r} leaves these out" in report.skipped["1.0"]
    assert named == {"*"}
    report = update_bn_stats(model, [torch.randn(2, 1)], 1, modules=named.pop())
    assert [layer.name for layer in report.layers] == ["1.0"]


def test_layers_whose_call_is_bypassed_are_told_of():
    bn = nn.BatchNorm1d(1)
    with pytest.warns(UserWarning, match="__call__") as caught:
        update_bn_stats(bn, [torch.randn(2, 1)], 1, forward=lambda bn, x: bn.running_mean + x)
    assert caught[0].filename == __file__


# ---- All or nothing -----------------------------------------------------------------------------------------------

BATCHES = [torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(n)) for n in (8, 8, 8, 5, 8, 3, 8, 8, 8, 8)]


class Fuse(nn.Module):
    """Lets values through, unless a test puts something else into ``effect``."""

    effect: Callable[[Tensor], Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        return x if Fuse.effect is None else Fuse.effect(x)


class Cast(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.dtype)


def convnet() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), Fuse(), nn.Dropout(0.3), nn.Conv2d(6, 5, 3), nn.BatchNorm2d(5)
    )


class DoublingBatchNorm(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(2.0 * input)


class OddLayers(nn.Module):
    """Everything that keeps state of its own, and every setting of BatchNorm that fvcore cannot take."""

    def __init__(self) -> None:
        super().__init__()
        self.spectral = torch.nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 6, 3))
        self.instance = nn.InstanceNorm2d(6, affine=True, track_running_stats=True)
        self.cumulative = nn.BatchNorm2d(6, momentum=None, affine=False)
        self.twice = nn.BatchNorm2d(6, momentum=0.3)
        self.batch_statistics = nn.BatchNorm2d(6, track_running_stats=False)
        self.frozen = nn.BatchNorm2d(6).eval()
        self.fuse = Fuse()
        self.doubling = DoublingBatchNorm(6)
        self.usual = nn.BatchNorm2d(6)
        self.usual.register_forward_pre_hook(_identity_hook)
        self.usual.register_forward_hook(_identity_hook, prepend=True, with_kwargs=False)
        self.usual.register_full_backward_hook(_identity_hook)
        self.twice.register_forward_pre_hook(_keyword_hook, with_kwargs=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.cumulative(self.instance(self.spectral(x))))
        return self.usual(self.doubling(self.fuse(self.twice(self.frozen(self.batch_statistics(x)).relu()))))


def _identity_hook(module: nn.Module, *args: Any) -> None:
    return None


def _keyword_hook(module: nn.Module, args: Any, kwargs: Any) -> None:
    return None


def odd_layers() -> nn.Module:
    return OddLayers()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "convnet": convnet,
    "eval mode": lambda: convnet().eval(),
    "odd layers": odd_layers,
    "bfloat16": lambda: nn.Sequential(Cast(torch.bfloat16), convnet().to(torch.bfloat16)),
    "AveragedModel": lambda: torch.optim.swa_utils.AveragedModel(convnet()),
    "DataParallel": lambda: nn.DataParallel(convnet()),
}


class _Stop(Exception):
    """An error of the user's own."""


@dataclass
class Failure:
    """One way to fail, in the course of ten mini-batches."""

    error: type[BaseException]
    loader: Callable[[], Iterable[Any]] = lambda: BATCHES
    effect: tuple[int, Callable[[Tensor], Tensor]] | None = None  # in which mini-batch the model does what
    arguments: dict[str, Any] = field(default_factory=dict)
    bar: Callable[..., Any] | None = None
    write: bool = False


def _raise(error: BaseException) -> Callable[..., Any]:
    def do(*args: Any, **kwargs: Any) -> Any:
        raise error

    return do


def _breaking(error: BaseException, after: int) -> Callable[[], Iterator[Tensor]]:
    def loader() -> Iterator[Tensor]:
        yield from BATCHES[:after]
        raise error

    return loader


def _poison(value: float) -> Callable[[Tensor], Tensor]:
    return lambda x: x.index_fill(0, torch.tensor([1]), value)


class _BrokenBar(tqdm.tqdm):  # type: ignore[type-arg]
    update = _raise(_Stop("the bar broke"))


FAILURES: dict[str, Failure] = {
    "model raises in mini-batch 0": Failure(_Stop, effect=(0, _raise(_Stop()))),
    "model raises in mini-batch 4": Failure(_Stop, effect=(4, _raise(_Stop()))),
    "model raises in mini-batch 9": Failure(_Stop, effect=(9, _raise(_Stop()))),
    "model runs out of memory": Failure(RuntimeError, effect=(2, lambda x: x + torch.empty(2**60))),
    "model calls with wrong types": Failure(TypeError, effect=(2, lambda x: x + {})),
    "Ctrl-C in the model": Failure(KeyboardInterrupt, effect=(3, _raise(KeyboardInterrupt()))),
    "NaN in one mini-batch": Failure(NonFiniteStatisticsError, effect=(3, _poison(math.nan))),
    "Inf in one mini-batch": Failure(NonFiniteStatisticsError, effect=(9, _poison(-math.inf))),
    "loader raises at once": Failure(_Stop, loader=_breaking(_Stop(), 0)),
    "loader raises later": Failure(_Stop, loader=_breaking(_Stop(), 6)),
    "Ctrl-C in the loader": Failure(KeyboardInterrupt, loader=_breaking(KeyboardInterrupt(), 2)),
    "short loader": Failure(InsufficientDataError, loader=lambda: BATCHES[:7]),
    "empty loader": Failure(InsufficientDataError, loader=list),
    "empty loader, num_iters=None": Failure(InsufficientDataError, loader=list, arguments={"num_iters": None}),
    "wrong number of channels": Failure(RuntimeError, loader=lambda: [*BATCHES[:2], torch.randn(2, 4, 8, 8)]),
    "progress bar cannot start": Failure(_Stop, bar=_raise(_Stop()), arguments={"progress": True}),
    "progress bar breaks": Failure(_Stop, bar=_BrokenBar, arguments={"progress": True}),
    "forward= raises": Failure(_Stop, arguments={"forward": _raise(_Stop())}),
    "Ctrl-C while writing": Failure(KeyboardInterrupt, write=True),
}


class InterruptedWrite(TorchFunctionMode):
    """Ctrl-C at the moment when one given tensor is overwritten."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self.target = target
        self.happened = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.copy_ and args[0] is self.target and not self.happened:
            self.happened = True
            func(*args, **(kwargs or {}))
            raise KeyboardInterrupt
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", FAILURES)
def test_whatever_fails_the_model_is_as_before_and_trains_on(monkeypatch, name, kind):
    failure = FAILURES[name]
    model, twin = _seeded(MODELS[kind]), _seeded(MODELS[kind])
    before = state_of(model)
    if failure.effect is not None:
        calls, (when, effect) = itertools.count(), failure.effect
        monkeypatch.setattr(Fuse, "effect", staticmethod(lambda x: effect(x) if next(calls) == when else x))
    if failure.bar is not None:
        monkeypatch.setattr(tqdm, "tqdm", failure.bar)
    arguments = {"num_iters": 10, "modules": "training" if model.training else "all", **failure.arguments}
    last_write = InterruptedWrite(bn_layers(model)[-1].running_var) if failure.write else nullcontext()
    with last_write, pytest.raises(failure.error):
        update_bn_stats(model, failure.loader(), **arguments)
    monkeypatch.undo()
    assert state_of(model) == before
    assert _train(model) == _train(twin)


def _seeded(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(7)
    return build()


def _train(model: nn.Module) -> dict[str, Any]:
    """Two steps of training; all values of the model after it."""
    torch.manual_seed(8)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for batch in BATCHES[:2]:
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()
    return values_of(model)


def test_the_same_model_recalibrates_when_what_failed_is_mended():
    model, twin = _seeded(odd_layers), _seeded(odd_layers)
    with pytest.raises(InsufficientDataError):
        update_bn_stats(model, BATCHES, 11)
    update_bn_stats(model, BATCHES, 10)
    update_bn_stats(twin, BATCHES, 10)
    assert values_of(model) == values_of(twin)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_values_are_laid_to_the_layer_and_mini_batch_where_they_began(value):
    model = convnet()
    batches = [*BATCHES[:4], _poison(value)(BATCHES[4]), *BATCHES[5:]]
    with pytest.raises(NonFiniteStatisticsError, match=r"layer '1' \(BatchNorm2d\) held NaN or Inf.* mini-batch 4"):
        update_bn_stats(model, batches, 10)


def test_non_finite_values_on_the_cpu_stop_the_run_at_once():
    batches = iter([*BATCHES[:3], _poison(math.nan)(BATCHES[3]), *BATCHES[4:]])
    with pytest.raises(NonFiniteStatisticsError):
        update_bn_stats(convnet(), batches, 10)
    assert len(list(batches)) == 6


def test_non_finite_values_are_laid_to_the_first_layer_as_the_model_runs_not_as_it_is_written():
    class LastFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.runs_second = nn.BatchNorm1d(1)
            self.runs_first = nn.BatchNorm1d(1)

        def forward(self, x: Tensor) -> Tensor:
            return self.runs_second(self.runs_first(x))

    with pytest.raises(NonFiniteStatisticsError, match="'runs_first'"):
        update_bn_stats(LastFirst(), [torch.tensor([[math.nan], [1.0]])], 1)


def test_statistics_too_large_for_half_precision_buffers_are_an_error():
    bn = nn.BatchNorm1d(1, dtype=torch.float16)
    before = state_of(bn)
    with pytest.raises(NonFiniteStatisticsError, match=r"overflow its torch\.float16 buffers"):
        update_bn_stats(bn, [torch.full((2, 1), mean, dtype=torch.float16) for mean in (-300.0, 300.0)], 2)
    assert state_of(bn) == before


def test_a_buffer_that_refuses_to_be_written_leaves_the_others_unwritten():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2), nn.BatchNorm1d(2))
    model[1].running_var = torch.ones(2).as_subclass(Refusing)
    before = [buffer.clone() for buffer in model.buffers()]
    with pytest.raises(RuntimeError, match="refused"):
        update_bn_stats(model, [torch.randn(4, 2)], 1)
    assert all(map(torch.equal, model.buffers(), before))


class ChangesItsInput(nn.Module):
    """Lazy, and it normalizes its input in place, as some do."""

    def __init__(self, bn: nn.Module) -> None:
        super().__init__()
        self.bn = bn

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(x.sub_(1).div_(2))


def test_the_first_run_of_a_lazy_model_leaves_the_mini_batch_as_it_was():
    """It runs twice, and was normalized twice."""
    batches = [torch.randn(8, 3, 4, 4) for _ in range(3)]
    model, expected = ChangesItsInput(nn.LazyBatchNorm2d()), (torch.cat(batches) - 1) / 2
    update_bn_stats(model, [(batch.clone(), "label") for batch in batches], None)
    torch.testing.assert_close(model.bn.running_mean, expected.mean((0, 2, 3)))
    torch.testing.assert_close(model.bn.running_var, expected.var((0, 2, 3), correction=0))


@pytest.mark.filterwarnings("error")
def test_a_warning_made_an_error_leaves_the_model_as_before():
    model = convnet()
    before = state_of(model)
    with pytest.raises(UserWarning, match="was not reached"):
        update_bn_stats(model, BATCHES, 10, tolerance=1e-9)
    assert state_of(model) == before


# ---- forward= and device= -----------------------------------------------------------------------------------------


def test_forward_calls_the_model_as_the_user_says():
    bn, batches = nn.BatchNorm1d(2), [{"id": 1, "image": torch.randn(4, 2)} for _ in range(3)]
    update_bn_stats(bn, batches, 3, forward=lambda model, batch: model(batch["image"]))
    assert_statistics(bn, *numpy_statistics(torch.cat([batch["image"] for batch in batches])))


def test_batches_move_to_the_models_device_by_default_or_to_the_one_given():
    class Batch:
        def __init__(self) -> None:
            self.moved_to: list[torch.device] = []

        def to(self, device: torch.device | str) -> "Batch":
            self.moved_to.append(torch.device(device))
            return self

    for device in (None, "cpu", torch.device("cpu")):
        batch = Batch()
        update_bn_stats(
            nn.BatchNorm1d(2), [batch], 1, device=device, forward=lambda model, batch: model(torch.randn(4, 2))
        )
        assert batch.moved_to == [torch.device("cpu")]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device: CUDA beside the CPU")
def test_model_split_over_two_devices():
    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.BatchNorm1d(2)
            self.second = nn.BatchNorm1d(2).cuda()

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).cuda() * 2)

    model, batches = Split(), [torch.randn(8, 2) for _ in range(9)]
    report = update_bn_stats(model, batches, 9)
    assert_statistics(model.first, *numpy_statistics(torch.cat(batches)))
    assert_statistics(model.second.cpu(), [0.0, 0.0], [4.0, 4.0], tolerance=1e-4)  # 1e-4: BatchNorm's eps
    assert [layer.name for layer in report.layers] == ["first", "second"]


# ---- progress -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("progress", [True, "tqdm"])
def test_progress_shows_samples_seen(capsys, progress):
    update_bn_stats(convnet(), BATCHES, 10, progress)
    shown = capsys.readouterr().err
    assert "10/10" in shown
    assert f"samples={sum(map(len, BATCHES))}" in shown
    assert "error" not in shown


def test_progress_shows_the_largest_standard_error_with_a_tolerance(capsys):
    report = update_bn_stats(convnet(), itertools.cycle(BATCHES), 100, True, tolerance=0.5)
    shown = capsys.readouterr().err
    assert f"error={report.max_error:.2g}" in shown
    assert f"samples={report.num_samples}" in shown


@pytest.mark.parametrize("progress", [None, False])
def test_no_progress_shows_nothing(capsys, progress):
    update_bn_stats(convnet(), BATCHES, 10, progress)
    assert capsys.readouterr() == ("", "")


# ---- tolerance: how much is enough --------------------------------------------------------------------------------


def endless(channels: int = 4, size: int = 16) -> Iterator[Tensor]:
    while True:
        yield torch.randn(size, channels)


def test_stops_as_soon_as_the_tolerance_is_met_but_not_before_eight_mini_batches():
    assert update_bn_stats(nn.BatchNorm1d(4), endless(), tolerance=1e6).num_iters == 8
    report = update_bn_stats(nn.BatchNorm1d(4), endless(), 10_000, tolerance=0.05)
    assert report.converged
    assert report.max_error <= report.tolerance == 0.05
    # Relative standard error of the variance of n normal values: sqrt(2 / n) = 0.05 at n = 800, that is, 50
    # mini-batches of 16. It is itself an estimate, rms over four channels and the largest of several.
    assert 20 < report.num_iters < 150


def test_goes_on_for_little_more_than_it_must():
    batches = list(itertools.islice(endless(), 200))
    stopped = update_bn_stats(nn.BatchNorm1d(4), batches, tolerance=0.05).num_iters
    enough = next(n for n in range(8, 201) if update_bn_stats(nn.BatchNorm1d(4), batches, n).max_error <= 0.05)
    assert enough <= stopped <= enough * 1.05 + 1


def test_a_tolerance_is_asked_after_rarely_and_met_without_waste(monkeypatch):
    asked: list[float] = []
    result = PopulationEstimator.result

    def counting(estimator: PopulationEstimator, *args: Any, **kwargs: Any) -> Population:
        population = result(estimator, *args, **kwargs)
        asked.append(max(float(population.mean_error.max()), float(population.var_error.max())))
        return population

    monkeypatch.setattr(PopulationEstimator, "result", counting)
    used = update_bn_stats(nn.BatchNorm1d(64), endless(64), 10_000, tolerance=0.02).num_iters
    # A variance from n mini-batches of 16 has an error of sqrt(2 / 16 n): some 310. To ask after every twentieth
    # part of them would be some 70 times.
    assert 250 < used < 450
    assert len(asked) <= 25
    assert asked[-1] > 0.02 * 0.9  # no more than needed


@pytest.mark.parametrize("error", [math.nan, 0.0, 5e-324, 1e-3, 1e300, math.inf])
@pytest.mark.parametrize("tolerance", [5e-324, 1e-3, 1e300])
@pytest.mark.parametrize("step", [8, 1000, 10**9])
def test_the_pause_between_questions_is_bounded_whatever_the_errors_are(step, tolerance, error):
    with Ranks(False, call="update_bn_stats") as ranks:
        loop = Loop(_settings(tolerance=tolerance), ranks, HeldBack())
    loop._max_error = error
    pause = loop._pause(step, tolerance)
    assert max(1, step // 20) <= pause <= step
    if not error > tolerance:  # of which nothing is known, or which is only not known of every layer
        assert pause == max(1, step // 20)
    elif error >= 2 * tolerance:
        assert pause >= step - 1  # sqrt(3) rounded


def _settings(tolerance: float) -> Settings:
    return Settings(
        model=nn.BatchNorm1d(1), data_loader=[], num_iters=None, progress=None, forward=None, device=None,
        memory_format=None, modules="all", exclude=None, estimator="population", tolerance=tolerance,
        process_group=False, early_exit=False,
    )  # fmt: skip


def test_a_tolerance_that_no_data_meets_ends_with_the_data():
    batches = list(itertools.islice(endless(), 20))
    with pytest.warns(UserWarning, match="tolerance"):
        assert update_bn_stats(nn.BatchNorm1d(4), batches, num_iters=None, tolerance=1e-200).num_iters == 20


def test_a_smaller_tolerance_takes_more_data():
    used = [update_bn_stats(nn.BatchNorm1d(4), endless(), 10_000, tolerance=t).num_iters for t in (0.2, 0.1, 0.05)]
    assert used == sorted(set(used))


def test_four_times_the_data_halve_the_errors():
    few, many = (update_bn_stats(nn.BatchNorm1d(256), endless(256), n).layers[0] for n in (64, 256))
    # Each is known to some 5%: rms over 256 channels of estimates from 64 mini-batches.
    assert few.mean_error / many.mean_error == pytest.approx(2, rel=0.15)
    assert few.var_error / many.var_error == pytest.approx(2, rel=0.15)


def test_a_tolerance_not_met_is_told_and_the_statistics_are_updated():
    bn, batches = nn.BatchNorm1d(2), [torch.randn(8, 2) for _ in range(20)]
    with pytest.warns(UserWarning, match=r"tolerance=1e-06 was not reached in 20 mini-batches.*error is") as caught:
        report = update_bn_stats(bn, batches, tolerance=1e-6)
    assert caught[0].filename == __file__
    assert report.converged is False
    assert report.num_iters == 20
    assert_statistics(bn, *numpy_statistics(torch.cat(batches)))


def test_fewer_than_eight_mini_batches_have_no_error_and_meet_no_tolerance():
    with pytest.warns(UserWarning, match="takes at least 8 mini-batches to know"):
        report = update_bn_stats(nn.BatchNorm1d(2), [torch.randn(8, 2)] * 7, tolerance=1e6)
    assert report.converged is False
    assert math.isnan(report.max_error)


@pytest.mark.parametrize("num_batches", range(60, 64))
def test_converged_says_how_it_is_at_the_end_even_between_two_checks(num_batches):
    torch.manual_seed(num_batches)
    batches = [torch.randn(16, 2) for _ in range(num_batches)]
    error = update_bn_stats(nn.BatchNorm1d(2), batches, None).max_error
    report = update_bn_stats(nn.BatchNorm1d(2), batches, None, tolerance=error * (1 + 1e-9))
    assert report.converged
    assert report.max_error <= report.tolerance


def test_without_a_tolerance_nothing_is_said_of_convergence():
    assert update_bn_stats(nn.BatchNorm1d(2), [torch.randn(8, 2)] * 9, 9).converged is None


# Channels are independent here, so one run with 512 of them is 512 experiments: the reported error is their root mean
# square, and so is the scatter of the estimates about the truth. Both are known to 1 / sqrt(2 * 512) = 3%.
REPLICATES = 512


def _ratio_of_reported_to_true_error(batches: list[Tensor], true_var: float) -> tuple[float, float]:
    """For the mean and for the variance, where the true mean is 0."""
    bn = nn.BatchNorm1d(REPLICATES).double()
    layer = update_bn_stats(bn, batches, None).layers[0]
    true_mean_error = (bn.running_mean / bn.running_var.sqrt()).square().mean().sqrt()
    true_var_error = (bn.running_var / true_var - 1).square().mean().sqrt()
    return layer.mean_error / true_mean_error.item(), layer.var_error / true_var_error.item()


@pytest.mark.parametrize("sizes", [[16] * 96, [4, 16, 40, 8] * 24], ids=["equal sizes", "varying sizes"])
def test_standard_errors_are_the_true_ones_for_independent_mini_batches(sizes):
    batches = [torch.randn(n, REPLICATES, dtype=torch.float64) for n in sizes]
    for ratio in _ratio_of_reported_to_true_error(batches, 1.0):
        assert ratio == pytest.approx(1, abs=0.15)


def test_standard_errors_are_right_from_the_eighth_mini_batch_on():
    bn = nn.BatchNorm1d(16 * REPLICATES).double()
    batches = [torch.randn(16, 16 * REPLICATES, dtype=torch.float64) for _ in range(8)]
    reported = update_bn_stats(bn, batches, None).layers[0].mean_error
    true = (bn.running_mean / bn.running_var.sqrt()).square().mean().sqrt().item()
    # Both are known to 1%. Dividing by 8 in the place of 7 would be off by 7%.
    assert reported / true == pytest.approx(1, abs=0.03)


def test_standard_errors_know_that_values_inside_a_mini_batch_are_correlated():
    """Every mini-batch has a common offset: 96 observations, however many values there are."""
    batches = [
        torch.randn(1, REPLICATES, dtype=torch.float64) + 0.1 * torch.randn(64, REPLICATES, dtype=torch.float64)
        for _ in range(96)
    ]
    for ratio in _ratio_of_reported_to_true_error(batches, 1.01):
        assert ratio == pytest.approx(1, abs=0.2)


def _ar1(steps: int, rho: float) -> Tensor:
    """Stationary AR(1) series of unit variance, one per replicate."""
    series = [torch.randn(REPLICATES, dtype=torch.float64)]
    for _ in range(steps - 1):
        series.append(rho * series[-1] + math.sqrt(1 - rho**2) * torch.randn(REPLICATES, dtype=torch.float64))
    return torch.stack(series)


def test_standard_errors_are_honest_for_correlated_mini_batches():
    """Successive frames of a video: neighbouring mini-batches have much in common.

    With rho = 0.8, the errors of plain batch means are too small by sqrt((1 + rho) / (1 - rho)) = 3 for the mean, and
    with rho^2 in the place of rho, by 2.1, for the variance. Blocks of 32 mini-batches see all but a tenth.
    """
    rho, steps = 0.8, 256
    offsets = _ar1(steps, rho)
    batches = [offset + torch.randn(16, REPLICATES, dtype=torch.float64) for offset in offsets]
    mean_ratio, var_ratio = _ratio_of_reported_to_true_error(batches, 2.0)
    assert 0.8 < mean_ratio < 1.25
    assert 0.8 < var_ratio < 1.25
    batch_means = torch.stack([batch.mean(0) for batch in batches])
    naive = (batch_means.var(0) / steps).mean().sqrt() / batch_means.mean(0).square().mean().sqrt()
    assert naive < 0.45  # what is avoided: see above


def test_errors_are_in_the_units_of_what_the_layer_does():
    """The scale of the data does not matter, and a channel that is nearly constant counts for little, as in BN."""
    batches = [torch.randn(16, 3, dtype=torch.float64) for _ in range(32)]
    none = torch.finfo(torch.float64).tiny  # 0 itself nn.BatchNorm1d of torch 2.10 takes in no mode, of 2.13 in one
    plain, scaled = (
        update_bn_stats(nn.BatchNorm1d(3, eps=none).double(), [s * b + 7 for b in batches], None).layers[0]
        for s in (1.0, 1e3)
    )
    assert scaled.mean_error == pytest.approx(plain.mean_error)
    assert scaled.var_error == pytest.approx(plain.var_error)
    faint = update_bn_stats(nn.BatchNorm1d(3, eps=1.0).double(), [1e-4 * b for b in batches], None)
    assert faint.max_error < 1e-4


# ---- adapt_bn_stats -----------------------------------------------------------------------------------------------


def source_model() -> nn.BatchNorm1d:
    bn = nn.BatchNorm1d(2).double().eval()
    bn.running_mean.copy_(torch.tensor([1.0, -2.0]))
    bn.running_var.copy_(torch.tensor([4.0, 0.25]))
    return bn


@given(st.one_of(st.just(0.0), st.just(16), st.floats(0, 1e6)), st.integers(1, 40))
def test_source_statistics_count_as_prior_samples(prior, samples):
    target = torch.randn(samples, 2, 3, generator=torch.Generator().manual_seed(samples)).double() + 5
    bn = source_model()
    report = adapt_bn_stats(bn, target.split(7), prior)
    mean, var = numpy_statistics(target)
    weight = prior / (prior + samples)
    np.testing.assert_allclose(bn.running_mean.numpy(), weight * np.array([1.0, -2.0]) + (1 - weight) * mean, rtol=1e-9)
    np.testing.assert_allclose(bn.running_var.numpy(), weight * np.array([4.0, 0.25]) + (1 - weight) * var, rtol=1e-9)
    assert report.num_samples == samples


def test_an_infinite_prior_leaves_the_source_statistics_bit_for_bit():
    bn = source_model().float()
    before = bn.running_mean.clone(), bn.running_var.clone()
    adapt_bn_stats(bn, [torch.randn(8, 2)] * 3, math.inf)
    assert torch.equal(bn.running_mean, before[0])
    assert torch.equal(bn.running_var, before[1])


def test_without_a_prior_it_is_update_bn_stats_over_all_layers_and_all_data():
    adapted = convnet().eval()
    updated = copy.deepcopy(adapted)
    adapt_bn_stats(adapted, BATCHES)
    update_bn_stats(updated, BATCHES, None, modules="all")
    assert values_of(adapted) == values_of(updated)
    assert not any(module.training for module in adapted.modules())


def test_adapting_is_a_transaction_too():
    model = convnet().eval()
    before = state_of(model)
    with pytest.raises(InsufficientDataError):
        adapt_bn_stats(model, BATCHES, 16, num_iters=11)
    assert state_of(model) == before


def test_every_error_on_purpose_is_a_precisebn_error():
    assert issubclass(InsufficientDataError, PreciseBNError)
    assert issubclass(InsufficientDataError, AssertionError)
    assert issubclass(InputError, ValueError)


def test_a_prior_is_weighed_against_the_samples_of_its_own_domain():
    bn = DomainSpecificBN(1, 2).eval()
    batch = torch.tensor([[4.0], [8.0], [1.0], [1.0], [1.0], [1.0]]), torch.tensor([0, 0, 1, 1, 1, 1])
    adapt_bn_stats(bn, [batch], prior=2, forward=lambda model, pair: model(pair[0], domain=pair[1]))
    # From mean 0 and variance 1: domain 0 goes 2 / 4 of the way to (6, 4), domain 1 goes 4 / 6 of it to (1, 0).
    torch.testing.assert_close(bn.running_mean, torch.tensor([[3.0], [2 / 3]]))
    torch.testing.assert_close(bn.running_var, torch.tensor([[2.5], [1 / 3]]))
