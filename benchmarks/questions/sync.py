"""Batch normalization over ranks: what it costs, against what else does it.

Two ranks of this machine over gloo, forward and backward, against detectron2's formula and against each rank alone,
which is what the synchronization costs: by wall time, since a rank waits for the other. torch's SyncBatchNorm refuses
the CPU. On CUDA one rank does, over nccl, what it would do with others, in SyncBN and in torch's: the kernels and the
launches of the collectives, not the time on a wire. And in a single process, where nothing is to be synchronized: there
SyncBN is to cost what batch normalization costs.
"""

import datetime
import itertools
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.harness import Question, Result, goal
from benchmarks.harness.inputs import Shape, shape_name
from benchmarks.harness.timing import Times, comparison, in_time, interleave, measure, speeds
from benchmarks.peers.sync import NaiveSyncBatchNorm, torchs_on_one_rank
from precisebn.functional.synchronized import sync_batch_norm
from precisebn.nn import BatchStatBN, SyncBN

__all__ = ["QUESTION", "run"]

QUESTION = Question(
    "What does batch normalization over ranks cost?",
    against="detectron2's NaiveSyncBatchNorm, torch's SyncBatchNorm (on CUDA), each rank by itself; in one process, "
    "`BatchStatBN`",
    threads=1,
)

SHAPES: list[Shape] = [(2, 64, 8, 8), (8, 64, 56, 56), (8, 256, 28, 28), (8, 1024, 14, 14), (8, 2048, 7, 7)]
WORLD, LONGEST_S = 2, 300
OURS, NAIVE, APART, TORCHS, PLAIN = "SyncBN", "NaiveSyncBatchNorm", "each rank alone", "SyncBatchNorm", "BatchStatBN"

Forward = Callable[[Tensor], Tensor]


def run(device: str = "cpu", quick: bool = False, deadline: float = float("inf")) -> Result:
    """Time of a forward and backward of SyncBN, and how many times as fast as its peers it is."""
    shapes = SHAPES[:2] if quick else SHAPES
    rows = [_alone(shape, device, quick) for shape in in_time(shapes, deadline)]
    over_ranks, said = _one_rank(shapes, quick, deadline) if device == "cuda" else _two_ranks(shapes, quick)
    rows += over_ranks
    others = [TORCHS] if device == "cuda" else [NAIVE]
    goals = [
        goal(f"{row['what']}, {row['shape']}: x {peer}", speeds([row], peer)[0], at_least=1.0)
        for peer in others
        for row in rows
        if peer in row["_peers"]
    ]
    if alone := speeds(rows, PLAIN):  # to ask for other ranks takes less than a microsecond of some fifty or more
        goals.append(goal(f"one process: x {PLAIN}, geometric mean", statistics.geometric_mean(alone), at_least=0.98))
    return {"rows": rows, "summary": {"goals": goals, f"torch's {TORCHS} on this device": said}}


def _row(what: str, shape: Shape, times: Times) -> dict[str, Any]:
    others = [name for name in times if name != OURS]
    return {"what": what, "shape": shape_name(shape), **comparison(times, OURS, others)}


def _step(layer: Forward, parameters: list[nn.Parameter]) -> Callable[[Tensor, Tensor], Any]:
    return lambda x, dy: torch.autograd.grad(layer(x), [x, *parameters], dy)


def _check(steps: Mapping[str, Callable[[Tensor, Tensor], Any]], x: Tensor, dy: Tensor, together: list[str]) -> None:
    """Refuse to time a wrong result: those that do the same agree in the gradient of x, to float32's rounding."""
    found = {name: steps[name](x, dy)[0].double() for name in together}
    truth = found[OURS]
    for name, dx in found.items():
        error = float((dx - truth).abs().max() / truth.abs().max())
        if not error < 1e-4:
            raise ArithmeticError(f"the gradient of {name} differs by {error:.1e} from SyncBN's; nothing is timed")


