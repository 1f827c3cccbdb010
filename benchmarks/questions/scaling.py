"""How recalibration, SyncBN and ShuffleBN scale with the ranks: time, bytes on the wire, memory, and a model of them.

1, 2, 4 and 8 ranks of this machine over gloo, each on one thread. Where there are more ranks than cores they share
these, so what a rank does by itself is timed beside the whole, with as many ranks at work; and the communication alone,
from when all ranks stand before it. A model of the communication is fitted to the best of all rounds (what is slower
had something else on the cores) for some numbers of ranks and channels, and held against others, which it has not seen.
docs/scaling.md carries it to thousands of ranks.
"""

import json
import math
import multiprocessing
import os
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from multiprocessing import connection
from pathlib import Path
from typing import Any
from unittest import mock

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from benchmarks.harness import Question, Result, goal
from benchmarks.harness.timing import quartiles
from benchmarks.questions._scaling_model import (
    Model,
    Point,
    fit,
    nonnegative_least_squares,
    percent_off,
    ring,
    tree,
    typical_and_worst,
)
from benchmarks.questions._scaling_ranks import LAYERS, LONGEST_WAIT, Plan, run_rank

__all__ = ["QUESTION", "page", "run"]

QUESTION = Question(
    "How do recalibration, SyncBN and ShuffleBN scale with the ranks?",
    against="each rank by itself; a model fitted on 2 and 8 ranks, held against 4 and against other channels",
    devices=("cpu",),
    threads=1,
)

FULL = Plan(
    worlds=(1, 2, 4, 8),
    sizes={
        "update_bn_stats": (32, 128, 512, 2048),  # channels of each layer
        "SyncBN": (64, 256, 1024, 4096),
        "ShuffleBN": (64, 256, 1024, 4096),  # numbers of each sample
    },
    rounds=15,
    virtual=(16, 32, 64, 128, 256),
    seconds=1.0,
)
QUICK = Plan(
    worlds=(1, 2),
    sizes={"update_bn_stats": (8, 16, 32), "SyncBN": (16, 32, 64), "ShuffleBN": (16, 32, 64)},
    rounds=2,
    virtual=(4, 8, 16),
    seconds=0.05,
)
HELD_OUT_RANKS = 4
"""The model is fitted without them; and without the last size but one of each subject, if there are more than two."""
CORES = os.cpu_count() or 1
_CLOCK = f"wall time, a thread a rank, on {CORES} cores; alone, communication and model are of the best round"


def run(device: str = "cpu", quick: bool = False, deadline: float = float("inf")) -> Result:
    """Rows of each subject and number of ranks, with what the model says of them; and of the store."""
    assert device == "cpu"
    plan = QUICK if quick else FULL
    found = _all_ranks(plan)
    rows: list[dict[str, Any]] = []
    summary: dict[str, Any] = {}
    for what, sizes in plan.sizes.items():
        own = [_row(key[1], key[2], ranks) for key, ranks in found.items() if key[0] == what]
        left_out = sizes[-2] if len(sizes) > 2 else None
        summary |= _predict(what, own, left_out)
        rows += own
    store, notes = _store_rows(found)
    added_up = ("update_bn_stats", "SyncBN")  # what samples ShuffleBN gets is chance
    goals = [_same_memory(rows, what, plan.worlds) for what in added_up]
    goals += [_bytes_as_counted(rows, what) for what in added_up]
    return {"rows": rows + store, "summary": {"goals": goals, "clock": _CLOCK, **summary, **notes}}


def page(result: Result) -> dict[str, list[dict[str, Any]]]:
    """A table of times, one of bytes and memory, one of the store."""
    subjects = [row for row in result["rows"] if "whole, ms" in row]
    times = [{key: value for key, value in row.items() if not key.startswith("_")} for row in subjects]
    others = [{**{key: row[key] for key in ("what", "ranks", "size")}, **row["_wire"]} for row in subjects]
    return {
        "Time of a call, of the slowest rank": times,
        "Bytes on the wire and memory, of a call and a rank": [row for row in others if len(row) > 3],
        "The key-value store that decides the steps of a recalibration": [
            row for row in result["rows"] if "whole, ms" not in row
        ],
    }


