"""The one engine under all conversions: other layers in the places of BatchNorm layers, and nothing else changed.

A new layer takes over from the old one: parameters and buffers themselves, where it has the same (so that an optimizer
made before keeps training the right tensors), and their values otherwise; mode, hooks, and whatever else has been put
on the old one. It remembers the old layer (:class:`precisebn.conversion.layers.Memory`), and the way back re-instates
that very layer with the values that the new one has by then. A conversion of a converted layer goes that way back
first.

All that is done to existing modules is done through the functions at the end of this file, which note how to undo it;
whatever fails, the model is then as it was.
"""

import sys
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import _WrappedHook

from precisebn.conversion import layers
from precisebn.conversion.layers import MEMORY, Memory, describe, memory_of
from precisebn.errors import InputError
from precisebn.models.families import OURS
from precisebn.models.selection import ModuleSelection, listed, select
from precisebn.nn import CycleBatchNormList

__all__ = ["Conversion", "replace_batchnorm", "replace_layers"]


def replace_batchnorm(
    model: nn.Module,
    factory: Callable[[Any], nn.Module],
    *,
    include: ModuleSelection | None = None,
    exclude: ModuleSelection | None = None,
) -> nn.Module:
    """Replace the BatchNorm layers of a model, in place, by what a function of one's own makes of each.

    All conversions of precisebn are this with a factory of theirs. What they promise holds here too: the new layer gets
    the old one's parameters and buffers themselves where it has some of the same name, kind and shape, and their values
    in every row where it has one dimension more; the mode, all hooks, and what else has been put on the old one. Where
    the old layer applies more than its normalization, as the activation of timm's BatchNormAct2d, the new one goes on
    to apply it (by a forward hook). A layer in several places is replaced by one in all of them. Whatever fails, the
    model is as it was. :func:`precisebn.convert_to_batchnorm` leads back, bit for bit.

    Args:
        model: the model, which is changed.
        factory: called with each layer as an nn.BatchNorm (a subclass of any kind, with whatever forward; what was
            converted before comes as what it was before). Returns a new module; or the layer that it got, which stays.
        include: which layers: modules, qualified names and glob patterns, one or several, a container standing for all
            layers in it; default all. Frozen layers are passed over unless named one by one, by name or as a module:
            nothing is unfrozen by accident. So are layers that an earlier call made into something else than BatchNorm.
        exclude: which not.

    Returns:
        The model; or the new layer, where the model is itself a layer.

    Raises:
        InputError: something in ``include`` or ``exclude`` that is no layer of this model; a layer without values yet
            (lazy), with a computed weight (parametrized), or prepared for quantization; a model in
            DistributedDataParallel or FSDP; a factory that does not return new modules.

    Warns:
        UserWarning: there is nothing to replace.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        >>> weight = model[1].weight
        >>> model = replace_batchnorm(model, lambda bn: nn.GroupNorm(4, bn.num_features, eps=bn.eps))
        >>> type(model[1]).__name__, model[1].weight is weight
        ('GroupNorm', True)
    """
    if isinstance(factory, nn.Module) or not callable(factory):
        raise InputError(f"factory={factory!r} must be a function that takes a layer and returns a new one")
    conversion = Conversion(lambda name, layer: factory(layer), any_forward=True)
    return replace_layers(model, conversion, include, exclude)


class Conversion(NamedTuple):
    """What tells one conversion from another.

    Attributes:
        build: makes a new layer of a name and an nn.BatchNorm, or returns that one; raises InputError if it cannot.
        is_done: tells layers that are as they should be.
        takes_frozen: whether frozen layers are converted without being named.
        takes_others: whether layers are that an earlier replacement made into something else than BatchNorm.
        any_forward: whether a layer may have any forward, since ``build`` is the user's.
        is_way_back: whether the new layers are what layers are at the outset, and remember nothing.
        bn_class: what a layer for any number of dimensions is taken for, if it was not converted from anything.
        domain: the slot to keep of layers that have several; None requires them to be equal.
    """

    build: Callable[[str, _BatchNorm], nn.Module]
    is_done: Callable[[nn.Module], bool] = lambda layer: False
    takes_frozen: bool = False
    takes_others: bool = False
    any_forward: bool = False
    is_way_back: bool = False
    bn_class: type[_BatchNorm] = nn.BatchNorm2d
    domain: int | None = None


