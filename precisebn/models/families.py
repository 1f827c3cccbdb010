"""Families of layers: which classes are BatchNorm, and what is known of each by the forward that it runs.

A hook that takes the statistics of a layer's input, and a conversion that drops the layer's own forward, are right only
where it is known what that forward does. Classes of other libraries are told by the module and the qualified name of
the forward that they run: that needs no import of those libraries, and it holds for subclasses that leave the forward
alone and for no others.
"""

import inspect
import math
from collections.abc import Sequence
from fnmatch import fnmatchcase
from functools import cache
from typing import NamedTuple, TypeGuard

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from precisebn.nn.cycle import CycleBatchNormList
from precisebn.nn.frozen import FrozenNorm
from precisebn.nn.population import STATISTICS, PopulationNorm, Recordable, RunningStatistics

__all__ = [
    "FROZEN",
    "OURS",
    "PAUSED",
    "Family",
    "class_family",
    "describe_forward",
    "family_of",
    "is_batch_norm",
    "is_frozen",
    "is_instance_norm",
    "is_norm_with_statistics",
    "normalizes_its_input",
    "populations_of",
    "tracking_code",
]


class Family(NamedTuple):
    """What is known of layers that run one of the forwards in this file's table.

    Attributes:
        normalizes_input: whether it normalizes the very tensor that it is called with, in eval mode by the running
            statistics as torch does; the modules of precisebn.nn know better themselves what they normalize.
        frozen: whether it keeps its statistics fixed.
        synchronized: whether it normalizes by the statistics of all ranks in training.
        tail: children that its forward applies to the normalized tensor, in this order.
    """

    normalizes_input: bool = True
    frozen: bool = False
    synchronized: bool = False
    tail: tuple[str, ...] = ()


_TIMM_TAIL = ("drop", "act")

# Module and qualified name of the forward, as patterns; the first that matches counts.
_FAMILIES = (
    ("torch.nn.modules.batchnorm", "_BatchNorm.forward", Family()),
    ("torch.nn.modules.batchnorm", "SyncBatchNorm.forward", Family(synchronized=True)),
    ("precisebn.nn.frozen", "FrozenNorm.forward", Family(frozen=True)),
    ("precisebn.nn.sync", "SyncBN.forward", Family(normalizes_input=False, synchronized=True)),
    ("precisebn.nn.*", "*.forward", Family(normalizes_input=False)),
    ("torchvision.ops.misc", "FrozenBatchNorm2d.forward", Family(frozen=True)),
    ("timm.*.norm_act", "BatchNormAct2d.forward", Family(tail=_TIMM_TAIL)),
    ("timm.*.norm_act", "SyncBatchNormAct.forward", Family(synchronized=True, tail=_TIMM_TAIL)),
    ("timm.*.norm_act", "FrozenBatchNormAct2d.forward", Family(frozen=True, tail=_TIMM_TAIL)),
    ("detectron2.layers.*", "BatchNorm2d.forward", Family()),
    ("detectron2.layers.batch_norm", "NaiveSyncBatchNorm.forward", Family(synchronized=True)),
    ("detectron2.layers.batch_norm", "FrozenBatchNorm2d.forward", Family(frozen=True)),
    ("apex.parallel.*sync_batchnorm", "SyncBatchNorm.forward", Family(synchronized=True)),
    ("transformers.models.*", "*FrozenBatchNorm2d.forward", Family(frozen=True)),
)

OURS = (PopulationNorm, FrozenNorm, CycleBatchNormList)
"""The modules of :mod:`precisebn.nn` that take the place of an nn.BatchNorm."""


def is_batch_norm(module: nn.Module) -> bool:
    """Whether a module is a layer that keeps population statistics: torch's classes, and what declares populations.

    A :class:`precisebn.nn.CycleBatchNormList` declares none: its members do. Frozen layers of other libraries do not,
    of whatever class: torch's quantized ones are of nn.BatchNorm's.
    """
    if isinstance(module, Recordable):
        return type(module).populations is not Recordable.populations
    return isinstance(module, FrozenNorm) or (isinstance(module, _BatchNorm) and not _is_quantized(module))


def is_norm_with_statistics(module: nn.Module) -> TypeGuard[_NormBase]:
    """Whether a module is of a class that can keep running statistics: BatchNorm, InstanceNorm, and ours."""
    return isinstance(module, _NormBase) and not _is_quantized(module)