# ---- Processes ------------------------------------------------------------------------------------------------------


def _all_ranks(plan: Plan) -> dict[tuple[str, int, int], list[dict[str, Any]]]:
    """What all ranks have found, by what it is of, the number of ranks, and the size; a list of one entry a rank."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=LONGEST_WAIT)
    context = multiprocessing.get_context("spawn")
    world = plan.worlds[-1]
    with tempfile.TemporaryDirectory() as folder:
        arguments = (store.port, folder, plan)
        ranks = [context.Process(target=run_rank, args=(rank, *arguments)) for rank in range(world)]
        try:
            with mock.patch.dict(os.environ, {"TORCH_CPP_LOG_LEVEL": "ERROR"}):  # a line for each connection
                for process in ranks:
                    process.start()
            while running := [process.sentinel for process in ranks if process.exitcode is None]:
                connection.wait(running)
                if any(process.exitcode for process in ranks):
                    raise RuntimeError("a rank failed: see above; the others wait for it, and are ended")
        finally:
            for process in ranks:
                process.kill()
        found = defaultdict(list)
        for rank in range(world):
            for entry in json.loads(Path(folder, str(rank)).read_text()):
                found[entry["what"], entry["ranks"], entry.get("size", 0)].append(entry)
    return found


def _row(ranks: int, size: int, found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One row of all ranks: of each round the time of the slowest, of the rest the mean, of memory the most."""
    assert len(found) == ranks
    what = found[0]["what"]
    times = {
        name: [1e3 * max(values) for values in zip(*(entry["times"][name] for entry in found), strict=True)]
        for name in found[0]["times"]
    }
    low, middle, high = quartiles(times["whole"])
    row = {"what": what, "ranks": ranks, "size": size, "whole, ms": middle, "quartiles": [low, high]}
    row |= {"at best, ms": min(times["whole"]), "alone": min(times["alone"])}
    wire: dict[str, float] = {}
    if ranks > 1:
        row["communication"] = min(times["communication"])
        wire["KiB sent to ranks"] = statistics.mean(entry["sent"] for entry in found) / 2**10
        wire["by the formula"] = statistics.mean(entry["moved"] for entry in found) / 2**10
    if what == "update_bn_stats" and ranks > 1:
        wire["KiB sent to the store"] = statistics.mean(entry["to the store"] for entry in found) / 2**10
        wire["requests to the store"] = statistics.mean(entry["requests"] for entry in found)
    if "tensors" in found[0]:
        wire[_PEAK] = max(entry["tensors"] for entry in found) / 2**20
        wire["most memory of the process, MiB"] = max(entry["process"] for entry in found) / 2**20
    return row | {"_wire": wire}


# ---- The model ------------------------------------------------------------------------------------------------------


def _channels(row: Mapping[str, Any]) -> int:
    return int(row["size"]) * (LAYERS if row["what"] == "update_bn_stats" else 1)