def replace_layers(
    model: nn.Module, conversion: Conversion, include: ModuleSelection | None, exclude: ModuleSelection | None
) -> nn.Module:
    """Convert the layers of a model; see :func:`replace_batchnorm`. Called by public functions only, for warnings."""
    if not isinstance(model, nn.Module):
        raise InputError(f"model must be a module, not {type(model).__name__}")
    layers.check_wrappers(model)
    selection = select(model, include, exclude, is_layer=layers.is_layer, outermost=True)
    sources = {
        name: layer
        for name, layer in selection.chosen.items()
        if layer in selection.named or _is_taken(layer, conversion)
    }
    if not sources:
        warnings.warn(_nothing_to_do(model, selection.found), UserWarning, stacklevel=3)
    chosen = {name: layer for name, layer in sources.items() if not conversion.is_done(layer)}
    layers.check_layers(chosen, model)
    taken, replaced = set(model.modules()), dict[nn.Module, nn.Module]()
    with torch.no_grad(), ExitStack() as undo:
        for name, layer in chosen.items():
            replaced[layer] = _replacement(name, layer, conversion, taken, undo)
        _put_in_place(model, replaced, undo)
        undo.pop_all()
    return replaced.get(model, model)


def _is_taken(layer: nn.Module, conversion: Conversion) -> bool:
    """Whether a conversion takes a layer that is not named."""
    if layers.recognized(layer).frozen:
        return conversion.takes_frozen
    return conversion.takes_others or isinstance(layer, (_BatchNorm, *OURS))


def _nothing_to_do(model: nn.Module, found: Mapping[str, nn.Module]) -> str:
    shown = type(model).__name__
    if not found:
        return (
            f"{shown} has no BatchNorm layer, so nothing is converted; check that it is the model you mean, and not "
            "one that torch.jit has compiled"
        )
    return (
        f"nothing of {shown} is converted: of its layers, {listed(found)}, none is left by include= and exclude=, or "
        "those left are frozen or replaced: call convert_to_batchnorm first, or name each of them in include="
    )


# ---- One layer ------------------------------------------------------------------------------------------------------


def _replacement(
    name: str, layer: nn.Module, conversion: Conversion, taken: set[nn.Module], undo: ExitStack
) -> nn.Module:
    """What takes the place of a layer: by way of the nn.BatchNorm that it is, was, or now becomes."""
    memory = memory_of(layer)
    if not conversion.any_forward and (memory is None or isinstance(layer, OURS)):
        layers.check_forward(name, layer)
    if memory is not None:
        base = memory.layer
        _restore(name, layer, memory, conversion.domain, undo)
    elif isinstance(layer, _BatchNorm):
        base = layer
    else:
        base = layers.plain_twin(layer, conversion.bn_class)
        _hand_over([layer], base, undo, _Slot(name, layer, conversion.domain))
        _succeed(layer, base, undo)
    new = base if memory is not None and conversion.is_way_back else conversion.build(name, base)
    if not isinstance(new, nn.Module):
        raise InputError(f"the factory returned {new!r} for {describe(name, layer)}; it must return a module")
    if new is base:
        return base
    if new in taken:
        raise InputError(
            f"the factory returned for {describe(name, layer)} a module that is in use already; it must return a new "
            "one for every layer"
        )
    taken.add(new)
    if not conversion.any_forward:
        layers.check_forward(name, base)
    own = _names(new)
    # What the layer itself has comes first: rows for several domains, buffers where the nn.BatchNorm has parameters.
    _hand_over([layer, base], new, undo, _Slot(name, base))
    hooks = _succeed(base, new, undo)
    if not conversion.is_way_back:
        vars(new)[MEMORY] = Memory(base, own, hooks, layers.settings_of(new))
    return new


def _restore(name: str, layer: nn.Module, memory: Memory, domain: int | None, undo: ExitStack) -> None:
    """Make the layer that another one was what it would be, had it been there all the time."""
    base = memory.layer
    _hand_over([layer], base, undo, _Slot(name, layer, domain))
    for key, value in layers.settings_of(layer).items() - memory.settings.items():  # changed since
        _put(vars(base), key, value, undo)
    _put(vars(base), "training", layer.training, undo)
    _carry(layer, base, memory.own | {MEMORY}, undo)
    for hooks in (vars(layer)[key] for key in _HOOKS):
        if memory.hooks & hooks.keys():
            _fill(hooks, {id: hook for id, hook in hooks.items() if id not in memory.hooks}, undo)
    _move_hooks(layer, base, undo)


