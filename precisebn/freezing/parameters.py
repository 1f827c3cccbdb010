"""trainable_parameters: what to give an optimizer."""

from typing import Any, overload

from torch import nn

from precisebn.errors import InputError
from precisebn.models.families import is_norm_with_statistics
from precisebn.nn import CycleBatchNormList

__all__ = ["trainable_parameters"]

_NORMS = (CycleBatchNormList, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm)


@overload
def trainable_parameters(model: nn.Module) -> list[nn.Parameter]: ...
@overload
def trainable_parameters(model: nn.Module, *, weight_decay: float) -> list[dict[str, Any]]: ...
def trainable_parameters(
    model: nn.Module, *, weight_decay: float | None = None
) -> list[nn.Parameter] | list[dict[str, Any]]:
    """The parameters of a model that are to be trained, each once.

    Args:
        model: the model.
        weight_decay: makes two groups, of which one has this weight decay and the other, which holds the parameters of
            normalization layers and all biases, none. By owner and not by shape, so that an affine ``(K, C)`` of
            :class:`precisebn.nn.DomainSpecificBN` is among the latter, where rules for one-dimensional parameters
            (timm's ``param_groups_weight_decay``) miss it. Parameters of at most one dimension are too, as there.

    Returns:
        A list of parameters; or of groups, without empty ones. Both are what an optimizer takes.

    Raises:
        InputError: nothing is to be trained.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        >>> [len(group["params"]) for group in trainable_parameters(model, weight_decay=1e-4)]
        [1, 3]
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"model must be a module, not {type(model).__name__}")
    decays: dict[nn.Parameter, bool] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.requires_grad:
                without = (
                    is_norm_with_statistics(module)
                    or isinstance(module, _NORMS)
                    or parameter.dim() <= 1
                    or name == "bias"
                )
                decays[parameter] = decays.get(parameter, True) and not without
    if not decays:
        raise InputError(f"{type(model).__name__} has no parameter that requires a gradient: nothing is to be trained")
    if weight_decay is None:
        return list(decays)
    groups = [
        {"params": [p for p, decayed in decays.items() if decayed], "weight_decay": weight_decay},
        {"params": [p for p, decayed in decays.items() if not decayed], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
