"""Towers: the parts of a head that its loop calls level by level, and that run over all levels at once.

    for features in levels: self.predict(self.tower(features))

A layer that normalizes all levels together has to see all of them before the first can go on, which such a loop does
not allow for. But the head itself is called on the list of levels. So a hook on the head notes the list; the first call
of a tower, on one of these very tensors, runs it over all of them (:class:`precisebn.nn.MultiInputSequential`); and
this and the calls that follow each get the result of their level. The loop, the gradients, and the state dict stay what
they are.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from precisebn._torch import in_backward
from precisebn.conversion.handover import carry_over, move_hooks, names_of, put_in_place
from precisebn.errors import InputError
from precisebn.models.transaction import Transaction
from precisebn.nn import MultiInputSequential
from precisebn.nn.multi_input import TakesLists

__all__ = ["LevelTower", "make_towers", "put_towers_back"]

_ORIGINAL = "_precisebn_container"  # of a container: the one in whose place it is, in a tuple, which is no submodule


class LevelTower(MultiInputSequential):
    """A MultiInputSequential that a loop over levels may call on one after the other; see this file.

    Where no layer in it needs the other levels (ConcatSharedBN in evaluation) it is :class:`nn.Sequential`.
    """

    def __init__(self, *layers: Any) -> None:
        super().__init__(*layers)
        self._levels, self._name = Levels(), ""  # of no head yet

    def forward(self, xs: Any) -> Any:
        """The tower's output for a level, or for a list of them."""
        if isinstance(xs, Sequence | Mapping) or not self._needs_all():
            return super().forward(xs)
        return self._levels.result(self, xs)  # also for a Proxy of torch.fx, which is never one of the levels

    def _needs_all(self) -> bool:
        return any(isinstance(part, TakesLists) and part.needs_all for part in self.modules())


@dataclass
class _Round:
    """A tower's outputs for all levels, and which of them have been handed out."""

    outputs: list[Tensor | None]
    versions: list[int] = field(default_factory=list)

    @property
    def num_left(self) -> int:
        return sum(output is not None for output in self.outputs)


