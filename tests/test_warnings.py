"""A warning names the line of the user's code, whatever lies between that and the library."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from precisebn import convert_ghost, freeze, frozen
from precisebn.nn import ConcatSharedBN


def twice(net: nn.Module) -> None:
    net(torch.randn(4, 3)) + net(torch.randn(4, 3))


def with_shared_parameters() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    return model


def enter(block: object) -> None:
    with block:  # type: ignore[attr-defined]
        pass


@pytest.mark.parametrize(
    ("call", "message"),
    [
        pytest.param(lambda: convert_ghost(nn.ReLU(), 2), "nothing is converted", id="called at once"),
        pytest.param(lambda: freeze(with_shared_parameters(), "0"), "are shared", id="through a helper of ours"),
        pytest.param(lambda: enter(frozen(with_shared_parameters(), "0")), "are shared", id="a context manager"),
        pytest.param(
            lambda: twice(nn.Sequential(nn.Sequential(ConcatSharedBN(3)))),
            "one tensor after the other",
            id="a layer in containers",
        ),
    ],
)
def test_the_line_is_the_users(call: Callable[[], object], message: str) -> None:
    with pytest.warns(UserWarning, match=message) as caught:
        call()
    assert [one.filename for one in caught] == [__file__]
