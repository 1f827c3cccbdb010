"""The modules, forward and backward, against what they replace.

All parameters that a module trains get gradients, and so does the input. Every contestant, ours or not, is checked
against float64 before anything is timed. For some, memory is compared as well: the most bytes that tensors hold during
forward and backward beyond what they held before, from the allocator's own record.
"""

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Question, Result, goal
from benchmarks.harness.inputs import LAYOUTS, Setting, laid_out, pairs, random_pool
from benchmarks.harness.timing import comparison, in_time, measure, peak_bytes, rounds_of, speeds
from benchmarks.peers import missing
from benchmarks.questions._modules_cases import (
    CONCATENATED,
    EVALUATION,
    FLATTEN,
    FROZEN,
    TORCHVISION,
    Case,
    Layer,
    Tensors,
    bias_of,
    cases,
    weight_of,
)
from benchmarks.questions._modules_steps import STEP, steps

__all__ = ["QUESTION", "run"]

QUESTION = Question(
    "Is each module faster, and smaller, than what it replaces?",
    against="torchvision's FrozenBatchNorm2d, `nn.BatchNorm2d.eval()`, detectron2's formulas, flatten-"
    "cat-BN-split, loops over domains and chunks",
    share=4,
)


def run(device: str = "cpu", quick: bool = False, deadline: float = float("inf")) -> Result:
    """Time of every module, how many times as fast as its peers it is, and memory."""
    feeds = _Feeds(device, quick)

    def row_of(make: Callable[[], Case]) -> dict[str, Any]:
        return _row(make(), feeds, device, quick)

    makers = [*steps(device, quick), *(partial(row_of, make) for make in cases(device, quick))]
    rows = [make() for make in in_time(makers, deadline)]
    summary = {
        "goals": _goals(rows),
        "rows left out for lack of time": len(makers) - len(rows),
        "peers": missing(["torchvision"]),
    }
    return {"rows": rows, "summary": summary}


def _row(case: Case, feeds: "_Feeds", device: str, quick: bool) -> dict[str, Any]:
    feed = feeds.of(case)
    layers = {"ours": case.ours, **case.peers}
    for name, layer in layers.items():
        _check(name, case, layer, *feed[0])
    bytes_each = sum(setting.bytes for setting in case.settings)
    steps = {name: layer.step for name, layer in layers.items()}
    times = measure(
        steps, feed, device, rounds_of(device, quick), budget=3 if device == "cuda" else 5,
        calls=max(2, min(8, (1 << 30) // bytes_each)),
    )  # fmt: skip
    row = case.columns() | comparison(times, "ours", case.peers)
    if case.memory:
        peaks = {name: peak_bytes(step, feed[0], device) for name, step in steps.items()}
        row["peak MiB"] = peaks["ours"] / 2**20
        row["_memory"] = {name: peaks["ours"] / peaks[name] for name in case.peers}
        row["of the peak of"] = ", ".join(f"{name} {share:.2f}" for name, share in row["_memory"].items())
    return row


# ---- Correct before fast --------------------------------------------------------------------------------------------


def _check(name: str, case: Case, layer: Layer, xs: Tensors, dys: Tensors) -> None:
    """Refuse to time a wrong result: outputs and gradients against float64, relative to the largest value."""
    exact = [x.detach().double().requires_grad_() for x in xs]
    channels = xs[0].shape[1]
    affine = [make(channels).to(exact[0].detach()).requires_grad_() for make in (weight_of, bias_of)]
    expected = case.reference(exact, *affine)
    wanted = [*exact, *affine[: len(layer.parameters)]]
    true_grads = torch.autograd.grad(expected, wanted, [dy.double() for dy in dys])
    ys, grads = layer.step(xs, dys)
    limits = {"output": 2e-5, "gradient": 1e-3}  # peers sum gradients of parameters in float32, one after the other
    for what, actual, truth in zip(
        ["output"] * len(ys) + ["gradient"] * len(grads), (*ys, *grads), (*expected, *true_grads), strict=True
    ):
        error = float(((actual.double() - truth).abs().max() / truth.abs().max()).detach())
        if not error <= (limits[what] if xs[0].dtype == torch.float32 else 3e-2):
            raise ArithmeticError(
                f"{case.module}: {what} of {name} is off by {error:.1e}; nothing is timed before it is right"
            )


class _Feeds:
    """Inputs for every case. The pool is kept from case to case as long as it serves."""

    def __init__(self, device: str, quick: bool) -> None:
        self.device, self.quick = device, quick
        self.pool: Tensor | None = None

    def of(self, case: Case) -> list[tuple[Tensors, Tensors]]:
        """Pairs of inputs and gradients, rotating through more memory than the caches hold."""
        if len(case.settings) > 1:
            return [(self._fresh(case.settings, True), self._fresh(case.settings, False)) for _ in range(4)]
        setting = case.settings[0]
        if (
            self.pool is None
            or self.pool.dtype != setting.dtype
            or len(self.pool) * setting.dtype.itemsize < 3 * max(each.bytes for each in case.every or [setting])
        ):
            self.pool = None
            self.pool = random_pool(case.every or [setting], self.device, self.quick)
        return [([pair.x.detach().requires_grad_()], [pair.dy]) for pair in pairs(setting, self.pool)]

    def _fresh(self, settings: list[Setting], requires_grad: bool) -> Tensors:
        vectors = [torch.randn(each.bytes // each.dtype.itemsize, device=self.device) for each in settings]
        return [
            laid_out(values.to(each.dtype), each).requires_grad_(requires_grad)
            for values, each in zip(vectors, settings, strict=True)
        ]


# ---- Goals ----------------------------------------------------------------------------------------------------------


def _goals(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    goals = [
        goal(f"{STEP}, {row['layout']}: x {TORCHVISION}", speeds([row], TORCHVISION)[0], at_least=1.0)
        for row in rows
        if row["module"] == STEP
    ]
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        for layout in LAYOUTS:
            mine = [row for row in rows if (row["module"], row["layout"], row["dtype"]) == (FROZEN, layout, dtype)]
            what = f"{FROZEN}, forward + backward, ResNet-50 {dtype} {layout}"
            if times := speeds(mine, TORCHVISION):
                goals.append(
                    goal(f"{what}, geometric mean: x torchvision", statistics.geometric_mean(times), at_least=1.4)
                )
            if times := speeds(mine, EVALUATION):
                goals.append(goal(f"{what}, slowest shape: x {EVALUATION}", min(times), at_least=1.0))
        together = [row for row in rows if (row["module"], row["dtype"]) == (CONCATENATED, dtype)]
        if together:
            what = f"ConcatSharedBN, forward + backward, {dtype}"
            slower, larger = min(speeds(together, FLATTEN)), max(row["_memory"][FLATTEN] for row in together)
            goals.append(goal(f"{what}, slower layout: x flatten-cat-BN-split", slower, at_least=2.0))
            goals.append(goal(f"{what}, larger layout: of its additional peak memory", larger, at_most=0.6))
    return goals
