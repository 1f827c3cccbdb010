"""What a module hands over to the one that takes its place: parameters, buffers, mode, attributes, children, hooks.

All of it goes through a :class:`precisebn.models.transaction.Transaction`, so that whatever fails later, both modules
are then as they were.
"""

import sys
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _WrappedHook

from precisebn.conversion.layers import ORIGIN, Origin, describe, parts_of, settings_of
from precisebn.errors import InputError
from precisebn.models.families import OURS
from precisebn.models.tensor_pictures import same_bits
from precisebn.models.transaction import Transaction
from precisebn.nn import DomainSpecificBN

__all__ = ["Source", "carry_over", "hand_over", "move_hooks", "names_of", "put_in_place", "restore"]


def restore(name: str, layer: nn.Module, origin: Origin, domain: int | None, changes: Transaction) -> None:
    """Make the layer that another one was made from what it would be, had it been there all the time."""
    base = origin.layer
    hand_over([layer], base, Source(name, layer, domain), changes)
    for key, value in settings_of(layer).items() - origin.settings.items():  # changed since
        changes.put(vars(base), key, value)
    changes.put(vars(base), "training", layer.training)
    carry_over(layer, base, origin.own | {ORIGIN}, changes)
    for hooks in (vars(layer)[key] for key in _HOOKS):
        if origin.hooks & hooks.keys():
            changes.fill(hooks, {id: hook for id, hook in hooks.items() if id not in origin.hooks})
    move_hooks(layer, base, changes)


def put_in_place(model: nn.Module, replaced: Mapping[nn.Module, nn.Module], changes: Transaction) -> None:
    """Put new modules in every place where old ones are."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and child in replaced:
                changes.put(parent._modules, name, replaced[child])
                if "torch._dynamo" in sys.modules and isinstance(parent, torch._dynamo.OptimizedModule):
                    changes.put(vars(parent), "forward", vars(parent)["forward"])  # it calls the old module
                    parent._initialize()


# ---- Attributes -----------------------------------------------------------------------------------------------------


def names_of(module: nn.Module) -> frozenset[str]:
    """Names of all attributes, parameters, buffers and children."""
    return frozenset().union(vars(module), module._parameters, module._buffers, module._modules)


# The instance's forward and the compiled form of its call would run the old module; the rest is of nn.BatchNorm itself.
_NOT_CARRIED = frozenset({"forward", "_compiled_call_impl"}) | names_of(nn.BatchNorm2d(1))


def carry_over(old: nn.Module, new: nn.Module, but: frozenset[str], changes: Transaction) -> None:
    """Carry over the attributes, parameters, buffers and children that go by other names than ``but``."""
    for source, target in (
        (vars(old), vars(new)),
        (old._parameters, new._parameters),
        (old._buffers, new._buffers),
        (old._modules, new._modules),
    ):
        for key in [key for key in source if key not in but | _NOT_CARRIED]:
            changes.put(target, key, source[key])


# ---- Hooks ----------------------------------------------------------------------------------------------------------

_HOOKS = tuple(key for key, value in vars(nn.Module()).items() if "_hooks" in key and isinstance(value, dict))


def move_hooks(old: nn.Module, new: nn.Module, changes: Transaction) -> frozenset[int]:
    """Let a new module have the hooks of an old one, after its own; returns the ids of its own.

    The dictionaries themselves move, since handles, by which users remove their hooks, refer to those; and hooks that
    are bound to the old module are bound to the new one.
    """
    own_ids: set[int] = set()
    for key in _HOOKS:
        hooks, own = vars(old)[key], vars(new)[key]
        if own is not hooks:
            if own:
                own_ids |= own.keys()
                changes.fill(hooks, {**own, **hooks})
            changes.put(vars(new), key, hooks)
        for hook in hooks.values():
            if isinstance(hook, _WrappedHook) and hook.with_module and hook.module() is old:
                changes.put(vars(hook), "module", weakref.ref(new))
    changes.put(vars(new), "_is_full_backward_hook", old._is_full_backward_hook)
    return frozenset(own_ids)


# ---- Parameters and buffers -----------------------------------------------------------------------------------------

# Those of nn.BatchNorm, with the number of dimensions that they have in a layer of one domain.
_DIMS = {"weight": 1, "bias": 1, "running_mean": 1, "running_var": 1, "num_batches_tracked": 0}


class Source(NamedTuple):
    """Where values come from: a layer, by name, and which of its domains; None requires them to be equal."""

    name: str
    layer: nn.Module
    domain: int | None = None

    @property
    def has_domains(self) -> bool:
        """Whether the layer tells domains apart."""
        tells_apart = isinstance(self.layer, DomainSpecificBN) or self.layer not in parts_of(self.layer)
        return tells_apart or any(self._is_of_domains(key) for key in _DIMS)

    def value(self, key: str) -> Tensor | None:
        """The value of a parameter or buffer, if the layer has it.

        Raises:
            InputError: there are several, and no domain is given; or they are fewer.
        """
        values = self._values(key)
        if len(values) > 1 and self.domain is not None:
            if self.domain >= len(values):
                raise InputError(
                    f"domain={self.domain}: {describe(self.name, self.layer)} has domains 0 to {len(values) - 1}"
                )
            return values[self.domain]
        if not all(same_bits(values[0], value) for value in values[1:]):
            raise InputError(
                f"{describe(self.name, self.layer)} has {len(values)} domains, whose {key} differ, where nn.BatchNorm "
                "has one; say which to keep, convert_to_batchnorm(model, domain=k), or leave the layer out, exclude="
            )
        return values[0] if values else None

    def _values(self, key: str) -> Sequence[Tensor]:
        found = self._found(key)
        return found[0].unbind() if len(found) == 1 and self._is_of_domains(key) else found

    def _is_of_domains(self, key: str) -> bool:
        found, mean = self._found(key), self._found("running_mean")
        has_rows = isinstance(self.layer, OURS) or (bool(mean) and mean[0].dim() > 1)  # not the weight of a Linear
        return len(found) > 1 or (has_rows and len(found) == 1 and found[0].dim() > _DIMS[key])

    def _found(self, key: str) -> list[Tensor]:
        layers = dict.fromkeys((self.layer, *parts_of(self.layer)))
        return [place[key] for layer in layers for place in _places(layer, key)]


def hand_over(donors: Sequence[nn.Module], target: nn.Module, source: Source, changes: Transaction) -> None:
    """Give a layer what belongs in its parameters and buffers: a donor's own where it is alike, or else the values."""
    members = [part for part in parts_of(target) if part is not target]
    for key in _DIMS:
        value = source.value(key)
        if value is None:
            continue
        for place in _places(target, key):
            same = _same(donors, place[key], key)
            if same is not None:
                changes.put(place, key, same)
                continue
            _write(place, key, value, changes)
            parameter = source.layer._parameters.get(key)
            if parameter is not None and isinstance(place[key], nn.Parameter):
                changes.set(place[key], "requires_grad", parameter.requires_grad)
        for member in members:  # each has statistics of its own, which will part from the others'
            for place in _places(member, key):
                _write(place, key, value, changes)