def _succeed(old: nn.Module, new: nn.Module, undo: ExitStack) -> frozenset[int]:
    """Give a new layer all of an old one but parameters and buffers; returns the ids of hooks that are its own."""
    for part in new.modules():
        _put(vars(part), "training", old.training, undo)
    tail = tuple(key for key in layers.recognized(old).tail if key in old._modules and key not in new._modules)
    if not isinstance(old, OURS):  # theirs is their own, and means nothing elsewhere
        _carry(old, new, _names(new) | {MEMORY}, undo)
    unsaved = vars(new)["_non_persistent_buffers_set"] | vars(old)["_non_persistent_buffers_set"]
    _put(vars(new), "_non_persistent_buffers_set", unsaved, undo)
    if tail:
        new.register_forward_hook(Tail(tail))
    return _move_hooks(old, new, undo)


@dataclass(frozen=True)
class Tail:
    """The forward hook that applies what a layer's own forward applied to the normalized tensor, or to each of a list.

    Attributes:
        children: names of the layer's children, in order.
    """

    children: tuple[str, ...]

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Apply the children to the output."""
        if isinstance(output, list | tuple):
            return [self(module, args, y) for y in output]
        for name in self.children:
            output = module.get_submodule(name)(output)
        return output


def _names(layer: nn.Module) -> frozenset[str]:
    """Names of all attributes, parameters, buffers and children."""
    return frozenset().union(vars(layer), layer._parameters, layer._buffers, layer._modules)


# The instance's forward and the compiled form of its call would run the old layer; the rest is of nn.BatchNorm itself.
_NOT_CARRIED = frozenset({"forward", "_compiled_call_impl"}) | _names(nn.BatchNorm2d(1))


def _carry(old: nn.Module, new: nn.Module, but: frozenset[str], undo: ExitStack) -> None:
    """Carry over the attributes, parameters, buffers and children that go by other names than ``but``."""
    for source, target in (
        (vars(old), vars(new)),
        (old._parameters, new._parameters),
        (old._buffers, new._buffers),
        (old._modules, new._modules),
    ):
        for key in [key for key in source if key not in but | _NOT_CARRIED]:
            _put(target, key, source[key], undo)


# ---- Hooks ----------------------------------------------------------------------------------------------------------

_HOOKS = tuple(key for key, value in vars(nn.Module()).items() if "_hooks" in key and isinstance(value, dict))


def _move_hooks(old: nn.Module, new: nn.Module, undo: ExitStack) -> frozenset[int]:
    """Let a new layer have the hooks of an old one, after its own; returns the ids of its own.

    The dictionaries themselves move, since handles, by which users remove their hooks, refer to those; and hooks that
    are bound to the old layer are bound to the new one.
    """
    own_ids: set[int] = set()
    for key in _HOOKS:
        hooks, own = vars(old)[key], vars(new)[key]
        if own is not hooks:
            if own:
                own_ids |= own.keys()
                _fill(hooks, {**own, **hooks}, undo)
            _put(vars(new), key, hooks, undo)
        for hook in hooks.values():
            if isinstance(hook, _WrappedHook) and hook.with_module and hook.module() is old:
                _put(vars(hook), "module", weakref.ref(new), undo)
    _put(vars(new), "_is_full_backward_hook", old._is_full_backward_hook, undo)
    return frozenset(own_ids)


# ---- Parameters and buffers -----------------------------------------------------------------------------------------

# Those of nn.BatchNorm, with the number of dimensions that one slot has.
_DIMS = {"weight": 1, "bias": 1, "running_mean": 1, "running_var": 1, "num_batches_tracked": 0}


class _Slot(NamedTuple):
    """Where values come from: a layer, by name, and which of its slots; None requires them to be equal."""

    name: str
    layer: nn.Module
    domain: int | None = None

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
        if not all(_same_bits(values[0], value) for value in values[1:]):
            raise InputError(
                f"{describe(self.name, self.layer)} has {len(values)} domains, whose {key} differ, where nn.BatchNorm "
                "has one; say which to keep, convert_to_batchnorm(model, domain=k), or leave the layer out, exclude="
            )
        return values[0] if values else None

    def _values(self, key: str) -> Sequence[Tensor]:
        members = list(self.layer) if isinstance(self.layer, CycleBatchNormList) else []
        found: list[Tensor] = [place[key] for layer in (self.layer, *members) for place in _places(layer, key)]
        if len(found) == 1 and found[0].dim() > _DIMS[key]:
            return found[0].unbind()
        return found


def _places(layer: nn.Module, key: str) -> list[dict[str, Any]]:
    """Where a layer keeps a parameter or buffer: nowhere, or in one of the two."""
    return [place for place in (layer._parameters, layer._buffers) if place.get(key) is not None]


def _hand_over(donors: Sequence[nn.Module], target: nn.Module, undo: ExitStack, slot: _Slot) -> None:
    """Give a layer what belongs in its parameters and buffers: a donor's own where it is alike, or else the values."""
    members = list(target) if isinstance(target, CycleBatchNormList) else []
    for key in _DIMS:
        value = slot.value(key)
        if value is None:
            continue
        for place in _places(target, key):
            same = _same(donors, place[key], key)
            if same is not None:
                _put(place, key, same, undo)
                continue
            _write(place[key], value, undo)
            source = slot.layer._parameters.get(key)
            if source is not None and isinstance(place[key], nn.Parameter):
                undo.callback(place[key].requires_grad_, place[key].requires_grad)
                place[key].requires_grad_(source.requires_grad)
        for member in members:  # each has statistics of its own, which will part from the others'
            for place in _places(member, key):
                _write(place[key], value, undo)


