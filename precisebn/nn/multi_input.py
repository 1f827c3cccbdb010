"""MultiInputSequential: a head that is shared by several inputs; and what its layers say of themselves."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.fx import Proxy

from precisebn.errors import InputError

__all__ = ["MultiInputSequential", "TakesLists"]


class TakesLists:
    """Mixed into modules that take a list of tensors, the inputs of a shared head, and return one: all at once.

    :class:`MultiInputSequential` hands them the whole list, and :func:`precisebn.convert_shared_head` has a loop over
    the levels wait for it.
    """

    @property
    def needs_all(self) -> bool:
        """Whether the output for one tensor depends, as the module stands, on the others or on its place."""
        return True


class MultiInputSequential(nn.Sequential):
    """Runs its layers over a list of tensors, layer by layer: every tensor goes through each before any goes on.

    Layers that normalize several tensors together or by their position (:class:`TakesLists`; :class:`ConcatSharedBN`
    and :class:`DomainSpecificBN` are such) and containers of this class get the whole list; every other layer is called
    on one tensor after the other, in order (so a :class:`CycleBatchNormList` makes one cycle). With a single tensor it
    is :class:`torch.nn.Sequential`. ("Rethinking 'Batch' in BatchNorm", arXiv 2105.07576, section 5.2, for heads that
    are shared by feature levels.) Parameters and state dict are those of ``nn.Sequential``.

    Shape:
        A list or tuple of tensors, to a list; or a tensor, to a tensor.

    Raises:
        InputError: the input is neither; or a layer that takes the whole list lies inside one that does not.

    Example:
        >>> import torch
        >>> from precisebn.nn import ConcatSharedBN
        >>> head = MultiInputSequential(nn.Conv2d(8, 8, 3, padding=1), ConcatSharedBN(8), nn.ReLU())
        >>> levels = [torch.randn(2, 8, size, size) for size in (16, 8, 4)]
        >>> [tuple(y.shape) for y in head(levels)]
        [(2, 8, 16, 16), (2, 8, 8, 8), (2, 8, 4, 4)]
    """

    def forward(self, xs: Any) -> Any:
        """Run all layers over a list of tensors, or over one tensor."""
        if isinstance(xs, Tensor | Proxy):
            return super().forward(xs)  # type: ignore[no-untyped-call]
        if not isinstance(xs, Sequence) or not all(isinstance(x, Tensor | Proxy) for x in xs):
            got = f"[{', '.join(type(x).__name__ for x in xs)}]" if isinstance(xs, list | tuple) else type(xs).__name__
            raise InputError(f"MultiInputSequential takes a tensor or a list of tensors, got {got}")
        ys = list(xs)
        for name, layer in self._modules.items():  # also those that stand in it twice, unlike named_children
            if isinstance(layer, TakesLists | MultiInputSequential):
                ys = layer(ys)
                continue
            if any(isinstance(part, TakesLists | MultiInputSequential) for part in layer.modules()):
                raise InputError(
                    f"layer {name!r} ({type(layer).__name__}) of MultiInputSequential holds a layer that takes all "
                    "tensors at once, but is itself called on one at a time; make it a MultiInputSequential too"
                )
            ys = [layer(y) for y in ys]
        return ys
