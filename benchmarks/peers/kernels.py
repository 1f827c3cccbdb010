"""Who takes part in the benchmark ``kernels``: ours, torch's natives for the same work, and the memory's own speed.

Every contestant is called with the fields of a :class:`~benchmarks.harness.inputs.Pair`. Coefficients and statistics
that an operator takes besides its tensors are worked out beforehand, for ours and for peers alike.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness.inputs import Pair
from precisebn import ops

Contestant = Callable[[Tensor, Tensor, Tensor, Tensor], Any]

READS = {
    "moments": 1,
    "accumulate": 1,
    "normalize": 1,
    "backward_reduce": 2,
    "backward_apply": 2,
    "forward": 2,
    "backward": 4,
}
"""How often each byte of a tensor must be read. ``forward`` is moments and normalize, ``backward`` the other two."""
WRITES = {
    "moments": 0,
    "accumulate": 0,
    "normalize": 1,
    "backward_reduce": 0,
    "backward_apply": 1,
    "forward": 1,
    "backward": 1,
}

PEERS = {
    "moments": ["x.sum()", "batch_norm_stats", "batch_norm_update_stats", "var_mean"],
    "accumulate": ["x.sum()", "batch_norm_update_stats"],
    "normalize": ["add(x, 1)", "batch_norm_elemt", "F.batch_norm, eval"],
    "backward_reduce": ["dot(x, dy)", "batch_norm_backward_reduce", "native_batch_norm_backward, sums"],
    "backward_apply": ["add(x, dy)", "batch_norm_backward_elemt"],
    "forward": ["F.batch_norm"],
    "backward": ["native_batch_norm_backward"],
}
"""What each of ours is compared with, where the device has it."""

EPS = 1e-5


def contestants(pair: Pair, device: str) -> dict[str, Contestant]:
    """Ours and the peers of a device, for tensors like these."""
    channels, compute = pair.x.shape[1], ops.compute_dtype(pair.x)
    (count,), (mean,), (m2,) = ops.moments(pair.x)
    statistics = _Statistics(mean.to(compute), (m2 / count + EPS).rsqrt().to(compute))
    weight, bias = (torch.rand(channels, dtype=compute, device=device) + 0.5 for _ in range(2))
    found = {**_references(), **_ours(mean, statistics, weight, bias), **_natives(statistics, weight, bias)}
    if device == "cuda":
        found |= _cuda_natives(statistics, weight, bias, int(count))
    return found


class _Statistics:
    """Mean and inverse standard deviation of a tensor, as torch's operators take them."""

    def __init__(self, mean: Tensor, inverse_std: Tensor) -> None:
        self.mean, self.inverse_std = mean, inverse_std

    @property
    def running(self) -> tuple[Tensor, Tensor]:
        """The same as a layer's running statistics."""
        return self.mean, self.inverse_std.square().reciprocal() - EPS


def _references() -> dict[str, Contestant]:
    """The memory's speed: on as many bytes, without the conversions that narrower dtypes need."""
    return {
        "x.sum()": lambda x, dy, raw_x, raw_dy: raw_x.sum(),
        "dot(x, dy)": lambda x, dy, raw_x, raw_dy: torch.dot(raw_x, raw_dy),
        "add(x, 1)": lambda x, dy, raw_x, raw_dy: torch.add(raw_x, 1),
        "add(x, dy)": lambda x, dy, raw_x, raw_dy: torch.add(raw_x, raw_dy),
    }


def _ours(mean: Tensor, statistics: _Statistics, weight: Tensor, bias: Tensor) -> dict[str, Contestant]:
    channels = len(mean)
    total = torch.zeros(1 + 2 * channels, dtype=torch.float64, device=mean.device).split([1, channels, channels])
    batch = torch.empty(2, channels, dtype=weight.dtype, device=mean.device).unbind()
    scale = (weight * statistics.inverse_std)[None]
    center, shift, means = statistics.mean[None], bias[None], mean[None]

    def forward(x: Tensor, *_: Tensor) -> Tensor:
        ops.moments(x)
        return ops.normalize(x, center, scale, shift)

    def backward(x: Tensor, dy: Tensor, *_: Tensor) -> Tensor:
        ops.backward_reduce(dy, x, means)
        return ops.backward_apply(dy, x, center, scale, shift, shift)

    return {
        "moments": lambda x, dy, raw_x, raw_dy: ops.moments(x),
        "accumulate": lambda x, dy, raw_x, raw_dy: ops.accumulate(x, *total, *batch),
        "normalize": lambda x, dy, raw_x, raw_dy: ops.normalize(x, center, scale, shift),
        "backward_reduce": lambda x, dy, raw_x, raw_dy: ops.backward_reduce(dy, x, means),
        "backward_apply": lambda x, dy, raw_x, raw_dy: ops.backward_apply(dy, x, center, scale, shift, shift),
        "forward": forward,
        "backward": backward,
    }


