"""What conversions know of layers: which there are, what they were made from, and which cannot be replaced.

A layer that is replaced no longer runs its own forward, so what that forward does must be known
(:mod:`precisebn.models.families`).
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from precisebn.errors import InputError
from precisebn.models.families import FROZEN, OURS, PAUSED, Family, class_family, describe_forward, family_of
from precisebn.models.in_use import why_not_free
from precisebn.nn.frozen import FrozenBatchNorm1d, FrozenBatchNorm2d, FrozenBatchNorm3d, FrozenNorm
from precisebn.nn.population import Recordable

__all__ = [
    "ORIGIN",
    "Origin",
    "check_forward",
    "check_layers",
    "check_wrappers",
    "describe",
    "frozen_class",
    "is_layer",
    "origin_of",
    "parts_of",
    "placement",
    "plain_class",
    "plain_twin",
    "recognized",
    "settings_of",
]


ORIGIN = "_precisebn_origin"
"""The attribute of a converted layer that holds its :class:`Origin`."""


class Origin(NamedTuple):
    """What a converted layer was made from. As a tuple it is no submodule: state dicts hold nothing of it.

    Attributes:
        layer: the very layer, which shares parameters, buffers and hooks with the one in its place where it can.
        own: names of what the new layer had when it was made; what else it has was the old one's, or was put on it.
        hooks: ids of the hooks that it brought.
        settings: its numbers at that time, see :func:`settings_of`.
    """

    layer: _BatchNorm
    own: frozenset[str]
    hooks: frozenset[int]
    settings: dict[str, Any]


def origin_of(layer: nn.Module) -> Origin | None:
    """What a layer was made from, if a conversion made it."""
    origin: Origin | None = vars(layer).get(ORIGIN)
    return origin


def recognized(layer: nn.Module) -> Family:
    """The family of a layer by its class alone, whatever has been put on the instance; a plain one if unknown."""
    return class_family(layer) or Family()


def is_layer(module: nn.Module) -> bool:
    """Whether a conversion may look at a module.

    BatchNorm layers, those of precisebn.nn, frozen ones of other libraries, and whatever has replaced one of them. What
    lies inside such a layer, as the members of a CycleBatchNormList do, is part of it.
    """
    return isinstance(module, (_BatchNorm, *OURS)) or recognized(module).frozen or origin_of(module) is not None


def describe(name: str, layer: nn.Module) -> str:
    """A layer as messages name it."""
    return f"layer {name!r} ({type(layer).__name__})" if name else f"the {type(layer).__name__} given"


def parts_of(layer: nn.Module) -> Sequence[nn.Module]:
    """Where a layer keeps its settings and statistics: in itself, or in members, one for each domain."""
    members = layer.members() if isinstance(layer, Recordable) else ()
    return members or (layer,)


def settings_of(layer: nn.Module) -> dict[str, Any]:
    """What users change in a layer that is there: those settings that mean the same in every BatchNorm layer."""
    member = parts_of(layer)[0]
    if not isinstance(member, (_BatchNorm, *OURS)):
        return {}
    return {key: getattr(member, key) for key in ("eps", "momentum", "track_running_stats")}


def plain_twin(layer: nn.Module, bn_class: type[_BatchNorm]) -> _BatchNorm:
    """A new nn.BatchNorm with the settings of a layer that is none and was none; its values are still to come.

    Args:
        layer: of precisebn.nn, or a frozen one of another library.
        bn_class: what a layer becomes that takes any number of dimensions.
    """
    member = parts_of(layer)[0]
    affine = layer._parameters.get("weight", layer._buffers.get("weight"))
    mean = member._buffers.get("running_mean")
    like = mean if mean is not None else affine
    return plain_class(member, nn.BatchNorm2d if recognized(layer).frozen else bn_class)(
        like.shape[-1] if like is not None else vars(member)["num_features"],
        eps=vars(member).get("eps", 1e-5),  # transformers' have that number in their forward
        momentum=vars(member).get("momentum", 0.1),
        affine=affine is not None,
        track_running_stats=mean is not None,
        **placement(like),
    )


def placement(like: Tensor | None) -> dict[str, Any]:
    """Device and dtype to build a layer with, whose values are those of a tensor."""
    return {} if like is None else {"device": like.device, "dtype": like.dtype}


_FROZEN_OF = {
    nn.BatchNorm1d: FrozenBatchNorm1d,
    nn.BatchNorm2d: FrozenBatchNorm2d,
    nn.BatchNorm3d: FrozenBatchNorm3d,
}


def plain_class(layer: nn.Module, otherwise: type[_BatchNorm]) -> type[_BatchNorm]:
    """nn.BatchNorm1d, 2d or 3d, whichever a layer is or has been made of; another where it is for any dimensions."""
    return next((bn for bn, frozen in _FROZEN_OF.items() if isinstance(layer, bn | frozen)), otherwise)


def frozen_class(layer: nn.Module, bn_class: type[_BatchNorm]) -> type[FrozenNorm]:
    """The FrozenBatchNorm class of a layer's number of dimensions; of that of ``bn_class``, where it takes any."""
    plain = plain_class(layer, bn_class)
    return next(frozen for bn, frozen in _FROZEN_OF.items() if issubclass(plain, bn))


