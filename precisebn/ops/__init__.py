"""The operators that carry all of precisebn's arithmetic: schemas, backends, typed wrappers, shapes and derivatives.

========================  =============================================  ===========================================
operator                  gives                                          reads
========================  =============================================  ===========================================
:func:`moments`           count, mean, m2 per (group, channel)           x once
:func:`accumulate`        the same, merged into running accumulators     x once
:func:`fold`              statistics and affine as a scale and a shift   tensors (G, C)
:func:`normalize`         scale * x + shift per (group, channel)         x once
:func:`track`             running statistics, updated                    tensors (G, C)
:func:`backward_reduce`   sum dy, sum dy * (x - mean)                    dy, x once
:func:`backward_fold`     the a, b, c below; gradients of the affine     tensors (G, C)
:func:`backward_apply`    a * dy + b * x + c                             dy, x once
========================  =============================================  ===========================================

Those that read tensors (G, C) alone do what a dozen operators of torch would: of a small layer these would take most of
the time, and on a GPU each is a launch. For the same reason the usual sequences of operators are operators themselves:

=======================  ===========================================================================================
:func:`normalize_batch`  ``moments``, ``fold`` and ``normalize``
:func:`backward_batch`   ``backward_reduce``, ``backward_fold`` and ``backward_apply``
=======================  ===========================================================================================

Each has a CPU kernel (``csrc/cpu``), a CUDA kernel (``csrc/cuda``) and a reference in plain PyTorch
(``precisebn/_fallback.py``), which runs wherever a kernel is missing. Callers never ask which one runs;
:func:`backend` tells. The environment variable ``PRECISEBN_BACKEND`` chooses: ``auto`` (default), ``native`` (an error
where the kernels cannot be loaded) or ``fallback``.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from precisebn._torch import is_batched, is_tracing
from precisebn.errors import InputError
from precisebn.ops import _fallback

__all__ = [
    "Backend",
    "accumulate",
    "backend",
    "backward_apply",
    "backward_batch",
    "backward_fold",
    "backward_reduce",
    "fold",
    "moments",
    "normalize",
    "normalize_batch",
    "track",
]

# The schemas stand here alone. The shared libraries register implementations only, with STABLE_TORCH_LIBRARY_IMPL: the
# operators then exist with and without them, and no second copy of the text can drift from this one.
_SCHEMAS = {
    "moments": "(Tensor x, Tensor? group=None, int num_groups=1) -> (Tensor count, Tensor mean, Tensor m2)",
    "accumulate": "(Tensor x, Tensor(a!) count, Tensor(b!) mean, Tensor(c!) m2, Tensor(d!)? batch_mean=None, "
    "Tensor(e!)? batch_var=None) -> ()",
    "fold": "(Tensor? count, Tensor mean, Tensor spread, Tensor? weight, Tensor? bias, float eps, bool double) "
    "-> (Tensor scale, Tensor shift)",
    "normalize": "(Tensor x, Tensor scale, Tensor? shift=None, Tensor? group=None) -> Tensor",
    "track": "(Tensor count, Tensor mean, Tensor m2, Tensor(a!) running_mean, Tensor(b!) running_var, "
    "Tensor(c!) num_batches, float? momentum) -> ()",
    "backward_reduce": "(Tensor dy, Tensor x, Tensor mean, Tensor? group=None, int num_groups=1) "
    "-> (Tensor sum_dy, Tensor sum_dy_xmu)",
    "backward_fold": "(Tensor? count, Tensor mean, Tensor spread, Tensor sum_dy, Tensor sum_dy_xmu, Tensor? weight, "
    "float eps, bool double) -> (Tensor a, Tensor b, Tensor c, Tensor grad_weight, Tensor grad_bias)",
    "backward_apply": "(Tensor dy, Tensor x, Tensor a, Tensor b, Tensor c, Tensor? group=None) -> Tensor",
    "normalize_batch": "(Tensor x, Tensor? weight, Tensor? bias, float eps, Tensor? group=None, int num_groups=1) "
    "-> (Tensor y, Tensor count, Tensor mean, Tensor m2)",
    "backward_batch": "(Tensor dy, Tensor x, Tensor? count, Tensor mean, Tensor spread, Tensor? weight, float eps, "
    "Tensor? group=None) -> (Tensor dx, Tensor grad_weight, Tensor grad_bias)",
}

_DIFFERENTIABLE = ("moments", "normalize", "backward_reduce", "backward_apply")


def _define() -> torch.library.Library:
    """Define the operators. A differentiable one stands twice: as itself, and with an underscore without derivative.

    The bare one carries the kernels. torch runs derivatives that are written in Python in Python also where nobody
    asks for them, which costs small tensors more than the work itself; so calls that need none go to the bare one.
    """
    library = torch.library.Library("precisebn", "DEF")
    for name, schema in _SCHEMAS.items():
        bare = f"_{name}" if name in _DIFFERENTIABLE else name
        library.define(bare + schema, tags=(torch.Tag.pt2_compliant_tag,))
        # A kernel of a backend (CPU, CUDA) takes precedence over this one, which serves all backends that have none.
        library.impl(bare, getattr(_fallback, name), "CompositeExplicitAutograd")
        if name in _DIFFERENTIABLE:
            library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
            library.impl(name, getattr(torch.ops.precisebn, bare).default, "CompositeExplicitAutograd")
    library.define("_cpu_capability() -> str")
    return library


_library = _define()


def _unchecked(name: str) -> Callable[..., Any]:
    """An operator below the checks of the wrappers: the bare one unless a derivative may be asked for."""
    differentiable = getattr(torch.ops.precisebn, name).default
    bare = getattr(torch.ops.precisebn, f"_{name}").default

    def call(*arguments: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in arguments):
            return differentiable(*arguments)
        return bare(*arguments)

    return call


class unchecked:
    """The operators for callers that have checked their arguments, or are being traced and cannot."""

    moments = staticmethod(_unchecked("moments"))
    normalize = staticmethod(_unchecked("normalize"))
    backward_reduce = staticmethod(_unchecked("backward_reduce"))
    backward_apply = staticmethod(_unchecked("backward_apply"))


class bare:
    """The operators without checks and without derivatives, for where none can be asked for: gradients are off."""

    moments = torch.ops.precisebn._moments.default
    accumulate = torch.ops.precisebn.accumulate.default
    fold = torch.ops.precisebn.fold.default
    normalize = torch.ops.precisebn._normalize.default
    track = torch.ops.precisebn.track.default
    backward_reduce = torch.ops.precisebn._backward_reduce.default
    backward_fold = torch.ops.precisebn.backward_fold.default
    backward_apply = torch.ops.precisebn._backward_apply.default
    normalize_batch = torch.ops.precisebn.normalize_batch.default
    backward_batch = torch.ops.precisebn.backward_batch.default


class Backend(NamedTuple):
    """What runs the operators on each device; ``str()`` is one plain line."""

    cpu: str
    """``"native"`` or ``"fallback"``."""
    cpu_detail: str
    """The instruction set in use (``"avx512"``, ``"avx2"``, ``"baseline"``), or why the fallback is used."""
    cuda: str
    """``"native"``, ``"fallback"`` or ``"unavailable"``."""
    cuda_detail: str
    """Empty, or why CUDA does not run natively."""

    def __str__(self) -> str:
        cpu = f"cpu: {self.cpu} ({self.cpu_detail})"
        cuda = f"cuda: {self.cuda}" + (f" ({self.cuda_detail})" if self.cuda_detail else "")
        return f"{cpu}; {cuda}"


def backend() -> Backend:
    """Which implementation of the operators is in use, and why.

    >>> backend().cpu in ("native", "fallback")
    True
    """
    cpu_detail = _cpu_failure or torch.ops.precisebn._cpu_capability()
    if torch.version.cuda is None or not torch.cuda.is_available():
        cuda, cuda_detail = "unavailable", "torch has no CUDA device"
    else:
        cuda, cuda_detail = "fallback" if _cuda_failure else "native", _cuda_failure
    return Backend("fallback" if _cpu_failure else "native", cpu_detail, cuda, cuda_detail)


def moments(x: Tensor, group: Tensor | None = None, num_groups: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and sum of squared deviations of every (group, channel) of ``x``.

    At least as accurate as a float64 Welford recurrence to 1e-6 relative in the variance, for float32 input with
    ``|mean| / std`` up to 1e4; never negative; exactly 0 for a constant channel. Differentiable twice in ``x``.

    Args:
        x: ``(N, C, *)``, float32, float64, float16 or bfloat16, any strides. Empty is allowed.
        group: int64 ``(N,)`` on the device of ``x``, the group of each sample, ``0 <= group < num_groups``. The range
            is checked on CPU only (on CUDA the check would wait for the device). None puts every sample in group 0.
        num_groups: the number of groups, ``G``.

    Returns:
        ``count (G,)``, the number of values per channel; ``mean (G, C)``; ``m2 (G, C)``, the sum of squared deviations
        from the mean. All float64. A group without samples has zeros.

    Raises:
        InputError: on a wrong shape, dtype, device or group number.

    >>> x = torch.tensor([[1.0, 10.0], [3.0, 10.0]])
    >>> count, mean, m2 = moments(x)
    >>> count.tolist(), mean.tolist(), m2.tolist()
    ([2.0], [[2.0, 10.0]], [[2.0, 0.0]])
    """
    check_input("moments", x, group, num_groups)
    result: tuple[Tensor, Tensor, Tensor] = unchecked.moments(x, group, num_groups)
    return result


