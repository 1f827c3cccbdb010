"""Remedies are calls to copy: each that an audit may print runs as it is printed, with few mini-batches too."""

import ast
import copy
import importlib
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import precisebn
from precisebn.auditing.run import audit

pytestmark = pytest.mark.usefixtures("one_thread")

ROOM = Path(precisebn.__file__).parent / "auditing"
PUBLIC = {name: getattr(room, name) for room in (precisebn, precisebn.nn) for name in room.__all__}


def texts(module: ModuleType) -> Iterator[str]:
    """The strings of a module that are no docstrings; what is filled into them is 2, where it is no constant."""
    tree = ast.parse(Path(module.__file__).read_text())
    told = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    filled = [node for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)]
    inside = {id(part) for node in filled for part in node.values}
    for node in filled:
        yield "".join(part.value if isinstance(part, ast.Constant) else constant(module, part) for part in node.values)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in told | inside:
            yield node.value


def constant(module: ModuleType, part: ast.expr) -> str:
    named = isinstance(part, ast.FormattedValue) and isinstance(part.value, ast.Name)
    return str(vars(module).get(part.value.id, 2)) if named else "2"


def calls(text: str) -> Iterator[str]:
    """The calls of public functions and classes of the library in a text."""
    for match in re.finditer(r"(?<![\w.])(\w+)\(", text):
        if match[1] in PUBLIC:
            ends = (i + 1 for i, letter in enumerate(text) if letter == ")" and i > match.start())
            yield next(text[match.start() : end] for end in ends if is_expression(text[match.start() : end]))


def is_expression(text: str) -> bool:
    try:
        ast.parse(text, mode="eval")
    except SyntaxError:
        return False
    return True


MODULES = [
    importlib.import_module(f"precisebn.auditing.{'.'.join(path.relative_to(ROOM).with_suffix('').parts)}")
    for path in sorted(ROOM.rglob("*.py"))
    if path.name != "__init__.py"
]
CALLS = sorted({call for module in MODULES for text in texts(module) for call in calls(text)})


class Head(nn.Module):
    """What convert_shared_head takes: a loop over feature levels."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))

    def forward(self, levels):
        return [self.tower(level) for level in levels]


def run(call: str, model: nn.Module) -> Any:
    """The call as a user completes it: what ``...`` stands for is filled in."""
    for left, filled in (
        ("convert_cycle(model, length=2, include=2)", "convert_cycle(model, length=2, include='1')"),
        ("replace_batchnorm(model, ...)", "replace_batchnorm(model, lambda bn: nn.GroupNorm(2, bn.num_features))"),
        ("convert_shared_head(head, ...)", "convert_shared_head(head)"),
        ("modules=2", "modules='all'"),  # see test_the_call_takes_frozen_layers_where_there_are_some
        ("modules=[...]", "modules=['1']"),
        ("forward=...", "forward=lambda model, batch: model(batch)"),
        ("(model, ...", "(model, '1'"),
        ("(copy, ...", "(copy, '1'"),
    ):
        call = call.replace(left, filled)
    given = {
        "nn": nn, "model": model, "average": model, "copy": model, "head": Head(), "num_domains": 2,
        "loader": [torch.randn(4, 3, 6, 6) for _ in range(4)],
    }  # fmt: skip
    return eval(call, PUBLIC | given)


def model() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())


def test_calls_are_found():
    assert len(CALLS) > 15
    assert {"trainable_parameters(model)", "freeze(model, ...)", "convert_batch_stat(model)"} <= set(CALLS)
    assert list(calls("update_bn_stats(model, f(1), (2,)) measures (all) of them")) == [
        "update_bn_stats(model, f(1), (2,))"
    ]


@pytest.mark.parametrize("call", CALLS)
def test_a_call_that_is_printed_runs(call):
    """With 4 mini-batches, in training mode and in eval mode, without a warning."""
    for training in (True, False):
        some = model().train(training)
        result = run(call, some)
        if isinstance(result, AbstractContextManager):
            with result:
                some(torch.randn(4, 3, 6, 6))
        elif isinstance(result, precisebn.UpdateReport):
            assert [layer.name for layer in result.layers] == ["1"]


@pytest.mark.parametrize("frozen", [False, True])
def test_the_call_takes_frozen_layers_where_there_are_some(frozen):
    some = model().eval()
    if frozen:
        precisebn.freeze(some)
    broken = copy.deepcopy(some)
    broken[1].running_var[0] = -1
    [finding] = audit(broken, only="PBN202")
    [call] = calls(finding.remedy)
    assert ("modules='*'" in call) == frozen
    run(call, broken)
    assert not audit(broken, only="PBN202")


@pytest.mark.parametrize("frozen", [False, True])
def test_the_calls_against_drift_bring_the_statistics_near(frozen):
    torch.manual_seed(0)
    trained = model()
    for _ in range(40):  # fewer leave it a fresh layer
        trained(5 + 9 * torch.randn(8, 3, 6, 6))
    if frozen:
        precisebn.freeze(trained)
    loader = [torch.randn(32, 3, 6, 6) for _ in range(16)]
    [finding] = audit(trained, loader[0], only="PBN251")
    both = list(calls(finding.remedy))
    assert [call.partition("(")[0] for call in both] == ["update_bn_stats", "adapt_bn_stats"]
    for call in both:
        some = copy.deepcopy(trained)
        eval(call, PUBLIC | {"model": some, "loader": loader})
        assert not audit(some, loader[0], only="PBN251")
