"""FrozenBatchNorm: batch normalization with statistics that no training changes."""

from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy

from precisebn import ops
from precisebn._torch import is_scripting, is_tracing
from precisebn.errors import InputError
from precisebn.functional import frozen_batch_norm, portable
from precisebn.functional._frozen_batch_norm import frozen_batch_norm_unchecked
from precisebn.nn.norm import Norm

__all__ = ["FrozenBatchNorm1d", "FrozenBatchNorm2d", "FrozenBatchNorm3d", "FrozenNorm"]


class FrozenNorm(Norm):
    """Base of the FrozenBatchNorm classes, which differ in the inputs that they take."""

    _version = 3  # of detectron2's FrozenBatchNorm2d: running_var is without eps
    _dims: tuple[int, ...] = ()

    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        trainable_affine: bool = False,
    ) -> None:
        if not track_running_stats:
            raise InputError(f"{type(self).__name__}: track_running_stats=False leaves no statistics to normalize by")
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, bias=bias)
        self.trainable_affine = trainable_affine
        if affine and not trainable_affine:
            statistics = dict(self._buffers)
            self._buffers.clear()
            for name in ("weight", "bias"):
                value = self._parameters.pop(name)
                self.register_buffer(name, None if value is None else value.detach())
            self._buffers.update(statistics)  # after them: some pair two state dicts by position, as timm's ModelEma

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``(N, C, *)`` by the frozen statistics."""
        if is_scripting():  # which knows torch's own operators alone, and a little of Python
            mean, var, enabled = self.running_mean, self.running_var, torch.backends.cudnn.enabled
            return torch.batch_norm(x, self.weight, self.bias, mean, var, False, 0.0, self.eps, enabled)
        else:  # noqa: RET505  (or torch.jit.script would compile what follows)
            return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        if isinstance(x, Proxy):
            return portable.frozen_batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.eps)
        self._check(x)
        if torch.compiler.is_compiling():
            return frozen_batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        buffers = self._buffers  # not as attributes, which nn.Module looks for in vain at first, and slowly
        mean, var = buffers["running_mean"], buffers["running_var"]
        own = "weight" in buffers and "bias" in buffers
        weight, bias = (buffers["weight"], buffers["bias"]) if own else (self.weight, self.bias)
        assert mean is not None
        assert var is not None  # the constructor sees to it
        if x.dtype not in ops.DTYPES or x.device != mean.device:
            return frozen_batch_norm(x, mean, var, weight, bias, eps=self.eps)  # which says what is wrong
        return frozen_batch_norm_unchecked(x, mean, var, weight, bias, self.eps)

    def _check(self, x: Tensor) -> None:
        if (
            not isinstance(x, Tensor)
            or x.dim() not in self._dims
            or (not is_tracing() and x.shape[1] != self.num_features)  # whose graph is of any shape
        ):
            got = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise InputError(
                f"{type(self).__name__}({self.num_features}) takes tensors (N, {self.num_features}, *) of "
                f"{' or '.join(map(str, self._dims))} dimensions, got {got}"
            )

    def extra_repr(self) -> str:
        """As torch's, and whether the affine is trained."""
        return f"{super().extra_repr()}, trainable_affine={self.trainable_affine}"

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """Take the checkpoints of nn.BatchNorm, torchvision and detectron2, which differ in what they hold.

        detectron2 1 and Caffe2 hold weight and bias alone: an affine map. detectron2 2 holds a ``running_var`` to which
        eps has been added; nn.BatchNorm calls its format 2 as well, but counts mini-batches there, which tells the two
        apart. torchvision and detectron2 do not count mini-batches.
        """
        mean, var, tracked = (prefix + name for name in ("running_mean", "running_var", "num_batches_tracked"))
        version = local_metadata.get("version")
        holds_statistics = mean in state_dict or var in state_dict
        # Not where weight is a parameter: a checkpoint of the parameters alone must not touch the statistics.
        if prefix + "weight" in state_dict and not holds_statistics and version in (None, 1):
            if not self.trainable_affine:
                weight = state_dict[prefix + "weight"]
                state_dict[mean] = torch.zeros_like(weight, dtype=self.running_mean.dtype)
                state_dict[var] = torch.full_like(weight, 1.0 - self.eps, dtype=self.running_var.dtype)
        elif version == 2 and tracked not in state_dict and var in state_dict:
            state_dict[var] = (state_dict[var] - self.eps).clamp(min=0.0)
        if var in state_dict and tracked not in state_dict:
            state_dict[tracked] = state_dict[var].new_zeros((), dtype=torch.long)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args, **kwargs)


