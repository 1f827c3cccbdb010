"""The one engine under all conversions: other layers in the places of BatchNorm layers, and nothing else changed.

A new layer takes over from the old one: parameters and buffers themselves, where it has the same (so that an optimizer
made before keeps training the right tensors), and their values otherwise; mode, hooks, and whatever else has been put
on the old one. It remembers the old layer (:class:`precisebn.conversion.layers.Origin`), and the way back re-instates
that very layer with the values that the new one has by then. A conversion of a converted layer goes that way back
first.

All that is done to existing modules is done through a :class:`precisebn.models.transaction.Transaction`: whatever
fails, the model is then as it was. Ctrl-C is held back meanwhile, but for what runs in the factory of a user.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from precisebn._warnings import warn
from precisebn.conversion import layers
from precisebn.conversion.handover import Source, carry_over, hand_over, move_hooks, names_of, put_in_place, restore
from precisebn.conversion.layers import ORIGIN, Origin, describe, origin_of
from precisebn.conversion.towers import put_towers_back
from precisebn.errors import InputError
from precisebn.models.families import OURS, is_frozen
from precisebn.models.interrupts import HeldBack
from precisebn.models.selection import ModuleSelection, listed, select
from precisebn.models.transaction import Transaction

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
        model: the model, which is changed. For a slice of it say ``include=model[:8]``: the slice is another container.
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
        is_way_back: whether the new layers are what layers are at the outset, and have no origin.
        bn_class: what a layer for any number of dimensions is taken for, if it was not converted from anything.
        domain: the domain to keep of layers that have several; None requires them to be equal.
        then: what else has to be done to the model, once its layers are in place.
    """

    build: Callable[[str, _BatchNorm], nn.Module]
    is_done: Callable[[nn.Module], bool] = lambda layer: False
    takes_frozen: bool = False
    takes_others: bool = False
    any_forward: bool = False
    is_way_back: bool = False
    bn_class: type[_BatchNorm] = nn.BatchNorm2d
    domain: int | None = None
    then: Callable[[nn.Module, Transaction], None] | None = None


def replace_layers(
    model: nn.Module, conversion: Conversion, include: ModuleSelection | None, exclude: ModuleSelection | None
) -> nn.Module:
    """Convert the layers of a model; see :func:`replace_batchnorm`."""
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
        warn(_nothing_to_do(model, selection.found))
    chosen = {name: layer for name, layer in sources.items() if not conversion.is_done(layer)}
    layers.check_layers(chosen, model)
    if sources and conversion.domain is not None:
        _warn_without_domains(model, chosen, conversion.domain)
    replaced: dict[nn.Module, nn.Module] = {}
    with HeldBack() as interrupts, torch.no_grad(), Transaction() as changes:
        factory = _Factory(conversion, interrupts, set(model.modules()))
        for name, layer in chosen.items():
            replaced[layer] = _replacement(name, layer, factory, changes)
        put_in_place(model, replaced, changes)
        replaced |= put_towers_back(model, changes)
        if conversion.then is not None:
            conversion.then(model, changes)
        interrupts.deliver()  # one that has come is in time to undo all
    return replaced.get(model, model)


def _is_taken(layer: nn.Module, conversion: Conversion) -> bool:
    """Whether a conversion takes a layer that is not named."""
    if layers.recognized(layer).frozen or is_frozen(layer):
        return conversion.takes_frozen
    return conversion.takes_others or isinstance(layer, (_BatchNorm, *OURS))


def _nothing_to_do(model: nn.Module, found: Mapping[str, nn.Module]) -> str:
    shown = type(model).__name__
    if not found:
        return (
            f"{shown} has no BatchNorm layer, so nothing is converted; check that it is the model you mean, and not "
            "what torch.jit or torch.export has made of it"
        )
    return (
        f"nothing of {shown} is converted: of its layers, {listed(found)}, none is left by include= and exclude=, or "
        "those left are frozen or replaced: call convert_to_batchnorm first, or name each of them in include="
    )


def _warn_without_domains(model: nn.Module, chosen: Mapping[str, nn.Module], domain: int) -> None:
    if not any(Source(name, layer).has_domains for name, layer in chosen.items()):
        warn(
            f"domain={domain} chooses nothing: no layer of {type(model).__name__} that is converted has several "
            "domains; check that it is the model you mean, and that it has not been converted back already"
        )


# ---- One layer ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Factory:
    """What makes new layers: the conversion's ``build``, interruptible where it is the user's, and checked."""

    conversion: Conversion
    interrupts: HeldBack
    taken: set[nn.Module]

    def __call__(self, name: str, layer: nn.Module, base: _BatchNorm) -> nn.Module:
        """A module that is new, or ``base``: what a layer is, was, or has become."""
        if self.conversion.any_forward:
            with self.interrupts.let_through():
                new = self.conversion.build(name, base)
        else:
            with torch.inference_mode(False):  # layers made under inference_mode() could never be trained, or updated
                new = self.conversion.build(name, base)
        if not isinstance(new, nn.Module):
            raise InputError(f"the factory returned {new!r} for {describe(name, layer)}; it must return a module")
        if new is not base and new in self.taken:
            raise InputError(
                f"the factory returned for {describe(name, layer)} a module that is in use already; it must return a "
                "new one for every layer"
            )
        self.taken.add(new)
        return new


def _replacement(name: str, layer: nn.Module, factory: _Factory, changes: Transaction) -> nn.Module:
    """What takes the place of a layer: by way of the nn.BatchNorm that it is, was, or now becomes."""
    conversion, origin = factory.conversion, origin_of(layer)
    # What a conversion has made may have any forward, but none that was put on it later.
    if not conversion.any_forward and (origin is None or "forward" in vars(layer).keys() - origin.own):
        layers.check_forward(name, layer)
    if origin is not None:
        base = origin.layer
        restore(name, layer, origin, conversion.domain, changes)
    elif isinstance(layer, _BatchNorm):
        base = layer
    else:
        with torch.inference_mode(False):
            base = layers.plain_twin(layer, conversion.bn_class)
        hand_over([layer], base, Source(name, layer, conversion.domain), changes)
        _inherit(layer, base, changes)
    new = base if origin is not None and conversion.is_way_back else factory(name, layer, base)
    if new is base:
        return base
    if not conversion.any_forward:
        layers.check_forward(name, base)
    own = names_of(new)
    # What the layer itself has comes first: rows for several domains, buffers where the nn.BatchNorm has parameters.
    hand_over([layer, base], new, Source(name, base), changes)
    hooks = _inherit(base, new, changes)
    if not conversion.is_way_back:
        vars(new)[ORIGIN] = Origin(base, own, hooks, layers.settings_of(new))
    return new


def _inherit(old: nn.Module, new: nn.Module, changes: Transaction) -> frozenset[int]:
    """Give a new layer all of an old one but parameters and buffers; returns the ids of hooks that are its own."""
    for part in new.modules():
        changes.put(vars(part), "training", old.training)
    tail = tuple(key for key in layers.recognized(old).tail if key in old._modules and key not in new._modules)
    if not isinstance(old, OURS):  # theirs is their own, and means nothing elsewhere
        carry_over(old, new, names_of(new) | {ORIGIN}, changes)
    unsaved = vars(new)["_non_persistent_buffers_set"] | vars(old)["_non_persistent_buffers_set"]
    changes.put(vars(new), "_non_persistent_buffers_set", unsaved)
    if tail:
        new.register_forward_hook(Tail(tail))
    return move_hooks(old, new, changes)


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
