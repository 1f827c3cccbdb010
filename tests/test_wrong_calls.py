"""What wrong calls get: one line each, the call and the message. A message says what was wrong and what to do."""

# ruff: noqa: E501 -- one line each is what makes the list readable

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from precisebn import InputError, Moments, PreciseBNError, adapt_bn_stats, shard_batchnorm, update_bn_stats

DATA = [torch.randn(4, 3, 8, 8)] * 10
NARROW = [torch.randn(4, 3)] * 10


class Encoder(nn.Module):
    """A small model with names to show in messages; its second BatchNorm has the wrong size."""

    def __init__(self, second: int = 8) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        self.neck = nn.BatchNorm2d(second)

    def forward(self, x: Tensor) -> Tensor:
        return self.neck(self.stem(x))


def update(*args: Any, **kwargs: Any) -> Any:
    return update_bn_stats(Encoder(), *(args or (DATA, 10)), **kwargs)


def adapt(*args: Any, **kwargs: Any) -> Any:
    return adapt_bn_stats(Encoder(), DATA, *args, **kwargs)


# fmt: off
WRONG_CALLS: list[tuple[str, Callable[[], Any], str]] = [
    # ---- the model
    ("model is no module", lambda: update_bn_stats([1], DATA), "model must be an nn.Module, not list"),
    ("model is a class", lambda: update_bn_stats(Encoder, DATA), "model must be an nn.Module, not type"),
    ("model and loader swapped", lambda: update_bn_stats(DATA, Encoder()), "model must be an nn.Module, not list"),
    ("a layer of the wrong size", lambda: update_bn_stats(Encoder(5), DATA, 1), r"layer 'neck' \(BatchNorm2d\) takes tensors \(N, 5, \*\), got shape \(4, 8, 6, 6\); check .* forward="),
    ("a layer fed a list", lambda: update_bn_stats(nn.BatchNorm2d(3), [DATA], 1), r"the mini-batch, list\(.*passed to BatchNorm2d as a whole.*forward=lambda.*layer '' takes a tensor \(N, 3, \*\), got list"),
    ("a model without values", lambda: update_bn_stats(Encoder().to("meta"), DATA, 1), r"layer 'stem\.1' \(BatchNorm2d\) is on the meta device.*to_empty\(device=\.\.\.\)"),
    # ---- the loader
    ("loader is a number", lambda: update(5), "data_loader must yield mini-batches; int is not iterable"),
    ("loader is None", lambda: update(None), "data_loader must yield mini-batches; NoneType is not iterable"),
    ("loader is empty", lambda: update([], None), "the data loader gave no mini-batch"),
    ("loader is empty, num_iters", lambda: update([], 3), "the data loader gave no mini-batch"),
    ("loader is too short", lambda: update(DATA, 11), r"num_iters=11, but the data loader ended after 10 mini-batches; pass num_iters=None"),
    ("lazy layers and an empty loader", lambda: update_bn_stats(nn.LazyBatchNorm1d(), [], 3), "no mini-batch, so lazy BatchNorm layers have no size"),
    ("mini-batch of strings", lambda: update([("a.png",)] * 3, 3), r"tuple\(str\), was passed to Encoder as a whole, .* because item 0 is not a tensor \(str\); .*pass forward=lambda model, batch.* raised TypeError"),
    ("mapping with other names", lambda: update([{"image": DATA[0]}], 1), r"dict\('image': Tensor\(4, 3, 8, 8\)\), was passed to Encoder as keyword arguments, model\(\*\*batch\); .*forward=lambda model, batch: model\(batch\['image'\]\).*unexpected keyword argument 'image'"),
    ("float target beside the input", lambda: update([(DATA[0], torch.ones(4))], 1), r"^the mini-batch, tuple\(Tensor\(4, 3, 8, 8\), Tensor\(4,\)\), was passed to Encoder as a whole, model\(batch\), because item 1 is floating point, too; .*forward=lambda model, batch: model\(batch\[0\]\).* raised TypeError: conv2d"),
    ("integer values", lambda: update_bn_stats(nn.BatchNorm1d(3), [torch.ones(4, 3).long()], 1), r"layer '' \(BatchNorm1d\) .*torch\.int64"),
    ("no channels", lambda: update_bn_stats(nn.BatchNorm1d(3), [torch.ones(3)], 1), r"layer '' .*takes tensors \(N, 3, \*\), got shape \(3,\)"),
    ("NaN in the data", lambda: update([*DATA[:3], DATA[0] * math.nan], 4), r"layer 'stem\.1' \(BatchNorm2d\) held NaN or Inf.* in mini-batch 3 .*model is as it was\. Check"),
    # ---- num_iters
    ("num_iters=0", lambda: update(DATA, 0), "num_iters=0 must be at least 1; None uses the whole loader"),
    ("num_iters=-1", lambda: update(DATA, -1), "num_iters=-1 must be at least 1; None uses the whole loader"),
    ("num_iters=1.5", lambda: update(DATA, 1.5), "num_iters=1.5 must be a whole number, or None"),
    ("num_iters=True", lambda: update(DATA, True), "num_iters=True must be a whole number, or None"),
    ("num_iters='all'", lambda: update(DATA, "all"), "num_iters='all' must be a whole number, or None"),
    # ---- other arguments
    ("progress is a typo", lambda: update(progress="tdqm"), "progress='tdqm' must be 'tqdm', True, False or None"),
    ("estimator is a typo", lambda: update(estimator="populaton"), "estimator='populaton' must be one of 'population', 'batch-mean'"),
    ("tolerance=0", lambda: update(tolerance=0), "tolerance=0 must be a positive number, such as 0.01, or None"),
    ("tolerance=-0.1", lambda: update(tolerance=-0.1), "tolerance=-0.1 must be a positive number"),
    ("tolerance=nan", lambda: update(tolerance=math.nan), "tolerance=nan must be a positive number"),
    ("tolerance=inf", lambda: update(tolerance=math.inf), "tolerance=inf must be a positive number"),
    ("tolerance='1%'", lambda: update(tolerance="1%"), "tolerance='1%' must be a positive number"),
    ("tolerance=True", lambda: update(tolerance=True), "tolerance=True must be a positive number"),
    ("forward is no callable", lambda: update(forward="model"), r"forward='model' must be a callable forward\(model, batch\)"),
    ("device is a typo", lambda: update(device="gpu"), "device='gpu' is no device, such as 'cuda:0' or 'cpu'"),
    ("device is a list", lambda: update(device=["cpu"]), r"device=\['cpu'\] is no device"),
    ("process_group without processes", lambda: update(process_group=object()), "torch.distributed is not initialized: call torch.distributed.init_process_group"),
    ("sharding without processes", lambda: shard_batchnorm(Encoder()), "torch.distributed is not initialized: call torch.distributed.init_process_group"),
    # ---- modules=
    ("modules is a typo", lambda: update(modules="necks"), "modules='necks' matches no BatchNorm layer of Encoder; it has 2: 'stem.1', 'neck'"),
    ("modules names no BatchNorm", lambda: update(modules="stem.0"), "modules='stem.0' matches no BatchNorm layer of Encoder; it has 2: 'stem.1', 'neck'"),
    ("modules of another model", lambda: update(modules=[nn.BatchNorm2d(8)]), "modules=the BatchNorm2d given matches no BatchNorm layer of Encoder"),
    ("modules is None", lambda: update(modules=None), "modules=None must be 'training', 'all', or modules, names and patterns"),
    ("modules is empty", lambda: update(modules=[]), "modules= is empty, so it chooses nothing; '\\*' takes every"),
    ("modules holds a number", lambda: update(modules=["neck", 3]), "modules= takes modules, names and patterns, not int: 3"),
    ("modules of a model without any", lambda: update_bn_stats(nn.Linear(3, 3), NARROW, 1, modules="bn"), "modules='bn' matches no BatchNorm layer of Linear; it has none at all"),
    # ---- estimator="batch-mean"
    ("one value has no variance", lambda: update_bn_stats(nn.BatchNorm1d(3), [torch.ones(1, 3)], 1, estimator="batch-mean"), r"layer '' got one value per channel, shape \(1, 3\).* use larger mini-batches or estimator='population'"),
    # ---- adapt_bn_stats
    ("prior=-1", lambda: adapt(-1), "prior=-1 must be a number of samples, 0 or more"),
    ("prior=nan", lambda: adapt(math.nan), "prior=nan must be a number of samples, 0 or more"),
    ("prior='16'", lambda: adapt("16"), "prior='16' must be a number of samples"),
    ("prior=True", lambda: adapt(True), "prior=True must be a number of samples"),
    ("prior=None", lambda: adapt(None), "prior=None must be a number of samples"),
    ("adapting with too little data", lambda: adapt(num_iters=11), "num_iters=11, but the data loader ended after 10"),
    ("adapting another model's layers", lambda: adapt(modules="bn1"), "modules='bn1' matches no BatchNorm layer of Encoder"),
    # ---- Moments
    ("Moments of a vector", lambda: Moments.of(torch.ones(3)), r"x must be \(N, C, \*\), at least 2 dimensions, but has shape \(3\)"),
    ("Moments of integers", lambda: Moments.of(torch.ones(2, 3).long()), r"x \(2, 3\) must be float32, .* but is torch\.int64"),
    ("Moments, group without num_groups", lambda: Moments.of(torch.ones(2, 3), torch.tensor([0, 1])), "group was given without num_groups; pass how many groups"),
    ("Moments, num_groups without group", lambda: Moments.of(torch.ones(2, 3), num_groups=2), "num_groups=2 was given without group; pass the group of each sample"),
    ("Moments, group out of range", lambda: Moments.of(torch.ones(2, 3), torch.tensor([0, 2]), 2), "group must hold numbers from 0 to 1, but holds 0 to 2"),
    ("Moments, group of another length", lambda: Moments.of(torch.ones(2, 3), torch.tensor([0]), 2), r"group must be int64 of shape \(2,\), one number per sample of x \(2, 3\)"),
    ("Moments of different channels", lambda: Moments.zero(2) + Moments.zero(3), r"cannot merge Moments of shapes \(2,\) and \(3,\)"),
]
# fmt: on