def _is_quantized(module: nn.Module) -> bool:
    """Whether a module normalizes quantized tensors by its running statistics, in every mode."""
    return type(module).__module__.startswith(_QUANTIZED)


_QUANTIZED = ("torch.ao.nn.quantized.", "torch.ao.nn.intrinsic.quantized.")


def tracking_code(module: nn.Module) -> str:
    """What has compiled a module whose code tracks running statistics: ``"torch.jit"``, ``"torch.export"``, or nothing.

    Nothing that is put on such a module from outside changes that; a graph of torch.export has but one mode.
    """
    if isinstance(module, torch.jit.ScriptModule):
        return "torch.jit" if STATISTICS[0] in [name for name, _ in module._buffers.items()] else ""  # no dictionary
    if isinstance(module, fx.GraphModule) or type(module).__module__ == "torch.export.unflatten":
        graph = getattr(module, "graph", None)
        return "torch.export" if isinstance(graph, fx.Graph) and any(map(_tracks, graph.nodes)) else ""
    return ""


def _tracks(node: fx.Node) -> bool:
    """Whether a node is batch norm in training mode: torch's functions of that name all have the flag sixth."""
    is_batch_norm = node.op == "call_function" and "batch_norm" in str(node.target)
    return is_batch_norm and len(node.args) > 5 and node.args[5] is True


_INSTANCE_NORMS = (
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
    nn.LazyInstanceNorm1d,
    nn.LazyInstanceNorm2d,
    nn.LazyInstanceNorm3d,
)


def is_instance_norm(module: nn.Module) -> bool:
    """Whether a module is torch's InstanceNorm, which tracks averages over samples and counts no mini-batches."""
    return isinstance(module, _INSTANCE_NORMS)


FROZEN = "_precisebn_frozen"
"""The attribute by which :func:`precisebn.freeze` marks a module: what it was before."""

PAUSED = "_precisebn_paused"
"""The attribute by which :func:`precisebn.pause_tracking` marks a layer while it lasts."""


def is_frozen(layer: nn.Module) -> bool:
    """Whether a layer is of the FrozenBatchNorm classes, or one whose mode :func:`precisebn.freeze` holds."""
    record = vars(layer).get(FROZEN)
    return isinstance(layer, FrozenNorm) or (record is not None and record.training is not None)


def populations_of(layer: nn.Module) -> Sequence[RunningStatistics]:
    """The populations that a layer keeps: what it declares, or the buffers of an nn.BatchNorm; none without such.

    The eps is NaN where a class has it as a constant in its forward, as transformers' FrozenBatchNorm2d.
    """
    if isinstance(layer, Recordable):
        return layer.populations()
    mean, var, num_batches = map(layer._buffers.get, STATISTICS)
    if mean is None or var is None:
        return ()
    eps = vars(layer).get("eps")
    if eps is None:  # some subclasses compute it, or keep it as a buffer
        eps = float(getattr(layer, "eps", math.nan))
    return (RunningStatistics(mean, var, num_batches, eps),)


def family_of(layer: nn.Module) -> Family | None:
    """The family of a layer, or None where it is not known what its forward does."""
    attributes = vars(layer)
    if "forward" in attributes or attributes.get("fuse_relu") or attributes.get("channel_last"):  # the latter: apex's
        return None
    return class_family(layer)


def class_family(layer: nn.Module) -> Family | None:
    """The family of a layer by its class alone, whatever has been put on the instance."""
    return _lookup(*_forward(layer))


def normalizes_its_input(layer: nn.Module) -> bool:
    """Whether a layer is known to normalize the very tensor that it is called with, and nothing else."""
    family = family_of(layer)
    return family is not None and family.normalizes_input


def describe_forward(layer: nn.Module) -> str:
    """Where the forward of a layer comes from, for messages."""
    return "put on the instance" if "forward" in vars(layer) else ".".join(_forward(layer))


def _forward(layer: nn.Module) -> tuple[str, str]:
    """Module and qualified name of the forward of a layer's class."""
    try:
        forward = type(layer).forward
    except AttributeError:  # torch.jit's is computed, and for an instance only
        forward = inspect.getattr_static(type(layer), "forward")
    return getattr(forward, "__module__", None) or "?", getattr(forward, "__qualname__", "?")


@cache
def _lookup(module: str, name: str) -> Family | None:
    return next((family for m, n, family in _FAMILIES if fnmatchcase(module, m) and fnmatchcase(name, n)), None)