def _natives(statistics: _Statistics, weight: Tensor, bias: Tensor) -> dict[str, Contestant]:
    """Operators of torch that both devices have. F.batch_norm takes cuDNN on CUDA where torch thinks it faster."""
    mean, inverse_std = statistics.mean, statistics.inverse_std
    running_mean, running_var = statistics.running

    def native_backward(x: Tensor, dy: Tensor, mask: list[bool]) -> Any:
        return torch.ops.aten.native_batch_norm_backward(dy, x, weight, None, None, mean, inverse_std, True, EPS, mask)

    return {
        "batch_norm_update_stats": lambda x, dy, raw_x, raw_dy: torch.batch_norm_update_stats(x, None, None, 0.1),
        "var_mean": lambda x, dy, raw_x, raw_dy: torch.var_mean(x, (0, *range(2, x.dim()))),
        "F.batch_norm, eval": lambda x, dy, raw_x, raw_dy: F.batch_norm(
            x, running_mean, running_var, weight, bias, training=False, eps=EPS
        ),
        "F.batch_norm": lambda x, dy, raw_x, raw_dy: F.batch_norm(x, None, None, weight, bias, training=True, eps=EPS),
        "native_batch_norm_backward, sums": lambda x, dy, raw_x, raw_dy: native_backward(x, dy, [False, True, True]),
        "native_batch_norm_backward": lambda x, dy, raw_x, raw_dy: native_backward(x, dy, [True, True, True]),
    }


def _cuda_natives(statistics: _Statistics, weight: Tensor, bias: Tensor, count: int) -> dict[str, Contestant]:
    """What SyncBatchNorm is made of; the CPU has none of it."""
    mean, inverse_std = statistics.mean, statistics.inverse_std
    sum_dy, sum_dy_xmu = torch.rand_like(mean), torch.rand_like(mean)
    counts = torch.tensor([count], dtype=torch.int32, device=mean.device)
    return {
        "batch_norm_stats": lambda x, dy, raw_x, raw_dy: torch.batch_norm_stats(x, EPS),
        "batch_norm_elemt": lambda x, dy, raw_x, raw_dy: torch.batch_norm_elemt(
            x, weight, bias, mean, inverse_std, EPS
        ),
        "batch_norm_backward_reduce": lambda x, dy, raw_x, raw_dy: torch.batch_norm_backward_reduce(
            dy, x, mean, inverse_std, weight, True, True, True
        ),
        "batch_norm_backward_elemt": lambda x, dy, raw_x, raw_dy: torch.batch_norm_backward_elemt(
            dy, x, mean, inverse_std, weight, sum_dy, sum_dy_xmu, counts
        ),
    }


def able(found: dict[str, Contestant], pair: Pair) -> tuple[dict[str, Contestant], dict[str, str]]:
    """Those that run on tensors like these, and why peers of ours do not. Ours have to."""
    running, failed = {}, {}
    for name, work in found.items():
        try:
            work(*pair)
        except RuntimeError as error:
            if name in READS:
                raise
            failed[name] = str(error).splitlines()[0].partition(". ")[0]
        else:
            running[name] = work
    return running, failed


# ---- Correct before fast --------------------------------------------------------------------------------------------


def check(pair: Pair) -> dict[str, float]:
    """Relative errors of our operators against float64; an error beyond rounding stops the benchmark."""
    x, dy = pair.x, pair.dy
    wide_x, wide_dy = _by_channel(x), _by_channel(dy)
    n = wide_x.shape[1]
    mean = wide_x.mean(1)
    centered = wide_x - mean[:, None]
    var = centered.square().sum(1) / n
    center, a, b, c = (torch.rand(1, x.shape[1], dtype=ops.compute_dtype(x), device=x.device) + 0.5 for _ in range(4))
    wide_center, wide_a, wide_b, wide_c = (t.double().T for t in (center, a, b, c))
    difference = wide_x - wide_center

    (count,), (our_mean,), (m2,) = ops.moments(x)
    total = torch.zeros(1 + 2 * len(mean), dtype=torch.float64, device=x.device).split([1, len(mean), len(mean)])
    ops.accumulate(x, *total)
    (sum_dy,), (sum_dy_xmu,) = ops.backward_reduce(dy, x, mean[None])
    products = wide_dy * centered
    errors = {
        "moments": max(_error(our_mean, mean), _error(m2 / count, var)),
        "accumulate": max(_error(total[1], mean), _error(total[2] / n, var)),
        "normalize": _error(_by_channel(ops.normalize(x, center, a, b)), wide_a * difference + wide_b),
        "backward_reduce": max(
            _error(sum_dy, wide_dy.sum(1), wide_dy.abs().sum(1)),
            _error(sum_dy_xmu, products.sum(1), products.abs().sum(1)),
        ),
        "backward_apply": _error(
            _by_channel(ops.backward_apply(dy, x, center, a, b, c)), wide_a * wide_dy + wide_b * difference + wide_c
        ),
    }
    for name, error in errors.items():
        limit = _limits(x.dtype)[name]
        if not error <= limit:
            raise ArithmeticError(
                f"{name} of {tuple(x.shape)} {x.dtype} is off by {error:.1e}, more than {limit:.0e}; nothing is timed "
                "before it is right"
            )
    return errors


def _limits(dtype: torch.dtype) -> dict[str, float]:
    """One rounding of the output and a little of the arithmetic; statistics as the project promises them."""
    output = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}[dtype]
    sums, products = (1e-12, 1e-12) if dtype == torch.float64 else (1e-6, 1e-5)
    return {
        "moments": sums,
        "accumulate": sums,
        "normalize": output,
        "backward_reduce": products,
        "backward_apply": output,
    }


def _by_channel(x: Tensor) -> Tensor:
    return x.double().transpose(0, 1).reshape(x.shape[1], -1)


def _error(actual: Tensor, expected: Tensor, size: Tensor | None = None) -> float:
    """Of all channels together, relative to ``size``, or to what is expected."""
    return float((actual - expected).norm() / (expected if size is None else size).norm())
