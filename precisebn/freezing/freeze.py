"""freeze, unfreeze, frozen: parts of a model that no training changes.

``requires_grad = False`` does not freeze a BatchNorm layer: its running statistics are buffers, which every forward in
training mode moves; and ``.eval()`` is undone by the next ``model.train()`` of the training loop. A layer frozen here
stays in eval mode whoever calls ``train()``: an attribute of the instance stands in for that method. No class changes,
so that ``isinstance``, state dicts, compilation and export see the layer that they know.
"""

import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from precisebn._warnings import warn
from precisebn.errors import InputError
from precisebn.models.families import (
    FROZEN,
    class_family,
    is_batch_norm,
    is_norm_with_statistics,
    populations_of,
    tracking_code,
)
from precisebn.models.interrupts import HeldBack, Undisturbed
from precisebn.models.selection import listed, select
from precisebn.models.transaction import Transaction
from precisebn.nn.population import STATISTICS

__all__ = ["freeze", "frozen", "unfreeze"]


def freeze(model: nn.Module, *modules: str | nn.Module, affine: bool = False) -> nn.Module:
    """Freeze parts of a model: their parameters and the statistics of their BatchNorm layers stay as they are.

    Bit for bit, through any number of ``train()`` and ``eval()`` calls and of steps of an optimizer with momentum and
    weight decay. BatchNorm (and InstanceNorm with running statistics) normalizes by its running statistics from now on,
    in training too. Gradients still flow through to the layers before. Other modules, dropout say, keep their modes.
    deepcopy, pickle, ``load_state_dict`` and compilation leave frozen what is frozen.

    Modules of other libraries stay in eval mode likewise if they have a ``running_mean`` or ``running_var``, be it a
    buffer, a parameter or an attribute. Statistics under other names, which nobody declares, are not known to be any.

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
            in a model that DistributedDataParallel holds already, which waits for their gradients; parameters of a lazy
            module that has not seen a mini-batch; running statistics in code of torch.jit, or
            moved by that of torch.export, whose mode cannot be held.

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
    with HeldBack(), _lock:
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
    with HeldBack(), _lock, Transaction() as changes:
        marked = [module for module in chosen.values() if FROZEN in vars(module)]
        if not marked:
            others = [
                name for name, module in chosen.items() if is_norm_with_statistics(module) and not module.training
            ]
            also = "; FrozenBatchNorm layers become BatchNorm by convert_to_batchnorm(model)" if others else ""
            warn(f"nothing was frozen by freeze(), so nothing is unfrozen{also}")
        for module in marked:
            record: _Frozen = vars(module)[FROZEN]
            _thaw(module, _Part(frozenset(record.requires_grad), record.training is not None), changes)
    return model


def frozen(model: nn.Module, *modules: str | nn.Module, affine: bool = False) -> Undisturbed[nn.Module]:
    """Within this block, parts of a model are frozen, see :func:`freeze`; what was frozen before stays so afterwards.

    Blocks nest, also of several threads that share the model: a part is frozen until the last of them has ended.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        >>> with frozen(model, "1"):
        ...     model.train()[1].training
        False
        >>> model[1].training
        True
    """
    return Undisturbed(_frozen, model, modules, affine)


def _frozen(
    interrupts: HeldBack, model: nn.Module, modules: Iterable[str | nn.Module], affine: bool
) -> Iterator[nn.Module]:
    with _lock:
        block = _freeze(model, modules, affine)
        _blocks.append(block)
    try:
        yield model
    finally:
        with _lock, Transaction() as changes:
            _blocks.remove(block)
            for module in block.thaws:
                part = block.leaves(module)
                if part and FROZEN in vars(module):  # nobody has unfrozen it in between
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


@dataclass(frozen=True)
class _Part:
    """A part of a module that is frozen, or is to be: parameters by name, and whether the mode."""

    parameters: frozenset[str]
    mode: bool

    def __bool__(self) -> bool:
        return bool(self.parameters) or self.mode

    def __and__(self, other: "_Part") -> "_Part":
        return _Part(self.parameters & other.parameters, self.mode and other.mode)

    def __or__(self, other: "_Part") -> "_Part":
        return _Part(self.parameters | other.parameters, self.mode or other.mode)

    def __sub__(self, other: "_Part") -> "_Part":
        return _Part(self.parameters - other.parameters, self.mode and not other.mode)


class _StaysInEval:
    """Stands in for ``train`` of a frozen layer: remembers the mode, and hands it on to what lies inside."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, mode: bool = True) -> nn.Module:
        vars(self.module)[FROZEN].training = mode
        for child in self.module.children():
            child.train(mode)
        return self.module