def accumulate(
    x: Tensor,
    count: Tensor,
    mean: Tensor,
    m2: Tensor,
    batch_mean: Tensor | None = None,
    batch_var: Tensor | None = None,
) -> None:
    """Merge the moments of ``x`` into running accumulators, in place; optionally write the statistics of ``x`` alone.

    The fused form of :func:`moments` and Chan's merge for a hook that runs once per layer and iteration; it therefore
    checks next to nothing. Not differentiable. An empty ``x`` changes nothing.

    Args:
        x: ``(N, C, *)``, as in :func:`moments`.
        count: float64 ``(1,)``, contiguous, on the device of ``x``, as are the next two.
        mean: float64 ``(C,)``.
        m2: float64 ``(C,)``.
        batch_mean: ``(C,)`` of any floating dtype: receives the mean of ``x`` per channel.
        batch_var: ``(C,)`` of any floating dtype: receives the biased variance (divided by n) of ``x`` per channel.

    >>> count, mean, m2 = torch.zeros(7, dtype=torch.float64).split([1, 3, 3])
    >>> accumulate(torch.ones(2, 3), count, mean, m2)
    >>> accumulate(torch.zeros(2, 3), count, mean, m2)
    >>> count.item(), mean.tolist(), m2.tolist()
    (4.0, [0.5, 0.5, 0.5], [1.0, 1.0, 1.0])
    """
    bare.accumulate(x, count, mean, m2, batch_mean, batch_var)


