"""ConcatSharedBN: several tensors normalized together, as if concatenated, without the concatenation."""

import weakref
from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor
from torch.fx import Proxy

from precisebn._torch import in_backward
from precisebn._warnings import warn
from precisebn.errors import InputError
from precisebn.functional import batch_norm
from precisebn.nn.multi_input import TakesLists
from precisebn.nn.population import PopulationNorm

__all__ = ["ConcatSharedBN"]


class ConcatSharedBN(TakesLists, PopulationNorm):
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

    Warns:
        UserWarning: in training it is called on a second tensor before the backward of the first, as a loop over levels
            calls it: then each is normalized alone. Once for a layer; not in compiled code, nor without gradients. Of
            calls that are meant to be normalized apart, as of two views of an image, it is a false alarm: take
            nn.BatchNorm for these.

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
            if self not in _warned:
                self._watch(ys[0] if single else None)
        else:
            ys = [self.frozen(x, self.weight, self.bias) for x in tensors]
        return ys[0] if single else ys

    @property
    def needs_all(self) -> bool:
        """Only where batch statistics are those of all."""
        return self.uses_batch_statistics

    def _watch(self, y: Tensor | None) -> None:
        """Warn of single tensors, one after the other, that belong to one step: one backward is still to come for all.

        A single one is no mistake: the layer is then what nn.BatchNorm is.
        """
        if torch.compiler.is_compiling() or in_backward():
            return
        last = _last_single.pop(self, None)
        before = None if last is None else last()
        if not isinstance(y, Tensor) or not y.requires_grad:
            return
        if before is not None and not before.has_run:
            _warned.add(self)
            warn(
                f"{self._shown()} is called on one tensor after the other before a backward: in training it then "
                "normalizes each by its own statistics, as nn.BatchNorm does. To normalize them together, call it on "
                "a list of all: MultiInputSequential runs a head over a list, and precisebn.convert_shared_head(head, "
                "how='concat') lets a head do so whose loop over feature levels stays as it is"
            )
            return
        backward = _Backward()
        y.register_hook(backward)
        _last_single[self] = weakref.ref(backward)


class _Backward:
    """A hook on the output of a call, alive as long as the graph of that call."""

    has_run = False

    def __call__(self, grad: Tensor) -> None:
        self.has_run = True


# Beside the layers, not in them: no state that a copy, a pickle or a comparison of two models would see.
_last_single: "weakref.WeakKeyDictionary[ConcatSharedBN, weakref.ref[_Backward]]" = weakref.WeakKeyDictionary()
_warned: "weakref.WeakSet[ConcatSharedBN]" = weakref.WeakSet()
