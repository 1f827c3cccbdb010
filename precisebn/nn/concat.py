"""ConcatSharedBN: several tensors normalized together, as if concatenated, without the concatenation."""

from collections.abc import Sequence
from typing import overload

from torch import Tensor
from torch.fx import Proxy

from precisebn.errors import InputError
from precisebn.functional import batch_norm
from precisebn.nn.population import PopulationNorm

__all__ = ["ConcatSharedBN"]


class ConcatSharedBN(PopulationNorm):
    r"""Batch normalization of several tensors by the statistics of all of them: list in, list out.

    For tensors :math:`x_1, \dots, x_L` that share a layer, such as the levels of a feature pyramid that go through the
    same head, with B the values of all of them:

    .. math:: y_l = \frac{x_l - \mathrm{mean}_B}{\sqrt{\mathrm{var}_B + \epsilon}} \cdot \mathrm{weight} + \mathrm{bias}

    ("Rethinking 'Batch' in BatchNorm", arXiv 2105.07576, section 5.2: statistics shared between the inputs of a shared
    layer, in training as at test time.) It equals flattening the tensors, concatenating, normalizing and splitting, and
    moves half as many bytes: Moments of each tensor merge. The running statistics are updated once a forward.

    Use it in a head that is shared by feature levels, with :class:`MultiInputSequential`. There a plain BatchNorm,
    called level by level, normalizes each level by its own statistics in training and by the average of all at test
    time, and the two disagree. Where levels differ by more than noise, :class:`DomainSpecificBN` keeps them apart.

    Args:
        num_features: C.
        eps: as in :class:`torch.nn.BatchNorm2d`, as are all the others.
        momentum: of the running statistics.
        affine: whether there are ``weight`` and ``bias``, ``(C,)``.
        track_running_stats: whether there are running statistics.
        device: where parameters and buffers live.
        dtype: theirs.
        bias: whether an affine has a bias; it is a weight alone otherwise.

    Shape:
        A list or tuple of tensors ``(N, C, *)``, whose other dimensions may differ, to a list; a single tensor, which
        is normalized alone, to a tensor. float32, float64, float16 or bfloat16.

    Raises:
        InputError: wrong input, or a single value per channel in all.

    Example:
        >>> import torch
        >>> bn = ConcatSharedBN(1, eps=0.0)
        >>> [y.item() for y in bn([torch.tensor([[1.0]]), torch.tensor([[3.0]])])]
        [-1.0, 1.0]
    """

    @overload
    def forward(self, xs: Tensor) -> Tensor: ...
    @overload
    def forward(self, xs: Sequence[Tensor]) -> list[Tensor]: ...
    def forward(self, xs: Tensor | Sequence[Tensor]) -> Tensor | list[Tensor]:
        """Normalize tensors together: in training by their common statistics, at test time by the running ones."""
        single = isinstance(xs, Tensor | Proxy)
        if not single and not isinstance(xs, Sequence):
            raise InputError(f"{self._shown()} takes a tensor or a list of tensors, got {type(xs).__name__}")
        tensors = [self.check(x) for x in ([xs] if single else xs)]
        if self.uses_batch_statistics:
            ys, moments = batch_norm(tensors, self.weight, self.bias, eps=self.eps)
            self.track(moments)
        else:
            ys = [self.frozen(x, self.weight, self.bias) for x in tensors]
        return ys[0] if single else ys
