"""freeze, unfreeze, frozen: parts of a model that no training changes.

``requires_grad = False`` does not freeze a BatchNorm layer: its running statistics are buffers, which every forward in
training mode moves; and ``.eval()`` is undone by the next ``model.train()`` of the training loop. A layer frozen here
stays in eval mode whoever calls ``train()``: an attribute of the instance stands in for that method. No class changes,
so that ``isinstance``, state dicts, compilation and export see the layer that they know.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from precisebn._warnings import warn
from precisebn.errors import InputError
from precisebn.models.families import FROZEN, is_batch_norm, is_norm_with_statistics, populations_of
from precisebn.models.interrupts import HeldBack
from precisebn.models.selection import listed, select
from precisebn.models.transaction import Transaction

__all__ = ["freeze", "frozen", "unfreeze"]


def freeze(model: nn.Module, *modules: str | nn.Module, affine: bool = False) -> nn.Module:
    """Freeze parts of a model: their parameters and the statistics of their BatchNorm layers stay as they are.

    Bit for bit, through any number of ``train()`` and ``eval()`` calls and of steps of an optimizer with momentum and
    weight decay. BatchNorm (and InstanceNorm with running statistics) normalizes by its running statistics from now on,
    in training too. Gradients still flow through to the layers before. Other modules, dropout say, keep their modes.
    deepcopy, pickle, ``load_state_dict`` and compilation leave frozen what is frozen.

    Freeze first, then make the optimizer (:func:`trainable_parameters`) and DistributedDataParallel.

    Args:
        model: the model, which is changed.
        modules: what to freeze: modules of the model, qualified names, glob patterns over qualified names, each
            standing for all that lies inside; none: the whole model.
        affine: go on training all parameters, weight and bias of BatchNorm among them, and freeze the statistics alone:
            FrozenBN of "Rethinking 'Batch' in BatchNorm" (arXiv 2105.07576, section 3.3).

    Returns:
        The model.

    Raises:
        InputError: something that matches no module of the model (the message has near misses); parameters to freeze
            in a model that DistributedDataParallel holds already, which waits for their gradients.

    Warns:
        UserWarning: a parameter is shared with a part that is not frozen, and now frozen there as well.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1))
        >>> before = model[1].running_mean.clone()
        >>> _ = freeze(model, "0", "1").train()
        >>> _ = model(torch.randn(4, 3, 8, 8))
        >>> torch.equal(model[1].running_mean, before), model[1].training, [p.requires_grad for p in model.parameters()]
        (True, False, [False, False, False, False, True, True])
        >>> _ = unfreeze(model)
        >>> model[1].training, all(p.requires_grad for p in model.parameters())
        (True, True)
    """
    _freeze(model, modules, affine)
    return model


def unfreeze(model: nn.Module, *modules: str | nn.Module) -> nn.Module:
    """Undo :func:`freeze`, of all of a model or of parts of it.

    What was trainable before is again, and nothing else; a layer is in the mode that it would be in had it never been
    frozen: as before, or as the last ``train()`` or ``eval()`` since said.

    Args:
        model: the model, which is changed.
        modules: what to unfreeze, as for :func:`freeze`; none: all that is frozen.

    Returns:
        The model.

    Raises:
        InputError: something that matches no module of the model.

    Warns:
        UserWarning: nothing there was frozen by :func:`freeze`.
    """
    chosen = _chosen(model, modules)
    marked = [module for module in chosen.values() if FROZEN in vars(module)]
    if not marked:
        others = [name for name, module in chosen.items() if is_norm_with_statistics(module) and not module.training]
        also = "; FrozenBatchNorm layers become BatchNorm by convert_to_batchnorm(model)" if others else ""
        warn(f"nothing was frozen by freeze(), so nothing is unfrozen{also}")
    with HeldBack(), Transaction() as changes:
        for module in marked:
            record: _Frozen = vars(module)[FROZEN]
            _thaw(module, _Part(frozenset(record.requires_grad), record.training is not None), changes)
    return model


@contextmanager
def frozen(model: nn.Module, *modules: str | nn.Module, affine: bool = False) -> Iterator[nn.Module]:
    """Within this block, parts of a model are frozen, see :func:`freeze`; what was frozen before stays so afterwards.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        >>> with frozen(model, "1"):
        ...     model.train()[1].training
        False
        >>> model[1].training
        True
    """
    parts = _freeze(model, modules, affine)
    try:
        yield model
    finally:
        with HeldBack(), Transaction() as changes:
            for module, part in parts.items():
                if FROZEN in vars(module):  # nobody has unfrozen it in between
                    _thaw(module, part, changes)


@dataclass
class _Frozen:
    """What a module was before it was frozen, in its attribute ``FROZEN``.

    Attributes:
        requires_grad: of its own parameters, by name.
        training: the mode that it would be in; None where its mode is not held.
    """

    requires_grad: dict[str, bool] = field(default_factory=dict)
    training: bool | None = None


class _Part(NamedTuple):
    """What one call has frozen of a module: parameters by name, and whether the mode."""

    parameters: frozenset[str]
    mode: bool


class _StaysInEval:
    """Stands in for ``train`` of a frozen layer: remembers the mode, and hands it on to what lies inside."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, mode: bool = True) -> nn.Module:
        vars(self.module)[FROZEN].training = mode
        for child in self.module.children():
            child.train(mode)
        return self.module