def normalize(x: Tensor, scale: Tensor, shift: Tensor, group: Tensor | None = None) -> Tensor:
    """``scale * x + shift`` per (group, channel): batch normalization once its statistics are known.

    Computed in float64 for float64 ``x`` and in float32 otherwise. Differentiable twice in ``x``, ``scale``, ``shift``.

    Args:
        x: ``(N, C, *)``, float32, float64, float16 or bfloat16, any strides.
        scale: ``(G, C)`` of any floating dtype, converted to the dtype of the computation.
        shift: ``(G, C)``, likewise.
        group: int64 ``(N,)``, as in :func:`moments`; ``G`` must be 1 without it.

    Returns:
        A tensor of the shape, dtype and memory format of ``x``.

    Raises:
        InputError: on a wrong shape, dtype, device or group number.

    >>> normalize(torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 3.0]]), torch.tensor([[0.5, 0.0]]))
    tensor([[2.5000, 6.0000]])
    """
    _check_x("normalize", x)
    _check_coefficients("normalize", x, group, scale=scale, shift=shift)
    _check_group("normalize", x, group, scale.shape[0])
    dtype = compute_dtype(x)
    result: Tensor = unchecked.normalize(x, scale.to(dtype), shift.to(dtype), group)
    return result


def fold(
    count: Tensor | None,
    mean: Tensor,
    spread: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    double: bool,
) -> tuple[Tensor, Tensor]:
    """Statistics and affine as a ``scale`` and a ``shift`` for :func:`normalize`.

    ``scale = weight / sqrt(var + eps)`` and ``shift = bias - mean * scale``, computed in float64. Checks next to
    nothing. Not differentiable.

    Args:
        count: float64 ``()`` or ``(R,)``, as many as there are means; or None.
        mean: ``(C,)`` or ``(R, C)``, floating point, as are the next three.
        spread: m2, whose variance is ``m2 / max(count, 1)``, where there is a count; else the variance.
        weight: None is 1.
        bias: None is 0.
        eps: added to the variance.
        double: whether the result is float64, for float64 ``x``; else it is float32.

    Returns:
        Two tensors ``(R, C)``; operands of one row apply to all rows.

    >>> fold(None, torch.tensor([3.0]), torch.tensor([4.0]), None, torch.tensor([1.0]), 0.0, False)
    (tensor([[0.5000]]), tensor([[-0.5000]]))
    """
    result: tuple[Tensor, Tensor] = bare.fold(count, mean, spread, weight, bias, eps, double)
    return result