def _predict(what: str, rows: list[dict[str, Any]], left_out: int | None) -> dict[str, Any]:
    """Fit the model to the rows that it may see, write into each what it predicts; what a summary says of it."""
    several = [row for row in rows if row["ranks"] > 1]
    unseen = [row for row in several if row["ranks"] == HELD_OUT_RANKS or row["size"] == left_out]
    points = [Point(row["ranks"], _channels(row), row["communication"] / 1e3) for row in several if row not in unseen]
    # What gloo does, and what the page extrapolates to, where NCCL does that: how wrong it would be here is told too.
    model, as_a_tree = fit(points, ring, CORES), fit(points, tree, CORES)
    for row in several:
        row["model"] = 1e3 * model.seconds(row["ranks"], _channels(row))
        row["off by, %"] = percent_off(row["model"], row["communication"])
        row["alone + model"] = row["alone"] + row["model"]
        row["that off by, %"] = percent_off(row["alone + model"], row["at best, ms"])
        row["unseen"] = row in unseen
    of_a_tree = [
        percent_off(1e3 * as_a_tree.seconds(row["ranks"], _channels(row)), row["communication"]) for row in unseen
    ]
    return {
        f"{what}: model of the communication, ms for W ranks and n {_UNITS.get(what, 'channels')}": _in_words(model),
        f"{what}: off by, where it has not seen, median and worst [%]": typical_and_worst(
            row["off by, %"] for row in unseen
        ),
        f"{what}: the same with log2(W) in the place of W - 1 [%]": typical_and_worst(of_a_tree),
        f"{what}: the whole, by each rank alone and the model, off by [%]": typical_and_worst(
            row["that off by, %"] for row in unseen
        ),
    }


_UNITS = {"ShuffleBN": "numbers of a sample"}


def _in_words(model: Model) -> str:
    return (
        f"max(1, W / {model.cores}) ({1e3 * model.start:.3g} + {1e3 * model.hop:.3g} (W - 1) + "
        f"{1e3 * model.channel:.3g} n)"
    )


# ---- The store ------------------------------------------------------------------------------------------------------


def _store_rows(
    found: Mapping[tuple[str, int, int], list[dict[str, Any]]],
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """How many requests it answers, and what a step takes of many ranks: fitted on all numbers but the largest."""
    rows: list[dict[str, Any]] = [
        {"what": "requests", "ranks": ranks, "requests a second": sum(entry["a second"] for entry in entries)}
        for (what, ranks, _), entries in found.items()
        if what == "requests"
    ]
    steps = [entries[0] for (what, _, _), entries in found.items() if what == "step"]
    seconds = {entry["ranks"]: min(entry["seconds"]) for entry in steps}
    *seen, largest = sorted(seconds)
    # Each asks again and again, with pauses that double: so the longer a step takes, the more requests a rank makes.
    begin, each = nonnegative_least_squares(
        [(1.0, ranks * math.log2(ranks)) for ranks in seen], [seconds[ranks] for ranks in seen]
    )
    for entry in steps:
        ranks = entry["ranks"]
        predicted = begin + each * ranks * math.log2(ranks)
        rows.append(
            {
                "what": "a step of threads", "ranks": ranks, "at best, ms": 1e3 * seconds[ranks],
                "requests a rank": entry["requests"] / ranks,
                "requests a second": entry["requests"] / seconds[ranks], "model": 1e3 * predicted,
                "off by, %": percent_off(predicted, seconds[ranks]), "unseen": ranks == largest,
            }
        )  # fmt: skip
    return rows, {"a step in the store, for W ranks": f"{1e3 * begin:.3g} ms + {1e3 * each:.3g} ms W log2(W)"}


# ---- Goals ----------------------------------------------------------------------------------------------------------


_PEAK = "peak of tensors, MiB"


def _same_memory(rows: Iterable[Mapping[str, Any]], what: str, worlds: Sequence[int]) -> dict[str, Any]:
    """A rank's tensors take as much memory with many other ranks as with one."""
    peaks = {row["ranks"]: row["_wire"][_PEAK] for row in rows if row["what"] == what and _PEAK in row["_wire"]}
    most = worlds[-1]
    return goal(f"{what}: peak of tensors on {most} ranks over that on 2", peaks[most] / peaks[2], at_most=1.05)


def _bytes_as_counted(rows: Iterable[Mapping[str, Any]], what: str) -> dict[str, Any]:
    """Where there are so many bytes that headers do not count: of the largest size."""
    largest = [row["_wire"] for row in rows if row["what"] == what and row["ranks"] > 1 and _PEAK in row["_wire"]]
    worst = max(wire["KiB sent to ranks"] / wire["by the formula"] for wire in largest)
    return goal(f"{what}: bytes that are sent over those of the formula", worst, at_most=1.05)
