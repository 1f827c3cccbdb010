"""Undo: the running statistics that a recalibration has replaced, kept to be put back bit for bit.

What is kept is the statistics alone, before and after: the latter tell whether somebody has changed them since, as a
forward in training mode does. Layers are referred to weakly, so that a report, kept for the record, keeps no model
alive; and the bits of what they were are looked for where the layer keeps them *now*, which is another place once the
model has been moved to another device or dtype, or a checkpoint was loaded by assignment.
"""

import weakref
from collections.abc import Collection, Iterable, Sequence
from itertools import chain
from typing import Any, NamedTuple

from torch import Tensor, nn

from precisebn._reports import quoted
from precisebn.errors import UndoError
from precisebn.models.copies import Copies
from precisebn.models.families import populations_of
from precisebn.models.in_use import claim, release
from precisebn.models.interrupts import HeldBack
from precisebn.models.tensor_pictures import same_bits
from precisebn.models.transaction import Transaction
from precisebn.nn.population import RunningStatistics
from precisebn.recalibration.recording import RecordedPopulation

__all__ = ["Undo"]


class Undo:
    """How to undo one recalibration; of nothing, until :meth:`note_old`.

    A copy, by deepcopy or pickle, can undo nothing: it does not know the model, and would only take its memory.
    """

    def __init__(self) -> None:
        self._model: weakref.ref[nn.Module] | None = None
        self._places: list[_Place] = []
        self._old = self._new = Copies()
        self.is_needed = False
        """Whether a recalibration has been done, for good, and has not been undone."""

    def note_old(self, model: nn.Module, populations: Iterable[RecordedPopulation]) -> None:
        """Keep the statistics that are about to be replaced."""
        populations = list(populations)
        self._model = weakref.ref(model)
        tensors = [_tensors(one.statistics) for one in populations]
        self._places = [
            _Place(one.name, weakref.ref(one.layer), one.statistics.index or 0, len(own))
            for one, own in zip(populations, tensors, strict=True)
        ]
        self._old = Copies(list(chain.from_iterable(tensors)))

    def note_new(self, populations: Iterable[RecordedPopulation]) -> None:
        """Keep those that have been written in their place."""
        self._new = Copies(list(chain.from_iterable(_tensors(one.statistics) for one in populations)))

    def put_back(self, force: bool = False) -> None:
        """Put the old statistics back, in place: those of all layers, or of none.

        Args:
            force: also where they have been changed since; passing over layers that are no longer there.

        Raises:
            UndoError: statistics have been changed since, or layers converted or removed; nothing was kept, or all has
                been put back already.
            InputError: the model, or a part of it, is being recalibrated just now.
        """
        if self._model is None:
            raise UndoError(
                "this report does not know the model, as no copy of a report does, by deepcopy or pickle: call undo() "
                "of the report that the recalibration has returned"
            )
        with HeldBack():
            if not self.is_needed:
                raise UndoError("this recalibration has been undone already")
            layers = [layer for place in self._places if (layer := place.layer()) is not None]
            try:
                claim(self, dict.fromkeys(layers), name="the model", doing="is just being put back by undo()")
                found = self._found()
                if not force:
                    self._check(found)
                with Transaction() as changes:
                    for tensor, old in zip(found, self._old, strict=True):
                        if tensor is not None:
                            changes.write(tensor, old)
                self.is_needed = False
                self._old = self._new = Copies()
            finally:
                release(self)

    def _found(self) -> list[Tensor | None]:
        """Where each of the old tensors belongs now; None where that is no longer there."""
        model = None if self._model is None else self._model()
        # A wrapper, or a slice of a model, made for the call alone is gone by now: then every layer counts as part.
        modules = None if model is None else set(model.modules())
        olds, found = iter(self._old), list[Tensor | None]()
        for place in self._places:
            tensors = place.tensors(modules)
            own = [next(olds) for _ in range(place.number)]
            fits = len(tensors) == len(own) and all(a.shape == b.shape for a, b in zip(tensors, own, strict=True))
            found += tensors if fits else [None] * len(own)
        return found

    def _check(self, found: Sequence[Tensor | None]) -> None:
        """Raise unless all is as the recalibration has left it, but for what moves the model does to it."""
        gone, changed = dict[str, None](), dict[str, None]()
        names = [place.name for place in self._places for _ in range(place.number)]
        for name, tensor, new in zip(names, found, self._new, strict=True):
            if tensor is None:
                gone[name] = None
            elif not same_bits(tensor, new.to(tensor.device, tensor.dtype)):
                changed[name] = None
        reasons = []
        if changed:
            reasons.append(
                f"the statistics of {_listed(changed)} have been changed since, by forwards in training mode, another "
                "recalibration or a checkpoint: undo(force=True) puts back all the same what was before"
            )
        if gone:
            reasons.append(
                f"{_listed(gone)}: no longer in the model, or with statistics of another form, as after a conversion; "
                "undo before that, or undo(force=True), which passes over what is gone"
            )
        if reasons:
            raise UndoError(f"nothing was put back: {'; and '.join(reasons)}")

    def __reduce__(self) -> tuple[Any, ...]:
        """For copies of every kind."""
        return Undo, ()


class _Place(NamedTuple):
    """Where one population is kept."""

    name: str
    layer: "weakref.ref[nn.Module]"
    population: int
    """Its index in the layer."""
    number: int
    """Of tensors: mean, variance and, where they are counted, mini-batches."""

    def tensors(self, modules: "set[nn.Module] | None") -> list[Tensor]:
        """Those that the layer has now, if it is one of the modules of the model."""
        layer = self.layer()
        if layer is None or (modules is not None and layer not in modules):
            return []
        populations = populations_of(layer)
        return _tensors(populations[self.population]) if self.population < len(populations) else []


def _tensors(statistics: RunningStatistics) -> list[Tensor]:
    mean, var, num_batches = statistics.mean, statistics.var, statistics.num_batches
    return [mean, var] if num_batches is None else [mean, var, num_batches]


def _listed(names: Collection[str]) -> str:
    return ("layer " if len(names) == 1 else "layers ") + quoted(list(names))