def _places(layer: nn.Module, key: str) -> list[dict[str, Any]]:
    """Where a layer keeps a parameter or buffer: nowhere, or in one of the two."""
    return [place for place in (layer._parameters, layer._buffers) if place.get(key) is not None]


def _same(donors: Sequence[nn.Module], own: Tensor, key: str) -> Tensor | None:
    """The parameter or buffer of the first donor that has one of the same kind and shape."""
    for donor in donors:
        for place in _places(donor, key):
            tensor: Tensor = place[key]
            if isinstance(tensor, nn.Parameter) == isinstance(own, nn.Parameter) and tensor.shape == own.shape:
                return tensor
    return None


def _write(place: dict[str, Any], key: str, value: Tensor, changes: Transaction) -> None:
    """Give a tensor a value, in every row if it has one dimension more, and its dtype and device; it stays itself.

    But on the meta device, where none could ever have values: ``load_state_dict(assign=True)`` puts others there, too.
    """
    tensor: Tensor = place[key]
    if tensor.shape not in (value.shape, tensor.shape[:1] + value.shape):
        return  # of the user's, and something else than in nn.BatchNorm
    value = value.detach().expand(tensor.shape)
    if tensor.dtype == value.dtype and tensor.device == value.device:
        if not same_bits(tensor, value):  # or a graph that awaits its backward would be out of date for nothing
            changes.write(tensor, value)
        return
    grad = tensor.grad
    if grad is not None:
        changes.set(tensor, "grad", None)  # a gradient must be of the dtype of its tensor, on the way and back
    with torch.inference_mode(False):  # else nothing could write into it any more
        value = value.clone()
    if tensor.is_meta != value.is_meta:
        is_parameter = isinstance(tensor, nn.Parameter)
        changes.put(place, key, nn.Parameter(value, tensor.requires_grad) if is_parameter else value)
        return
    changes.set(tensor, "data", value)
    if grad is not None:
        changes.set(tensor, "grad", grad.to(value))
