"""What does a call cost beside its work? Tensors so small that the work hardly counts, on one thread, in CPU time.

``functional.batch_norm`` against ``F.batch_norm``; one recorded layer, mini-batch by mini-batch, against fvcore's hook;
and whole calls of ``update_bn_stats`` on a network of many small layers, set-up and finishing included, for as few
mini-batches as one and three: there the fixed cost shows. And, with two threads, how many parallel regions a mini-batch
opens: what a busy machine takes its time by. To compare two states of the library, run it in a copy of
each, in turns.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

import precisebn
from benchmarks.harness import Question, Result, goal
from benchmarks.harness.timing import Times, comparison, interleave, now, speeds
from benchmarks.peers import installed, missing
from benchmarks.questions._regions import count_regions
from precisebn.functional import batch_norm

__all__ = ["QUESTION", "run"]

QUESTION = Question(
    "What does a call cost beside its work, on tensors so small that it hardly counts?",
    against="`F.batch_norm`, fvcore, swa_utils, the plain forward",
    devices=("cpu",),
    threads=1,
)

SHAPE = (2, 64, 8, 8)
NETWORK, BATCH = "shufflenet_v2_x1_0", (8, 3, 64, 64)
OURS, FVCORE, FORWARD = "precisebn", "fvcore", "forward"
PEERS = ("fvcore", "torchvision")
Update = Callable[[nn.Module, "CountedLoader"], object]


def run(device: str = "cpu", quick: bool = False, deadline: float = float("inf")) -> Result:
    """Time of a call, and how many times as fast as its peers it is."""
    rounds, calls = (3, 20) if quick else (41, 200)
    rows = [
        _row("batch_norm, forward", SHAPE, _functional(calls, backward=False), rounds, "F.batch_norm"),
        _row("batch_norm, forward + backward", SHAPE, _functional(calls, backward=True), rounds, "F.batch_norm"),
        _row("one recorded layer, a mini-batch", SHAPE, _recorded(4 * calls), rounds, *_updates()),
    ]
    models = installed("torchvision.models")
    if models is not None:
        torch.manual_seed(0)
        model = getattr(models, NETWORK)().train()
        for batches in (1, 3):
            what = f"update_bn_stats, {NETWORK}, {batches} mini-batch{'es' if batches > 1 else ''}"
            rows.append(_row(what, BATCH, _whole_calls(model, batches), 3 if quick else 25, *_updates()))
    goals = [
        goal(f"{row['what']}: x fvcore", speeds([row], FVCORE)[0], at_least=1.0)
        for row in rows
        if FVCORE in row["_peers"]
    ]
    regions = count_regions(quick) if models is not None else ""
    if isinstance(regions, str):
        return {"rows": rows, "summary": {"goals": goals, "peers": missing(PEERS), "parallel regions": regions}}
    shares = [row["regions"] / row["fvcore's"] for row in regions if "fvcore's" in row]
    if shares:
        goals.append(goal("parallel regions of a mini-batch over fvcore's, the most", max(shares), at_most=1.0))
    return {"rows": rows + regions, "summary": {"goals": goals, "peers": missing(PEERS)}}


def _row(
    what: str, shape: tuple[int, ...], contestants: dict[str, Callable[[], float]], rounds: int, *peers: str
) -> dict[str, Any]:
    times: Times = interleave(contestants, rounds)
    others = [peer for peer in peers if peer != OURS]
    return {"what": what, "shape": "x".join(map(str, shape)), **comparison(times, OURS, others)}


# ---- batch_norm -----------------------------------------------------------------------------------------------------


def _functional(calls: int, backward: bool) -> dict[str, Callable[[], float]]:
    x, dy = torch.randn(SHAPE), torch.randn(SHAPE)
    weight, bias = torch.ones(SHAPE[1]), torch.zeros(SHAPE[1])
    inputs = [tensor.requires_grad_() for tensor in (x, weight, bias)]

    def ours() -> Tensor:
        return batch_norm(x, weight, bias)[0]

    def torchs() -> Tensor:
        return F.batch_norm(x, None, None, weight, bias, training=True)

    def timed(forward: Callable[[], Tensor]) -> Callable[[], float]:
        def forwards() -> float:
            with torch.no_grad():
                return _seconds_each(forward, calls)

        def both() -> float:
            return _seconds_each(lambda: torch.autograd.grad(forward(), inputs, dy), calls)

        return both if backward else forwards

    return {OURS: timed(ours), "F.batch_norm": timed(torchs)}


def _seconds_each(work: Callable[[], object], calls: int) -> float:
    start = now()
    for _ in range(calls):
        work()
    return (now() - start) / calls


# ---- update_bn_stats ------------------------------------------------------------------------------------------------


class CountedLoader:
    """The same mini-batch again and again; measures the time between the first request and the last."""

    def __init__(self, batch: Tensor, length: int) -> None:
        self.batch, self.length = batch, length
        self.seconds = 0.0

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Tensor]:
        start = 0.0
        for i in range(self.length):
            if i == 1:  # what is done once, in the first mini-batch, is not counted
                start = now()
            if i == self.length - 1:
                self.seconds = now() - start
            yield self.batch


def _recorded(calls: int) -> dict[str, Callable[[], float]]:
    """Without set-up and finishing: between requests for mini-batches, many enough that they are taken in meanwhile."""
    model = nn.Sequential(nn.BatchNorm2d(SHAPE[1]))
    batch = torch.randn(SHAPE)

    def contestant(update: Update) -> Callable[[], float]:
        def once() -> float:
            loader = CountedLoader(batch, calls)
            update(model.train(), loader)
            return loader.seconds / (calls - 2)

        return once

    return {name: contestant(update) for name, update in _updates().items()}


def _whole_calls(model: nn.Module, batches: int) -> dict[str, Callable[[], float]]:
    loader = CountedLoader(torch.randn(BATCH), batches)

    def contestant(update: Update) -> Callable[[], float]:
        def once() -> float:
            start = now()
            update(model.train(), loader)
            return now() - start

        return once

    return {name: contestant(update) for name, update in _updates().items()}


def _updates() -> dict[str, Update]:
    found: dict[str, Update] = {
        OURS: lambda model, loader: precisebn.update_bn_stats(model, loader, len(loader)),
        "swa_utils": lambda model, loader: update_bn(loader, model),
        FORWARD: _forward,
    }
    fvcore = installed("fvcore.nn")
    if fvcore is not None:
        found[FVCORE] = lambda model, loader: fvcore.update_bn_stats(model, loader, len(loader))
    return found


def _forward(model: nn.Module, loader: CountedLoader) -> None:
    with torch.no_grad():
        for batch in loader:
            model(batch)