def check_wrappers(model: nn.Module) -> None:
    """Raise where a wrapper holds on to the tensors of the layers that it found when it was made."""
    for name, module in model.named_modules():
        for wrapper in type(module).__mro__:
            if wrapper.__name__ in _HOLDING_WRAPPERS and wrapper.__module__.startswith("torch."):
                raise InputError(
                    f"{wrapper.__name__}{f' at {name!r}' if name else ''} manages the tensors of the layers that it "
                    "found when it was made; convert the model first, then wrap it"
                )


_HOLDING_WRAPPERS = frozenset({"DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule"})


def check_layers(chosen: Mapping[str, nn.Module], model: nn.Module) -> None:
    """Raise for a layer whose tensors cannot be handed over, or whose place in the model cannot be taken."""
    quantized = _inside_quantized(model)
    for name, layer in chosen.items():
        shown = describe(name, layer)
        tensors = {**layer._parameters, **layer._buffers}
        if FROZEN in vars(layer):
            raise InputError(
                f"{shown} is frozen by precisebn.freeze, which would stay with the layer that leaves; unfreeze it, "
                "convert, and freeze it again, or leave the layer out: exclude="
            )
        if PAUSED in vars(layer):
            raise InputError(
                f"{shown} is paused by precisebn.pause_tracking, which would not end for the layer in its place; "
                "convert the model outside of that block"
            )
        if (doing := why_not_free(layer)) is not None:
            raise InputError(f"{shown} {doing}")
        if any(tensor is not None and is_lazy(tensor) for tensor in tensors.values()):
            raise InputError(f"{shown} has no values yet; run one forward of the model, then convert it")
        if isinstance(layer, (_BatchNorm, *OURS)) and not {"weight", "bias"} <= tensors.keys():
            raise InputError(
                f"{shown} has a weight or bias that is computed (by torch.nn.utils.parametrize, spectral_norm, "
                "weight_norm or prune); remove that first, as with parametrize.remove_parametrizations, or leave the "
                "layer out: exclude="
            )
        if layer in quantized:
            raise InputError(
                f"{shown} is part of a model that is prepared for quantization, whose modules read the attributes of "
                "their BatchNorm layers; convert the model first, then prepare it"
            )


_OBSERVERS = ("torch.ao.quantization.observer", "torch.ao.quantization.fake_quantize", "torchao.quantization")


def _inside_quantized(model: nn.Module) -> set[nn.Module]:
    """All modules of a model that has observers, and what lies in modules that torch.ao has put around layers."""
    inside: set[nn.Module] = set()
    for module in model.modules():
        origins = [cls.__module__ for cls in type(module).__mro__]
        if any(origin.startswith(_OBSERVERS) for origin in origins):
            return set(model.modules())
        if any(origin.startswith("torch.ao.nn.") for origin in origins):
            inside.update(module.modules())
    return inside


def check_forward(name: str, layer: nn.Module) -> None:
    """Raise for a layer that may do something else than normalize its input."""
    if family_of(layer) is None:
        raise InputError(
            f"{describe(name, layer)} has a forward of its own, {describe_forward(layer)}, which a conversion would "
            "drop; leave the layer out, exclude=, or say yourself what takes its place: "
            "precisebn.replace_batchnorm(model, factory)"
        )
