"""How many samples a mini-batch holds: what conventions say, and where they say nothing that is certain."""

from collections import namedtuple
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence

from precisebn import BatchFormatError
from precisebn.models.samples import certain_num_samples, num_samples

IMAGE, LABELS, SIZES = torch.randn(4, 3, 8, 8), torch.arange(4), torch.tensor([[8, 8]])
SEQUENCE = torch.randn(4, 3, 9)  # (N, C, L)
PHOTOS, TARGETS = [torch.rand(3, 8, 8)] * 5, [{"boxes": torch.rand(n, 4)} for n in range(5)]
Pair = namedtuple("Pair", ["image", "label"])
SizesFirst = namedtuple("SizesFirst", ["sizes", "image"])


@dataclass
class Batch:
    x: Any
    more: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Slots:
    x: Tensor


class Plain:
    """An object of nobody's convention."""

    def __init__(self, **values: Any) -> None:
        vars(self).update(values)


CERTAIN = {
    "tensor": (IMAGE, 4),
    "nested tensor": (torch.nested.as_nested_tensor([torch.zeros(2, 3), torch.zeros(5, 3)], layout=torch.jagged), 2),
    "with labels": ((IMAGE, LABELS), 4),
    "with other floating tensors": ((IMAGE, torch.rand(17, 4)), 4),
    "labels first": ([LABELS, IMAGE], 4),
    "mapping": ({"n": 3, "step": torch.tensor(3), "x": IMAGE}, 4),
    "nested": ({"inputs": {"x": IMAGE}}, 4),
    "nested list": ({"image": [IMAGE, IMAGE]}, 4),
    "names and sizes": ({"x": IMAGE, "names": list("abcd"), "size": (8, 8)}, 4),
    "two scales": (([IMAGE, IMAGE], LABELS), 4),
    "detectron2's": ([{"image": IMAGE[0]}] * 3, 3),
    "torchvision's detection": ((PHOTOS, TARGETS), 5),
    "the same by zip": ((tuple(PHOTOS), tuple(TARGETS)), 5),
    "boxes of each": ({"image": torch.rand(5, 3, 8, 8), "boxes": [torch.rand(n, 4) for n in range(5)]}, 5),
    "TensorDataset of sequences": ([SEQUENCE], 4),
    "sequences and labels": ([SEQUENCE, LABELS], 4),
    "packed sequence": (pack_sequence([torch.randn(n, 3) for n in (9, 7, 2)]), 3),
    "packed sequence and labels": ((pack_sequence([torch.randn(n, 3) for n in (9, 7, 5, 2)]), LABELS), 4),
    "dataclass": (Batch(IMAGE), 4),
    "dataclass with slots": (Slots(IMAGE), 4),
    "dataclass with more": (Batch((IMAGE, LABELS), {"mask": torch.ones(4, 1, 8, 8)}), 4),
    "objects, one a sample": ([Plain(x=photo) for photo in PHOTOS], 5),
    "object": (Plain(x=IMAGE, y=LABELS, name="a"), 4),
    "named tuple": (Pair(IMAGE, LABELS), 4),
    "named tuple of sequences": (Pair(SEQUENCE, SEQUENCE), 4),
}
UNCERTAIN = {
    "sizes first": ({"sizes": SIZES, "x": IMAGE}, 4, "first dimensions 1, 4"),
    "sizes last": ({"x": IMAGE, "sizes": SIZES}, 4, "first dimensions 1, 4"),
    "named tuple, sizes first": (SizesFirst(SIZES, IMAGE), 4, "first dimensions 1, 4"),
    "tuple, sizes first": ((SIZES, IMAGE), 4, "first dimensions 1, 4"),
    "dataclass with others": (Batch(IMAGE, {"sizes": SIZES}), 4, "first dimensions 1, 4"),
    "photos or sequences": ([SEQUENCE, SEQUENCE], 2, "it may be 2 or 4"),
    "no tensor": (object(), 1, "no tensor"),
    "a number": (torch.tensor(1.0), 1, "no tensor"),
    "nothing": ([], 1, "no tensor"),
    "names": (["a", "b"], 2, "no tensor"),
    "mapping without": ({"n": 3}, 1, "no tensor"),
}


@pytest.mark.parametrize("form", CERTAIN)
def test_samples_are_counted_where_all_agree(form):
    batch, samples = CERTAIN[form]
    assert num_samples(batch) == samples
    assert certain_num_samples(batch, "prior=1") == samples


@pytest.mark.parametrize("form", UNCERTAIN)
def test_where_they_do_not_a_report_guesses_and_a_weight_is_refused(form):
    batch, guess, why = UNCERTAIN[form]
    assert num_samples(batch) == guess
    with pytest.raises(BatchFormatError, match=rf"prior=1 weighs samples.*{why}.*yield pairs \(x, batch\)"):
        certain_num_samples(batch, "prior=1")


@pytest.mark.parametrize("form", UNCERTAIN)
def test_the_remedy_helps(form):
    batch, *_ = UNCERTAIN[form]
    assert certain_num_samples((IMAGE, batch), "prior=1") == 4


def test_an_object_that_holds_itself_ends():
    batch = Plain(x=IMAGE)
    batch.me = batch
    assert certain_num_samples(batch, "prior=1") == 4
