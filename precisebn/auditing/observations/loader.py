"""LoaderLook: the first mini-batches of a loader, how many there are, and how they are drawn."""

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence, Sized
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, SequentialSampler

from precisebn.auditing.subject import Subject, Unobservable
from precisebn.auditing.surroundings import MOST_ITEMS, ObjectsPicture
from precisebn.models.nested import tensors_in
from precisebn.models.samples import num_samples
from precisebn.statistics.estimator import MIN_BLOCKS

__all__ = ["LoaderLook", "training_batch"]

LOOKED_AT = 2 * MIN_BLOCKS
"""How many mini-batches are looked at: enough for standard errors, few enough to keep."""


def training_batch(subject: Subject) -> Any:
    """The mini-batch that was given, or else the first of the loader.

    Raises:
        Unobservable: there is none.
    """
    return subject.batch if subject.batch is not None else subject.observe(LoaderLook).batches[0]


class LoaderLook:
    """The first mini-batches of the loader, read in this process, whatever workers it has.

    The loader, its samplers and its generators are put back, so that the next epoch draws what it would have drawn.

    Attributes:
        batches: the first mini-batches, at least one.
        sizes: samples in each of them.
        is_all: whether there are no others.
        last_size: samples in the last mini-batch of an epoch; None where that is not known.
        is_sequential: whether samples come in the order of the data set; None where it does not say.
    """

    def __init__(self, subject: Subject) -> None:
        loader: Any = subject.loader
        if loader is None:
            raise Unobservable("needs loader=")
        if isinstance(loader, Iterator):
            raise Unobservable(
                f"loader= is an iterator ({type(loader).__name__}), which an audit would use up; pass the DataLoader, "
                "or a list of its first mini-batches"
            )
        if used_up := ObjectsPicture([loader], tensors=False, most_items=MOST_ITEMS).iterators:
            raise Unobservable(
                f"loader= draws from an iterator ({type(used_up[0]).__name__}) that its data set or sampler keeps, and "
                "that an audit would use up; pass a list of its first mini-batches"
            )
        with subject.undisturbed() as interrupts:
            try:
                with interrupts.let_through():
                    first = list(itertools.islice(iter(_in_this_process(loader)), LOOKED_AT + 1))
            except Exception as error:
                raise Unobservable(
                    f"the loader raised {type(error).__name__}: {error}; pass one that can be read in this process, or "
                    "a list of mini-batches"
                ) from error
        if not first:
            raise Unobservable("the loader gives no mini-batch; pass one that does")
        self.is_all = len(first) <= LOOKED_AT
        self.batches: list[Any] = first[:LOOKED_AT]
        self.sizes = [num_samples(batch) for batch in self.batches]
        self.is_sequential: bool | None = None
        self.last_size = self.sizes[-1] if self.is_all else None
        if isinstance(loader, Sequence) and not self.is_all:
            self.last_size = num_samples(loader[-1])
        if isinstance(loader, DataLoader):
            self._look_at_sampling(loader)

    def labels(self) -> list[Tensor] | None:
        """The integer label of every sample, ``(N,)`` each mini-batch; None where not every mini-batch has such."""
        found = [_labels(batch, size) for batch, size in zip(self.batches, self.sizes, strict=True)]
        labels = [one for one in found if one is not None]
        return labels if len(labels) == len(found) else None

    def inputs(self) -> list[Tensor] | None:
        """The first floating-point tensor ``(N, C, *)`` of every mini-batch; None where not every one has such."""
        found = [next(filter(_is_data, tensors_in(batch)), None) for batch in self.batches]
        inputs = [one for one in found if one is not None]
        return inputs if len(inputs) == len(found) else None

    def _look_at_sampling(self, loader: "DataLoader[Any]") -> None:
        batches: Any = loader.batch_sampler  # of loaders that collate
        size: int | None = getattr(batches, "batch_size", loader.batch_size)
        sampler: Any = getattr(batches, "sampler", loader.sampler)
        if isinstance(sampler, SequentialSampler):
            self.is_sequential = True
        elif isinstance(loader.dataset, Sized):
            self.is_sequential = False
        drop_last = getattr(batches, "drop_last", loader.drop_last)
        try:
            number = len(sampler)  # a rank's part, with a DistributedSampler
        except (TypeError, NotImplementedError):
            return
        if isinstance(size, int) and size > 0:
            self.last_size = size if drop_last else (number % size or size)


def _in_this_process(loader: Any) -> Any:
    """The same mini-batches without worker processes: those that are there go on with what they are at."""
    if not isinstance(loader, DataLoader) or loader.num_workers == 0:
        return loader
    view = copy.copy(loader)
    vars(view).update(num_workers=0, prefetch_factor=None, persistent_workers=False, timeout=0, _iterator=None)
    return view


_LABELS = ("label", "labels", "target", "targets", "y", "domain", "domains")


def _labels(batch: Any, size: int) -> Tensor | None:
    """The label of every sample: a vector of whole numbers beside the samples, or under one of the usual names."""

    def is_label(tensor: Tensor) -> bool:
        return tensor.dtype in _WHOLE and tensor.shape == (size,)

    if isinstance(batch, Mapping):
        return next((v for k in _LABELS if isinstance(v := batch.get(k), Tensor) and is_label(v)), None)
    return next(filter(is_label, tensors_in(batch[1:])), None) if isinstance(batch, list | tuple) else None


_WHOLE = frozenset({torch.int64, torch.int32, torch.int16, torch.uint8})


def _is_data(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dim() >= 2