@pytest.mark.parametrize(("call", "message"), [pytest.param(c, m, id=name) for name, c, m in WRONG_CALLS])
def test_wrong_call(call, message):
    with pytest.raises(PreciseBNError) as caught:
        call()
    assert re.search(message, str(caught.value), re.DOTALL), str(caught.value)


ARGUMENTS_THAT_ARE_RIGHT = {
    "num_iters of NumPy": lambda: update(DATA, torch.tensor([2]).numpy()[0]),
    "progress=False": lambda: update(progress=False),
    "device as torch.device": lambda: update(device=torch.device("cpu")),
    "prior is whole": lambda: adapt(16),
    "prior of NumPy": lambda: adapt(torch.tensor([1.5]).numpy()[0]),
    "prior is infinite": lambda: adapt(math.inf),
    "positional as fvcore": lambda: update(DATA, 2, None),
}


@pytest.mark.parametrize("name", ARGUMENTS_THAT_ARE_RIGHT)
def test_right_call(name):
    assert ARGUMENTS_THAT_ARE_RIGHT[name]().num_samples > 0


def test_wrong_calls_are_refused_before_any_data_is_used():
    data = iter(DATA)
    with pytest.raises(InputError):
        update(data, tolerance=-1)
    with pytest.raises(InputError):
        update(data, modules="bn1")
    assert len(list(data)) == len(DATA)