def _freeze(model: nn.Module, modules: Iterable[str | nn.Module], affine: bool) -> dict[nn.Module, _Part]:
    chosen = _chosen(model, modules)
    if not affine:
        _check_wrappers(model)
        _warn_of_shared(model, chosen)
    with HeldBack(), Transaction() as changes:
        return {module: _freeze_one(module, affine, changes) for module in chosen.values()}


def _chosen(model: nn.Module, modules: Iterable[str | nn.Module]) -> dict[str, nn.Module]:
    """All modules that the arguments stand for, by name."""
    if not isinstance(model, nn.Module):
        raise InputError(f"model must be a module, not {type(model).__name__}")
    items = list(modules)
    return select(model, items or None, argument="modules", what="module", is_layer=lambda module: True).chosen


def _keeps_statistics(module: nn.Module) -> bool:
    """Whether it has any now: in the buffers of a normalization layer, or under the names that it declares."""
    return (is_norm_with_statistics(module) or is_batch_norm(module)) and len(populations_of(module)) > 0


def _freeze_one(module: nn.Module, affine: bool, changes: Transaction) -> _Part:
    """Freeze a module's own parameters and statistics, as far as they are not frozen yet."""
    record: _Frozen = vars(module).get(FROZEN, _Frozen())
    own = {} if affine else {name: p for name, p in module._parameters.items() if p is not None}
    part = _Part(
        frozenset(own.keys() - record.requires_grad.keys()),
        record.training is None and _keeps_statistics(module),
    )
    if not part.parameters and not part.mode:
        return part
    requires_grad = record.requires_grad | {name: own[name].requires_grad for name in part.parameters}
    training = module.training if part.mode else record.training
    changes.put(vars(module), FROZEN, _Frozen(requires_grad, training))
    for name in part.parameters:
        parameter = own[name]
        changes.on_undo(parameter.requires_grad_, parameter.requires_grad)
        parameter.requires_grad_(False)
        changes.set(parameter, "grad", None)  # or an optimizer would go on with its momentum and weight decay
    if part.mode:
        changes.put(vars(module), "training", False)
        changes.put(vars(module), "train", _StaysInEval(module))
    return part


def _thaw(module: nn.Module, part: _Part, changes: Transaction) -> None:
    """Give back what one call has frozen."""
    record: _Frozen = vars(module)[FROZEN]
    for name in part.parameters & record.requires_grad.keys():
        parameter = module._parameters.get(name)
        if parameter is not None:
            changes.on_undo(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_(record.requires_grad[name])
    training = record.training
    if part.mode and training is not None:
        changes.put(vars(module), "training", training)
        changes.drop(vars(module), "train")
        training = None
    left = {name: was for name, was in record.requires_grad.items() if name not in part.parameters}
    if left or training is not None:
        changes.put(vars(module), FROZEN, _Frozen(left, training))
    else:
        changes.drop(vars(module), FROZEN)


def _check_wrappers(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, DistributedDataParallel):
            raise InputError(
                "DistributedDataParallel waits for the gradients of the parameters that it found trainable when it was "
                "made; freeze the model first, then wrap it (affine=True, which freezes statistics alone, works)"
            )


def _warn_of_shared(model: nn.Module, chosen: dict[str, nn.Module]) -> None:
    """A parameter in two places is frozen in both."""
    inside = set(chosen.values())
    frozen_ones = {id(p) for module in inside for p in module._parameters.values() if p is not None}
    shared: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if module not in inside and any(id(p) in frozen_ones for p in module._parameters.values()):
            shared[name] = module
    if shared:
        warn(f"parameters of other modules are shared, and frozen there too: {listed(shared)}")