def track(
    count: Tensor,
    mean: Tensor,
    m2: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    num_batches: Tensor,
    momentum: float | None,
) -> None:
    """Update running statistics as torch does: ``running = (1 - momentum) * running + momentum * batch``, in place.

    Computed in float64; the mini-batch's variance is unbiased, ``m2 / (count - 1)``. A row whose count is below two has
    no variance, and is left alone. Checks next to nothing. Not differentiable. In a graph it is plain arithmetic, which
    compilers fuse.

    Args:
        count: float64 ``()`` or ``(R,)``, of the mini-batch, as are the next two.
        mean: float64 ``(C,)`` or ``(R, C)``.
        m2: likewise.
        running_mean: of the shape of ``mean``, floating point, any strides.
        running_var: likewise.
        num_batches: int64 ``()`` or ``(R,)``: grows by one.
        momentum: None is the average over all mini-batches.

    >>> mean, var, batches = torch.tensor([0.0]), torch.tensor([1.0]), torch.tensor(0)
    >>> batch = moments(torch.tensor([[0.0], [1.0], [5.0]]))
    >>> track(*(t[0] for t in batch), mean, var, batches, 0.5)
    >>> mean.item(), var.item(), batches.item()
    (1.0, 4.0, 1)
    """
    # An averaged state dict may have made a floating-point number of mini-batches; nn.BatchNorm counts on in it.
    in_a_graph = torch.compiler.is_compiling() or is_tracing()
    if in_a_graph or num_batches.dtype != torch.int64 or is_batched(running_mean):
        _fallback.track(count, mean, m2, running_mean, running_var, num_batches, momentum)
        return
    bare.track(count, mean, m2, running_mean, running_var, num_batches, momentum)
    # A backward may need what they were, and who keeps buffers looks here for whether they have changed.
    torch.autograd.graph.increment_version((running_mean, running_var, num_batches))


def backward_reduce(
    dy: Tensor, x: Tensor, mean: Tensor, group: Tensor | None = None, num_groups: int = 1
) -> tuple[Tensor, Tensor]:
    """``sum dy`` and ``sum dy * (x - mean)`` of every (group, channel): the sums of batch normalization's backward.

    Args:
        dy: the shape, dtype and device of ``x``, any strides.
        x: ``(N, C, *)``, as in :func:`moments`.
        mean: ``(G, C)``, what to subtract from ``x``; converted to float64.
        group: int64 ``(N,)``, as in :func:`moments`.
        num_groups: the number of groups, ``G``.

    Returns:
        Two float64 tensors ``(G, C)``.

    Raises:
        InputError: on a wrong shape, dtype, device or group number.

    >>> x = torch.tensor([[1.0], [3.0]])
    >>> backward_reduce(torch.ones(2, 1), x, torch.tensor([[1.0]]))
    (tensor([[2.]], dtype=torch.float64), tensor([[2.]], dtype=torch.float64))
    """
    _check_x("backward_reduce", x)
    _check_dy("backward_reduce", dy, x)
    _check_coefficients("backward_reduce", x, group, num_groups, mean=mean)
    _check_group("backward_reduce", x, group, num_groups)
    result: tuple[Tensor, Tensor] = unchecked.backward_reduce(dy, x, mean.double(), group, num_groups)
    return result