class Levels(threading.local):
    """The levels that a head was called on, while its forward runs: for each thread its own, as replicas need it.

    Args:
        count: how many there have to be; None: any number.
    """

    def __init__(self, count: int | None = None) -> None:
        self.count = count
        self.tensors: list[Tensor] | None = None
        self.rounds: dict[LevelTower, _Round] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return Levels, (self.count,)  # a copy knows nothing of the forward that is running

    def begin(self, head: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Before the head's forward: note the first list of tensors among its arguments."""
        self.end()
        self.tensors = next((levels for levels in map(_tensors_of, (*args, *kwargs.values())) if levels), None)
        if self.tensors is not None and self.count not in (None, len(self.tensors)):
            raise InputError(
                f"the head {type(head).__name__} was converted for {self.count} levels, but is called on "
                f"{len(self.tensors)}; convert it again: convert_shared_head(head, ..., levels={len(self.tensors)})"
            )

    def end(self) -> None:
        """After the head's forward, however it has ended: forget everything."""
        self.tensors = None
        self.rounds = {}

    def check_all_handed_out(self, head: nn.Module) -> None:
        """Raise where levels have been normalized together with others whose output nobody has asked for."""
        for tower, done in self.rounds.items():
            if done.num_left:
                raise InputError(
                    f"{_shown(tower)} of the head {type(head).__name__} was called on "
                    f"{len(done.outputs) - done.num_left} of {len(done.outputs)} levels, but has normalized these by "
                    "the statistics of all; call the head on the list of those levels that it uses"
                )

    def result(self, tower: LevelTower, x: Tensor) -> Tensor:
        """The output of a tower for one of the levels."""
        places = self._places(tower, x)
        done = self.rounds.get(tower)
        if done is None or not done.num_left:
            assert self.tensors is not None  # x is one of them
            done = self.rounds[tower] = _Round(MultiInputSequential.forward(tower, self.tensors))
            done.versions = [_version(level) for level in self.tensors]
        k = next((k for k in places if done.outputs[k] is not None), None)
        if k is None:
            raise InputError(
                f"{_shown(tower)} was called twice on level {places[0]} before it was called on all; let the loop call "
                "it once on each level, or use how='cycle'"
            )
        if done.versions[k] != _version(x):
            raise InputError(
                f"level {k} was changed in place after {_shown(tower)} had run over all levels; change the levels "
                "before the head is called, or out of place"
            )
        y, done.outputs[k] = done.outputs[k], None
        assert y is not None
        return y

    def _places(self, tower: LevelTower, x: Tensor) -> list[int]:
        """Where in the list of levels a tensor is: in several places, if it has been given several times."""
        if torch.compiler.is_compiling():
            raise InputError(
                f"{_shown(tower)} of a shared head normalizes all levels together, across the calls of a loop, which "
                "torch.compile cannot see; leave the head out of compiled code (how='concat' compiles in evaluation "
                "mode, and what convert_to_batchnorm makes of it always)"
            )
        if self.tensors is None:
            repeated = " (a forward that activation checkpointing repeats: checkpoint the head as a whole)"
            raise InputError(
                f"{_shown(tower)} is called on one tensor{repeated if in_backward() else ''}, but the head that "
                "convert_shared_head has converted is not running, was called without a list of levels, or is compiled "
                "by torch.compile; convert the module whose forward takes the list and loops over it, leave it out of "
                "compiled code, or use how='cycle'"
            )
        places = [k for k, level in enumerate(self.tensors) if level is x]
        if not places:
            raise InputError(
                f"{_shown(tower)} is called on a tensor {tuple(x.shape)} that is none of the {len(self.tensors)} "
                "levels that its head was called on: the head does something to them before, and that cannot be done "
                "for all levels at once. Put it into the tower (nn.Sequential), or use how='cycle'"
            )
        return places


@dataclass(frozen=True)
class _Begin:
    """The hook before the head's forward. An object rather than a closure, so that models can be copied and saved."""

    levels: Levels

    def __call__(self, head: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.compiler.is_compiling():
            self.levels.begin(head, args, kwargs)


@dataclass(frozen=True)
class _End:
    """The hook after the head's forward, also where that raises; it then gets no output."""

    levels: Levels

    def __call__(self, head: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        try:
            if output is not None:
                self.levels.check_all_handed_out(head)
        finally:
            self.levels.end()


def make_towers(head: nn.Module, changes: Transaction, *, count: int | None) -> None:
    """Let a head whose BatchNorm layers take lists call them level by level.

    Raises:
        InputError: such a layer is not in an nn.Sequential, or in something else within one.
    """
    containers = list(_towers(head, "", head))
    hooks = [hook for hook in head._forward_pre_hooks.values() if isinstance(hook, _Begin)]
    if not containers and len(hooks) == 1 and hooks[0].levels.count == count:
        return  # as it should be
    put_towers_back(head, changes, even_if_needed=True)
    levels = Levels(count)
    twins: dict[nn.Module, nn.Module] = {}
    for name, tower in _towers(head, "", head):
        if tower not in twins:  # it may stand in several places
            twins[tower] = level_tower = _twin(tower, LevelTower(), changes)
            vars(level_tower).update(_levels=levels, _name=name)
    if not twins:
        return
    for part in [part for tower in twins for part in tower.modules()]:
        if part not in twins and _is_sequential(part) and _holds(part):
            twins[part] = _twin(part, MultiInputSequential(), changes)
    put_in_place(head, twins, changes)
    changes.on_undo(_unhook, head)
    head.register_forward_pre_hook(_Begin(levels), with_kwargs=True)
    head.register_forward_hook(_End(levels), always_call=True)


def put_towers_back(
    model: nn.Module, changes: Transaction, *, even_if_needed: bool = False
) -> dict[nn.Module, nn.Module]:
    """Put the containers that there were in the places of towers in which no layer takes lists any more.

    Returns:
        What has been put in the place of what.
    """
    originals: dict[nn.Module, nn.Module] = {}
    for module in model.modules():
        if _ORIGINAL in vars(module) and (even_if_needed or not _holds(module)):
            (original,) = vars(module)[_ORIGINAL]
            for own in ("_modules", "_parameters", "_buffers", "training"):
                changes.put(vars(original), own, vars(module)[own])
            carry_over(module, original, names_of(LevelTower()) | {_ORIGINAL}, changes)
            move_hooks(module, original, changes)
            originals[module] = original
    put_in_place(model, originals, changes)
    for module in model.modules():
        if _hooks_of(module) and not any(isinstance(part, LevelTower) for part in module.modules()):
            _unhook(module, changes)
    return originals


def _hooks_of(head: nn.Module) -> set[int]:
    """The ids of the hooks of this file that a module has."""
    hooks = {**head._forward_pre_hooks, **head._forward_hooks}
    return {id for id, hook in hooks.items() if isinstance(hook, _Begin | _End)}


def _unhook(head: nn.Module, changes: Transaction | None = None) -> None:
    """Take the hooks of this file off a module."""
    ours = _hooks_of(head)
    for place in (
        head._forward_pre_hooks,
        head._forward_pre_hooks_with_kwargs,
        head._forward_hooks,
        head._forward_hooks_always_called,
    ):
        if not ours.isdisjoint(place):
            kept = {id: value for id, value in place.items() if id not in ours}
            (changes or Transaction()).fill(place, kept)


def _twin(old: nn.Module, new: nn.Module, changes: Transaction) -> nn.Module:
    """A container of another class with the very children of an old one."""
    own = names_of(new)
    for place in ("_modules", "_parameters", "_buffers"):
        vars(new)[place] = vars(old)[place]
    new.training = old.training
    carry_over(old, new, own, changes)
    move_hooks(old, new, changes)
    vars(new)[_ORIGINAL] = (old,)
    return new


def _towers(head: nn.Module, name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The outermost nn.Sequentials around layers that take lists, by name; what takes lists already is none."""
    if isinstance(module, MultiInputSequential):
        return
    if module is head and _is_sequential(head) and _holds(head):
        raise InputError(
            f"the head given is an nn.Sequential, which a loop calls on one level after the other: {_WHAT_TO_PASS}"
        )
    for key, child in module._modules.items():
        path = f"{name}.{key}".lstrip(".")
        if child is None or not _holds(child):
            continue
        if isinstance(child, TakesLists):
            raise InputError(
                f"layer {path!r} is in no nn.Sequential that the head calls on a level, so that the levels cannot be "
                "brought together before it; put it and what comes before it into one, or use how='cycle'"
            )
        if _is_sequential(child) and not isinstance(child, MultiInputSequential):
            _check_inside(child, path)
            yield path, child
        else:
            yield from _towers(head, path, child)


_WHAT_TO_PASS = "pass the module whose forward takes the list of levels and loops over it, or use how='cycle'"


def _check_inside(tower: nn.Module, name: str) -> None:
    for key, child in tower._modules.items():
        if child is None or isinstance(child, TakesLists) or not _holds(child):
            continue
        if not _is_sequential(child):
            raise InputError(
                f"layer '{name}.{key}' ({type(child).__name__}) holds a BatchNorm layer, and has a forward of its own "
                "that takes one level at a time; make it an nn.Sequential, or use how='cycle'"
            )
        _check_inside(child, f"{name}.{key}")


def _is_sequential(module: nn.Module) -> bool:
    """Whether calling a module runs its children one after the other, and nothing else."""
    own = type(module).forward in (nn.Sequential.forward, MultiInputSequential.forward, LevelTower.forward)
    return isinstance(module, nn.Sequential) and own and "forward" not in vars(module)


def _holds(module: nn.Module) -> bool:
    return any(isinstance(part, TakesLists) for part in module.modules())


def _tensors_of(value: Any) -> list[Tensor]:
    """The tensors of a list, tuple or mapping of nothing else; none for anything else."""
    items = list(value.values()) if isinstance(value, Mapping) else value
    if not isinstance(items, Sequence) or isinstance(items, str) or not all(isinstance(x, Tensor) for x in items):
        return []
    return list(items)


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


def _shown(tower: LevelTower) -> str:
    return f"tower {tower._name!r}"