class FrozenBatchNorm1d(FrozenNorm):
    r"""Batch normalization of ``(N, C)`` or ``(N, C, L)`` with fixed statistics, in training too.

    .. math::
        y = \frac{x - \mathrm{running\_mean}}{\sqrt{\mathrm{running\_var} + \epsilon}}
            \cdot \mathrm{weight} + \mathrm{bias}

    See :class:`FrozenBatchNorm2d`.

    Example:
        >>> FrozenBatchNorm1d(8)(torch.ones(2, 8)).shape
        torch.Size([2, 8])
    """

    _dims = (2, 3)


class FrozenBatchNorm2d(FrozenNorm):
    r"""Batch normalization of ``(N, C, H, W)`` with fixed statistics, in training too.

    .. math::
        y = \frac{x - \mathrm{running\_mean}}{\sqrt{\mathrm{running\_var} + \epsilon}}
            \cdot \mathrm{weight} + \mathrm{bias}

    ("Rethinking 'Batch' in BatchNorm", arXiv 2105.07576, section 4, "population batch in training"; detectron2's and
    torchvision's ``FrozenBatchNorm2d``). ``.train()`` changes nothing about it, and no optimizer reaches the
    statistics. Weight and bias are fixed too, as buffers, or are parameters with ``trainable_affine=True``. With a
    fixed affine the input is not kept for backward. Gradients flow through to the layers before.

    Use it to fine-tune a pre-trained network with batches too small for good statistics (detection, segmentation), or
    for the last part of a training, when the statistics should stand still as they will in testing. Not from scratch:
    nothing keeps activations normalized while weights change.

    Args:
        num_features: C.
        eps: added to the variance.
        momentum: not used; kept for the way back to nn.BatchNorm.
        affine: whether there are weight and bias.
        track_running_stats: must be True.
        device: where everything lives.
        dtype: of weight, bias and statistics; half precision is possible, the arithmetic is that of float32.
        bias: whether an affine has a bias; it is a weight alone otherwise.
        trainable_affine: whether weight and bias are parameters.

    Shape:
        ``(N, C, H, W)``, float32, float64, float16 or bfloat16, to the same.

    State dict:
        The keys of ``nn.BatchNorm2d``, whose checkpoints load, and the other way round. So do those of torchvision's
        and of detectron2's FrozenBatchNorm2d of all versions, and Caffe2's, which hold weight and bias alone.

    Raises:
        InputError: wrong shape or dtype.

    Example:
        >>> bn = FrozenBatchNorm2d(8).train()
        >>> x = torch.randn(2, 8, 4, 4, requires_grad=True)
        >>> bn(x).sum().backward()
        >>> x.grad.shape, list(bn.parameters()), int(bn.num_batches_tracked)
        (torch.Size([2, 8, 4, 4]), [], 0)
    """

    _dims = (4,)


class FrozenBatchNorm3d(FrozenNorm):
    r"""Batch normalization of ``(N, C, D, H, W)`` with fixed statistics, in training too.

    .. math::
        y = \frac{x - \mathrm{running\_mean}}{\sqrt{\mathrm{running\_var} + \epsilon}}
            \cdot \mathrm{weight} + \mathrm{bias}

    See :class:`FrozenBatchNorm2d`.

    Example:
        >>> FrozenBatchNorm3d(8)(torch.ones(2, 8, 3, 4, 4)).shape
        torch.Size([2, 8, 3, 4, 4])
    """

    _dims = (5,)