def _same(donors: Sequence[nn.Module], own: Tensor, key: str) -> Tensor | None:
    """The parameter or buffer of the first donor that has one of the same kind and shape."""
    for donor in donors:
        for place in _places(donor, key):
            tensor: Tensor = place[key]
            if isinstance(tensor, nn.Parameter) == isinstance(own, nn.Parameter) and tensor.shape == own.shape:
                return tensor
    return None


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one dtype are equal, NaN being equal to NaN, and 0 not to -0."""
    return a.is_meta or torch.equal(*(t.detach().contiguous().view(-1).view(torch.uint8) for t in (a, b)))


# ---- Changes, each with how to undo it ------------------------------------------------------------------------------


def _put(place: dict[str, Any], key: str, value: object, undo: ExitStack) -> None:
    if key in place:
        undo.callback(place.__setitem__, key, place[key])
    else:
        undo.callback(place.pop, key, None)
    place[key] = value


def _fill(place: dict[Any, Any], content: dict[Any, Any], undo: ExitStack) -> None:
    undo.callback(_refill, place, dict(place))
    _refill(place, content)


def _refill(place: dict[Any, Any], content: dict[Any, Any]) -> None:
    place.clear()
    place.update(content)


def _write(tensor: Tensor, value: Tensor, undo: ExitStack) -> None:
    """Give a tensor a value, in every row if it has one dimension more, and its dtype and device; it stays itself."""
    if tensor.shape not in (value.shape, tensor.shape[:1] + value.shape):
        return  # of the user's, and something else than in nn.BatchNorm
    value = value.detach().expand(tensor.shape)
    if tensor.dtype == value.dtype and tensor.device == value.device:
        if not _same_bits(tensor, value):  # or a graph that awaits its backward would be out of date for nothing
            undo.callback(tensor.copy_, tensor.clone())
            tensor.copy_(value)
        return
    undo.callback(setattr, tensor, "data", tensor.data)
    tensor.data = value.clone()
    if tensor.grad is not None:
        undo.callback(setattr, tensor, "grad", tensor.grad)
        tensor.grad = tensor.grad.to(value)


def _put_in_place(model: nn.Module, replaced: dict[nn.Module, nn.Module], undo: ExitStack) -> None:
    """Put new layers in every place where old ones are."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child in replaced:
                _put(parent._modules, name, replaced[child], undo)
                if "torch._dynamo" in sys.modules and isinstance(parent, torch._dynamo.OptimizedModule):
                    undo.callback(vars(parent).update, forward=vars(parent)["forward"])  # it calls the old layer
                    parent._initialize()