def backward_fold(
    count: Tensor | None,
    mean: Tensor,
    spread: Tensor,
    sum_dy: Tensor,
    sum_dy_xmu: Tensor,
    weight: Tensor | None,
    eps: float,
    double: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """From the sums of :func:`backward_reduce` to :func:`backward_apply`, and to the gradients of weight and bias.

    The gradient of batch normalization, every group by its own mean and variance (Ioffe & Szegedy 2015, algorithm 1):
    ``dx = weight / std * (dy - sum_dy / n - (x - mean) / var * sum_dy_xmu / n)``, with var for ``m2 / n + eps``. Or,
    without a count, that of a normalization by given statistics: ``dx = weight / std * dy``. Computed in float64.
    Checks next to nothing. Not differentiable.

    Args:
        count: float64 ``(G,)``, as of :func:`moments`; or None.
        mean: ``(G, C)``, or ``(C,)`` of one group, floating point, as is the next.
        spread: m2 where there is a count; else the variance.
        sum_dy: float64 ``(G, C)``, about ``mean``, as is the next.
        sum_dy_xmu: see :func:`backward_reduce`.
        weight: ``(C,)`` or ``(G, C)``, floating point; None is 1.
        eps: added to the variance.
        double: whether a, b and c are float64, for float64 ``x``; else they are float32.

    Returns:
        a, b and c, ``(G, C)``; and the gradients of weight and bias, both in the shape and dtype of ``weight``: summed
        over the groups where they share it. Without a weight, in the shape of ``mean`` and float64.

    >>> count, mean, m2 = moments(torch.tensor([[1.0], [3.0]]))
    >>> sums = backward_reduce(torch.tensor([[1.0], [1.0]]), torch.tensor([[1.0], [3.0]]), mean)
    >>> [t.item() for t in backward_fold(count, mean, m2, *sums, None, 0.0, False)]
    [1.0, -0.0, -1.0, 0.0, 2.0]
    """
    result: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = bare.backward_fold(
        count, mean, spread, sum_dy, sum_dy_xmu, weight, eps, double
    )
    return result


def backward_apply(dy: Tensor, x: Tensor, a: Tensor, b: Tensor, c: Tensor, group: Tensor | None = None) -> Tensor:
    """``a * dy + b * x + c`` per (group, channel): the gradient of batch normalization in its input.

    Args:
        dy: the shape, dtype and device of ``x``, any strides.
        x: ``(N, C, *)``, as in :func:`normalize`.
        a: ``(G, C)`` of any floating dtype, converted to the dtype of the computation, as are the next two.
        b: ``(G, C)``.
        c: ``(G, C)``.
        group: int64 ``(N,)``, as in :func:`moments`; ``G`` must be 1 without it.

    Returns:
        A tensor of the shape, dtype and memory format of ``x``.

    Raises:
        InputError: on a wrong shape, dtype, device or group number.

    >>> one = torch.ones(1, 1)
    >>> backward_apply(torch.tensor([[1.0]]), torch.tensor([[3.0]]), 2 * one, one, one)
    tensor([[6.]])
    """
    _check_x("backward_apply", x)
    _check_dy("backward_apply", dy, x)
    _check_coefficients("backward_apply", x, group, a=a, b=b, c=c)
    _check_group("backward_apply", x, group, a.shape[0])
    dtype = compute_dtype(x)
    result: Tensor = unchecked.backward_apply(dy, x, a.to(dtype), b.to(dtype), c.to(dtype), group)
    return result


def normalize_batch(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    group: Tensor | None = None,
    num_groups: int = 1,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`moments`, :func:`fold` and :func:`normalize` in one call. Checks next to nothing. Not differentiable.

    Returns:
        The normalized tensor; count, mean and m2, as of :func:`moments`, but ``()`` and ``(C,)`` where ``group`` is
        None.

    >>> y, count, mean, m2 = normalize_batch(torch.tensor([[1.0], [3.0]]), None, None, 0.0)
    >>> y.flatten().tolist(), count.item(), mean.tolist(), m2.tolist()
    ([-1.0, 1.0], 2.0, [2.0], [2.0])
    """
    result: tuple[Tensor, Tensor, Tensor, Tensor] = bare.normalize_batch(x, weight, bias, eps, group, num_groups)
    return result


def backward_batch(
    dy: Tensor,
    x: Tensor,
    count: Tensor | None,
    mean: Tensor,
    spread: Tensor,
    weight: Tensor | None,
    eps: float,
    group: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`backward_reduce`, :func:`backward_fold` and :func:`backward_apply` in one call.

    Without a count, of a normalization by given statistics. Checks next to nothing. Not differentiable.

    Args:
        dy: the gradient of what was normalized.
        x: ``(N, C, *)``, as it was before.
        count: of :func:`normalize_batch`; or None.
        mean: float64, of :func:`normalize_batch`; or given, ``(C,)`` or ``(G, C)``.
        spread: m2 of :func:`normalize_batch`; or the variance, in the shape of ``mean``, floating point.
        weight: ``(C,)`` or ``(G, C)``, floating point; None is 1.
        eps: added to the variance.
        group: as in :func:`moments`.

    Returns:
        The gradients of ``x``, and of weight and bias as of :func:`backward_fold`.

    >>> x = torch.tensor([[1.0], [3.0]])
    >>> _, *statistics = normalize_batch(x, None, None, 0.0)
    >>> [t.flatten().tolist() for t in backward_batch(torch.tensor([[1.0], [2.0]]), x, *statistics, None, 0.0)]
    [[0.0, 0.0], [1.0], [3.0]]
    """
    result: tuple[Tensor, Tensor, Tensor] = bare.backward_batch(dy, x, count, mean, spread, weight, eps, group)
    return result


# ---- Checks of what the user passes -------------------------------------------------------------------------------

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of coefficients for ``x``, and of the arithmetic on it."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _shape(t: Tensor) -> str:
    return f"({', '.join(map(str, t.shape))})"


def check_input(operator: str, x: Tensor, group: Tensor | None, num_groups: int) -> None:
    """Raise InputError, opening with ``operator``, unless every operator takes ``x`` and ``group``."""
    _check_x(operator, x)
    _check_group(operator, x, group, num_groups)


def _check_x(operator: str, x: Tensor) -> None:
    if x.dim() < 2:
        raise InputError(f"{operator}: x must be (N, C, *), at least 2 dimensions, but has shape {_shape(x)}")
    if x.dtype not in DTYPES:
        raise InputError(f"{operator}: x {_shape(x)} must be float32, float64, float16 or bfloat16, but is {x.dtype}")


def _check_dy(operator: str, dy: Tensor, x: Tensor) -> None:
    if dy.shape != x.shape or dy.dtype != x.dtype or dy.device != x.device:
        raise InputError(
            f"{operator}: dy {_shape(dy)} {dy.dtype} on {dy.device} must have the shape, dtype and device of "
            f"x {_shape(x)} {x.dtype} on {x.device}"
        )


def _check_group(operator: str, x: Tensor, group: Tensor | None, num_groups: int) -> None:
    if num_groups < 1:
        raise InputError(f"{operator}: num_groups must be at least 1, but is {num_groups}")
    if group is None:
        return
    if group.dtype != torch.int64 or group.dim() != 1 or group.shape[0] != x.shape[0]:
        raise InputError(
            f"{operator}: group must be int64 of shape ({x.shape[0]},), one number per sample of x {_shape(x)}, "
            f"but is {group.dtype} of shape {_shape(group)}"
        )
    if group.device != x.device:
        raise InputError(f"{operator}: group is on {group.device}, but x is on {x.device}")
    if group.device.type == "cpu" and group.numel() and not torch.compiler.is_compiling():
        lowest, highest = (int(bound) for bound in group.aminmax())
        if lowest < 0 or highest >= num_groups:
            raise InputError(
                f"{operator}: group must hold numbers from 0 to {num_groups - 1}, but holds {lowest} to {highest}"
            )


def _check_coefficients(
    operator: str, x: Tensor, group: Tensor | None, num_groups: int | None = None, **coefficients: Tensor
) -> None:
    first_name, first = next(iter(coefficients.items()))
    rows = first.shape[0] if num_groups is None and first.dim() else num_groups
    for name, value in coefficients.items():
        if value.dim() != 2 or value.shape[0] != rows or value.shape[1] != x.shape[1]:
            raise InputError(
                f"{operator}: {name} must have shape (G, C), here ({rows}, {x.shape[1]}): one row per group and one "
                f"column per channel of x {_shape(x)}, but has shape {_shape(value)}"
            )
        if value.device != x.device:
            raise InputError(f"{operator}: {name} is on {value.device}, but x is on {x.device}")
        if not value.is_floating_point():
            raise InputError(f"{operator}: {name} must be floating point, but is {value.dtype}")
    if group is None and num_groups is None and rows != 1:
        raise InputError(f"{operator}: {first_name} {_shape(first)} has {rows} groups, but group is not given")


# ---- Shapes for tracing -------------------------------------------------------------------------------------------


def _moments_fake(x: Tensor, group: Tensor | None = None, num_groups: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    count = x.new_empty(num_groups, dtype=torch.float64)
    mean = x.new_empty(num_groups, x.shape[1], dtype=torch.float64)
    return count, mean, torch.empty_like(mean)


def _accumulate_fake(
    x: Tensor,
    count: Tensor,
    mean: Tensor,
    m2: Tensor,
    batch_mean: Tensor | None = None,
    batch_var: Tensor | None = None,
) -> None:
    return None


def _fold_fake(
    count: Tensor | None,
    mean: Tensor,
    spread: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    double: bool,
) -> tuple[Tensor, Tensor]:
    operands = [t for t in (mean, spread, weight, bias) if t is not None]
    rows = [t.shape[0] for t in operands if t.dim() == 2]
    scale = mean.new_empty(
        next((r for r in rows if r != 1), 1), mean.shape[-1], dtype=torch.float64 if double else torch.float32
    )
    return scale, torch.empty_like(scale)


def _track_fake(
    count: Tensor,
    mean: Tensor,
    m2: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    num_batches: Tensor,
    momentum: float | None,
) -> None:
    return None


def _normalize_fake(x: Tensor, scale: Tensor, shift: Tensor | None = None, group: Tensor | None = None) -> Tensor:
    return torch.empty_like(x)


def _backward_reduce_fake(
    dy: Tensor, x: Tensor, mean: Tensor, group: Tensor | None = None, num_groups: int = 1
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(mean), torch.empty_like(mean)


def _backward_fold_fake(
    count: Tensor | None,
    mean: Tensor,
    spread: Tensor,
    sum_dy: Tensor,
    sum_dy_xmu: Tensor,
    weight: Tensor | None,
    eps: float,
    double: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    shape = (1, *mean.shape)[-2:]
    a, b, c = (mean.new_empty(shape, dtype=torch.float64 if double else torch.float32) for _ in range(3))
    affine = mean.new_empty(mean.shape, dtype=torch.float64) if weight is None else weight
    grad_weight, grad_bias = (affine.new_empty(affine.shape) for _ in range(2))
    return a, b, c, grad_weight, grad_bias


def _backward_apply_fake(dy: Tensor, x: Tensor, a: Tensor, b: Tensor, c: Tensor, group: Tensor | None = None) -> Tensor:
    return torch.empty_like(x)


def _normalize_batch_fake(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    group: Tensor | None = None,
    num_groups: int = 1,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    groups = () if group is None else (num_groups,)
    count, mean, m2 = (x.new_empty(shape, dtype=torch.float64) for shape in (groups, *[(*groups, x.shape[1])] * 2))
    return torch.empty_like(x), count, mean, m2


def _backward_batch_fake(
    dy: Tensor,
    x: Tensor,
    count: Tensor | None,
    mean: Tensor,
    spread: Tensor,
    weight: Tensor | None,
    eps: float,
    group: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    affine = mean if weight is None else weight
    return torch.empty_like(x), affine.new_empty(affine.shape), affine.new_empty(affine.shape)


for _name, _fake in (
    ("moments", _moments_fake),
    ("accumulate", _accumulate_fake),
    ("fold", _fold_fake),
    ("track", _track_fake),
    ("normalize", _normalize_fake),
    ("backward_reduce", _backward_reduce_fake),
    ("backward_fold", _backward_fold_fake),
    ("backward_apply", _backward_apply_fake),
    ("normalize_batch", _normalize_batch_fake),
    ("backward_batch", _backward_batch_fake),
):
    torch.library.register_fake(f"precisebn::{_name}", _fake)
    if _name in _DIFFERENTIABLE:
        torch.library.register_fake(f"precisebn::_{_name}", _fake)


# ---- Derivatives --------------------------------------------------------------------------------------------------
# Every derivative is again one or two calls of the same operators plus arithmetic on (G, C) tensors, so derivatives of
# any order exist. `count` has none.


def _affine(x: Tensor, scale: Tensor, shift: Tensor | None, group: Tensor | None) -> Tensor:
    dtype = compute_dtype(x)
    result: Tensor = unchecked.normalize(x, scale.to(dtype), None if shift is None else shift.to(dtype), group)
    return result


def _products(a: Tensor, b: Tensor, like: Tensor, group: Tensor | None) -> tuple[Tensor, Tensor]:
    """``sum a`` and ``sum a * b`` per (group, channel), in the dtype of ``like (G, C)``."""
    origin = torch.zeros_like(like, dtype=torch.float64)
    sum_a, sum_ab = unchecked.backward_reduce(a, b, origin, group, like.shape[0])
    return sum_a.to(like.dtype), sum_ab.to(like.dtype)


def _moments_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, ctx.group, _ = inputs
    count, mean, _ = output
    ctx.mark_non_differentiable(count)
    ctx.save_for_backward(x, count, mean)


def _moments_backward(ctx: Any, _: Tensor, grad_mean: Tensor, grad_m2: Tensor) -> tuple[Tensor, None, None]:
    x, count, mean = ctx.saved_tensors
    slope = 2 * grad_m2
    shift = grad_mean / count.clamp(min=1).unsqueeze(-1) - slope * mean
    return _affine(x, slope, shift, ctx.group), None, None


def _normalize_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, scale, _, ctx.group = (*inputs, None, None)[:4]  # torch leaves out trailing defaults
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, scale)


def _normalize_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, scale = ctx.saved_tensors
    need_x, need_scale, need_shift = (*ctx.needs_input_grad, False)[:3]
    dx = _affine(dy, scale, None, ctx.group) if need_x else None
    dscale = dshift = None
    if need_scale or need_shift:
        dshift, dscale = _products(dy, dy if x is None else x, scale, ctx.group)
    return dx, dscale if need_scale else None, dshift if need_shift else None, None


def _backward_reduce_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    dy, x, mean, ctx.group, _ = inputs
    ctx.save_for_backward(dy, x, mean, output[0])


def _backward_reduce_backward(
    ctx: Any, grad_sum: Tensor, grad_product: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
    dy, x, mean, sum_dy = ctx.saved_tensors
    need_dy, need_x, need_mean = ctx.needs_input_grad[:3]
    grad_dy = _affine(x, grad_product, grad_sum - grad_product * mean, ctx.group) if need_dy else None
    grad_x = _affine(dy, grad_product, None, ctx.group) if need_x else None
    return grad_dy, grad_x, -grad_product * sum_dy if need_mean else None, None, None


def _backward_apply_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    dy, x, a, b, _, ctx.group = inputs
    ctx.save_for_backward(dy, x, a, b)


def _backward_apply_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    dy, x, a, b = ctx.saved_tensors
    need_dy, need_x, need_a, need_b, need_c = ctx.needs_input_grad[:5]
    grad_dy = _affine(grad, a, None, ctx.group) if need_dy else None
    grad_x = _affine(grad, b, None, ctx.group) if need_x else None
    grad_c, grad_a = _products(grad, dy, a, ctx.group) if need_a or need_c else (None, None)
    grad_b = _products(grad, x, b, ctx.group)[1] if need_b else None
    return grad_dy, grad_x, grad_a, grad_b, grad_c, None


torch.library.register_autograd("precisebn::moments", _moments_backward, setup_context=_moments_context)
torch.library.register_autograd("precisebn::normalize", _normalize_backward, setup_context=_normalize_context)
torch.library.register_autograd(
    "precisebn::backward_reduce", _backward_reduce_backward, setup_context=_backward_reduce_context
)
torch.library.register_autograd(
    "precisebn::backward_apply", _backward_apply_backward, setup_context=_backward_apply_context
)


# ---- The shared libraries -----------------------------------------------------------------------------------------


def _load(name: str) -> str:
    """Load a shared library that lies in the package. Returns why that failed, or an empty string."""
    path = Path(__file__).parents[1] / name
    if not path.exists():
        return f"{name} was not built"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{name} could not be loaded: {error.__cause__ or error}"
    return ""


def _load_libraries() -> tuple[str, str]:
    """Load what there is. Returns why the CPU and the CUDA kernels are not in use, empty where they are.

    Does not ask whether there is a CUDA device: that would initialize CUDA, and a process that has done so cannot fork
    workers that use it.
    """
    choice = os.environ.get("PRECISEBN_BACKEND", "auto")
    if choice not in ("auto", "native", "fallback"):
        raise InputError(f"PRECISEBN_BACKEND must be auto, native or fallback, but is {choice!r}")
    if choice == "fallback":
        return "PRECISEBN_BACKEND=fallback", "PRECISEBN_BACKEND=fallback"
    cpu_failure = _load("_C_cpu.so")
    cuda_failure = "torch has no CUDA" if torch.version.cuda is None else _load("_C_cuda.so")
    if choice == "native" and (cpu_failure or (torch.version.cuda is not None and cuda_failure)):
        raise ImportError(
            f"PRECISEBN_BACKEND=native, but {cpu_failure or cuda_failure}. Reinstall precisebn where a C++ compiler is "
            "available, or unset PRECISEBN_BACKEND"
        )
    return cpu_failure, cuda_failure


_cpu_failure, _cuda_failure = _load_libraries()
