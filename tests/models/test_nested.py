"""The tensors in nested containers: one walk for all who look."""

from collections import OrderedDict, namedtuple
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from precisebn.models.nested import tensors_in
from precisebn.models.samples import certain_num_samples

Pair = namedtuple("Pair", "first second")


@dataclass
class Target:
    boxes: Tensor
    more: list[Tensor] = field(default_factory=list)


A, B, C = (torch.full((n, 2), float(n)) for n in (1, 2, 3))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (A, [A]),
        ([A, (B, [C])], [A, B, C]),
        (OrderedDict(x=A, y={"z": B}), [A, B]),
        (Pair(A, [B]), [A, B]),
        ({A}, [A]),
        (Target(A, [B]), [A, B]),
        (["labels", 3, None, Target], []),
        ([], []),
    ],
)
def test_all_of_them_in_their_order(value, expected):
    assert [id(t) for t in tensors_in(value)] == [id(t) for t in expected]


def test_data_classes_are_metadata_where_that_is_asked_for():
    assert list(tensors_in([Target(A)], in_data_classes=False)) == []
    assert certain_num_samples({"target": Target(A), "x": C}, "prior=1") == 3