@dataclass(eq=False)
class _Block:
    """One block of :func:`frozen`.

    Attributes:
        wanted: what is frozen in it, of each module.
        thaws: what of that its end thaws: what it has frozen, and what a block has left to it that ended before.
    """

    wanted: dict[nn.Module, _Part]
    thaws: dict[nn.Module, _Part]

    def leaves(self, module: nn.Module) -> _Part:
        """What of a module is to be thawed now: what no other block wants, which takes over the rest."""
        part = self.thaws[module]
        for other in _blocks:
            if other is not self and module in other.wanted:
                shared = part & other.wanted[module]
                other.thaws[module] |= shared
                part -= shared
        return part


_blocks: list[_Block] = []
_lock = threading.RLock()
"""For what freezes and thaws: a warning on the way may run code of the user's."""


def _freeze(model: nn.Module, modules: Iterable[str | nn.Module], affine: bool) -> _Block:
    chosen = _chosen(model, modules)
    if not affine:
        _check_wrappers(model)
        _check_initialized(chosen)
        _warn_of_shared(model, chosen)
    _check_not_compiled(chosen)
    with Transaction() as changes:
        return _Block(
            {module: _wanted(module, affine) for module in chosen.values()},
            {module: _freeze_one(module, affine, changes) for module in chosen.values()},
        )


def _chosen(model: nn.Module, modules: Iterable[str | nn.Module]) -> dict[str, nn.Module]:
    """All modules that the arguments stand for, by name."""
    if not isinstance(model, nn.Module):
        raise InputError(f"model must be a module, not {type(model).__name__}")
    items = list(modules)
    return select(model, items or None, argument="modules", what="module", is_layer=lambda module: True).chosen


_AVERAGES = STATISTICS[:2]


def _keeps_statistics(module: nn.Module) -> bool:
    """Whether it has any now that its mode decides over: those that it declares, or what has torch's names."""
    if is_batch_norm(module) and len(populations_of(module)) > 0:
        return True
    family = class_family(module)
    never_moves = family is not None and family.frozen  # of another library
    own = {**vars(module), **dict(module.named_buffers(recurse=False)), **dict(module.named_parameters(recurse=False))}
    return not never_moves and any(own.get(name) is not None for name in _AVERAGES)


def _wanted(module: nn.Module, affine: bool) -> _Part:
    """What is to be frozen of a module: its own parameters, and the mode where that decides over statistics."""
    parameters = () if affine else (name for name, p in module._parameters.items() if p is not None)
    return _Part(frozenset(parameters), _keeps_statistics(module))


def _freeze_one(module: nn.Module, affine: bool, changes: Transaction) -> _Part:
    """Freeze a module's own parameters and statistics, as far as they are not frozen yet."""
    record: _Frozen = vars(module).get(FROZEN, _Frozen())
    part = _wanted(module, affine) - _Part(frozenset(record.requires_grad), record.training is not None)
    if not part:
        return part
    own = {name: p for name, p in module._parameters.items() if p is not None}
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
    own = dict(module._parameters.items())  # of torch.jit, no dictionary
    for name in part.parameters & record.requires_grad.keys():
        parameter = own.get(name)
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


def _check_initialized(chosen: dict[str, nn.Module]) -> None:
    for name, module in chosen.items():
        if any(p is not None and is_lazy(p) for p in module._parameters.values()):
            raise InputError(
                f"module {name!r} ({type(module).__name__}) is lazy, and has no parameters yet that could be frozen; "
                "run the model on a mini-batch before (affine=True, which freezes statistics alone, works)"
            )


def _check_not_compiled(chosen: dict[str, nn.Module]) -> None:
    for name, module in chosen.items():
        compiler = tracking_code(module)
        if compiler:
            raise InputError(
                f"module {name!r} is code of {compiler}, which keeps its mode where nobody can hold it, so that its "
                "running statistics would move on; freeze the module that it was made from, and run that"
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