def _feed(shape: Shape, device: str, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(seed)
    pairs = [(torch.randn(shape, device=device), torch.randn(shape, device=device)) for _ in range(4)]
    return [(x.requires_grad_(), dy) for x, dy in pairs]


# ---- One process ----------------------------------------------------------------------------------------------------


def _alone(shape: Shape, device: str, quick: bool) -> dict[str, Any]:
    layers: dict[str, nn.Module] = {OURS: SyncBN(shape[1]), PLAIN: BatchStatBN(shape[1])}
    steps = {name: _step(bn.to(device), list(bn.parameters())) for name, bn in layers.items()}
    feed = _feed(shape, device)
    _check(steps, *feed[0], [OURS, PLAIN])
    times = measure(steps, feed, device, rounds=3 if quick else 101, budget=5, calls=8)
    return _row("one process", shape, times)


# ---- One rank, on CUDA ----------------------------------------------------------------------------------------------


def _one_rank(shapes: list[Shape], quick: bool, deadline: float) -> tuple[list[dict[str, Any]], str]:
    rows = []
    dist.init_process_group("nccl", init_method=f"file://{tempfile.mkdtemp()}/store", rank=0, world_size=1)
    group = dist.group.WORLD
    assert group is not None
    try:
        for n, *rest in in_time(shapes, deadline):
            shape = (4 * n, *rest)  # of a size that a GPU gets
            ours, theirs = SyncBN(rest[0]).cuda(), nn.BatchNorm2d(rest[0]).cuda()

            def synchronized(x: Tensor, bn: SyncBN = ours) -> Tensor:
                y, moments = sync_batch_norm(x, bn.weight, bn.bias, bn.eps, group.group_name)
                bn.track(moments)
                return y

            def torchs(x: Tensor, bn: nn.Module = theirs) -> Tensor:
                return torchs_on_one_rank(x, bn)

            steps = {
                OURS: _step(synchronized, list(ours.parameters())),
                TORCHS: _step(torchs, list(theirs.parameters())),
            }
            feed = _feed(shape, "cuda")
            _check(steps, *feed[0], [OURS, TORCHS])
            times = measure(steps, feed, "cuda", rounds=3 if quick else 15, budget=3, calls=4)
            rows.append(_row("one rank of nccl, synchronized", shape, times))
    finally:
        dist.destroy_process_group()
    return rows, "runs"


# ---- Two ranks, on the CPU ------------------------------------------------------------------------------------------


def _two_ranks(shapes: list[Shape], quick: bool) -> tuple[list[dict[str, Any]], str]:
    """Rows of what rank 0 measures; and what torch's layer says."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        arguments = (shapes, 3 if quick else 41, folder)
        ranks = [context.Process(target=_rank, args=(rank, *arguments)) for rank in range(WORLD)]
        deadline = time.monotonic() + LONGEST_S
        try:
            for process in ranks:
                process.start()
            for process in ranks:
                process.join(max(0.0, deadline - time.monotonic()))
        finally:
            for process in ranks:
                process.kill()
        measured, said = json.loads((Path(folder) / "found").read_text())
    return [_row(f"{WORLD} ranks of gloo", shape, times) for shape, times in zip(shapes, measured, strict=True)], said


def _rank(rank: int, shapes: list[Shape], rounds: int, folder: str) -> None:
    """What each process does: the same contestants in the same order."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD,
        timeout=datetime.timedelta(seconds=60),
    )  # fmt: skip
    found = [_times(shape, rank, rounds) for shape in shapes]
    if rank == 0:
        (Path(folder) / "found").write_text(json.dumps([found, _refusal()]))
    dist.destroy_process_group()


def _refusal() -> str:
    """What torch's layer says to a tensor on the CPU."""
    try:
        nn.SyncBatchNorm(3)(torch.ones(2, 3))
    except ValueError as error:
        return str(error)
    return "runs"


def _times(shape: Shape, rank: int, rounds: int) -> Times:
    layers: dict[str, nn.Module] = {
        OURS: SyncBN(shape[1]),
        NAIVE: NaiveSyncBatchNorm(shape[1]),
        APART: BatchStatBN(shape[1]),
    }
    steps = {name: _step(bn, list(bn.parameters())) for name, bn in layers.items()}
    feed = _feed(shape, "cpu", rank)
    _check(steps, *feed[0], [OURS, NAIVE])
    arguments = itertools.cycle(feed)

    def contestant(work: Callable[[Tensor, Tensor], Any]) -> Callable[[], float]:
        def once() -> float:
            pair = next(arguments)
            dist.barrier()  # nobody is timed for what the contestant before has left to wait for
            start = time.perf_counter()
            work(*pair)
            return time.perf_counter() - start

        return once

    # As many rounds on both ranks, whatever the time.
    return interleave({name: contestant(step) for name, step in steps.items()}, rounds)
