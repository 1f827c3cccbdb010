"""convert_shared_head: statistics for a head that feature levels share, and whose loop over them stays as it is."""

from functools import partial
from typing import Literal

from torch import nn

from precisebn.conversion.converters import to_class, to_cycle, to_domains
from precisebn.conversion.engine import replace_layers
from precisebn.conversion.towers import make_towers
from precisebn.errors import InputError
from precisebn.models.selection import ModuleSelection
from precisebn.nn import ConcatSharedBN

__all__ = ["convert_shared_head"]


def convert_shared_head(
    head: nn.Module,
    how: Literal["concat", "domain", "cycle"] = "concat",
    *,
    levels: int | None = None,
    include: ModuleSelection | None = None,
    exclude: ModuleSelection | None = None,
) -> nn.Module:
    """Mend the BatchNorm layers of a head that is called on several feature levels, and loops over them.

    A plain BatchNorm there normalizes each level by its own statistics in training, and by the average of all at test
    time, and the two disagree ("Rethinking 'Batch' in BatchNorm", arXiv 2105.07576, section 5.2). The heads of
    torchvision's RetinaNet and FCOS and of detectron2's RetinaNet are such; their code stays as it is, and so do the
    keys of their state dict, but for ``how="cycle"``.

    With ``"concat"`` and ``"domain"`` the first call of a tower of layers, an nn.Sequential that the loop calls on each
    level, runs it over all levels; the calls that follow get what is theirs. It must be called on the very tensors of
    the list that the head is called on, and once on each, or an error says so. The children of such an nn.Sequential
    are in a :class:`precisebn.nn.MultiInputSequential` afterwards, whose hooks see lists. Checkpoint and compile the
    model around it, not the head in training.

    Args:
        head: the module whose forward takes the levels, as a list, a tuple or a mapping of tensors, and loops over them
            or hands them to modules that do; it is changed.
        how: ``"concat"``: all levels are normalized together, by common statistics
            (:class:`precisebn.nn.ConcatSharedBN`); ``"domain"``: each by statistics of its own, weight and bias being
            shared (:class:`precisebn.nn.DomainSpecificBN`); ``"cycle"``: the same by counting calls, whatever they
            are called on, for heads without such towers (:class:`precisebn.nn.CycleBatchNormList`).
        levels: how many there are; must be said but for ``"concat"``, which takes any number if it is not.
        include: see :func:`replace_batchnorm`; frozen layers only if named one by one.
        exclude: which not.

    Returns:
        The head; :func:`convert_to_batchnorm` leads back, bit for bit.

    Raises:
        InputError: as :func:`replace_batchnorm`; wrong settings; a layer that is in no nn.Sequential; in the forward:
            another number of levels, or a tower that is not called on each of them once.

    Warns:
        UserWarning: there is nothing to convert.

    Example:
        >>> import torch
        >>> class Head(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.tower = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        ...         self.predict = nn.Conv2d(8, 4, 1)
        ...
        ...     def forward(self, levels):
        ...         return [self.predict(self.tower(features)) for features in levels]
        >>> head = convert_shared_head(Head())
        >>> outputs = head([torch.randn(2, 8, size, size) for size in (16, 8, 4)])
        >>> [tuple(y.shape) for y in outputs], int(head.tower[1].num_batches_tracked)
        ([(2, 4, 16, 16), (2, 4, 8, 8), (2, 4, 4, 4)], 1)
    """
    if how not in ("concat", "domain", "cycle"):
        raise InputError(f"how={how!r} must be 'concat', 'domain' or 'cycle'")
    if levels is None and how != "concat":
        raise InputError(f"how={how!r} needs levels=, the number of feature levels that the head is called on")
    if levels is not None and (isinstance(levels, bool) or not isinstance(levels, int) or levels < 1):
        raise InputError(f"levels={levels!r} must be a whole number, 1 or more, or None")
    if how == "cycle":
        assert levels is not None  # seen above
        conversion = to_cycle(levels)
    else:
        conversion = to_class(ConcatSharedBN) if levels is None or how == "concat" else to_domains(levels)
        conversion = conversion._replace(then=partial(make_towers, count=levels))
    return replace_layers(head, conversion, include, exclude)
