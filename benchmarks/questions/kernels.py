"""The five operators against torch's own and against the memory: how far is each from the floor?

The floor of an operator is the bytes that it must move over the bandwidth that memory has shown in the same run.

On CUDA that is a device-to-device copy of 1 GiB, counting bytes read and written: no kernel moves bytes faster, and
what a launch costs shows as a distance from the floor on small tensors.

On the CPU no single bandwidth is honest: caches of all sizes take part, and a new tensor of more than 32 MiB comes from
the kernel page by page, which costs several times the write itself and which no operator that returns a new tensor can
avoid. So the floor is the time of the plainest operator of torch with the same reads and writes on as many bytes, in
the same round: ``x.sum()`` for one tensor read, ``torch.dot(x, dy)`` for two, ``torch.add(x, 1)`` for one read and a
new one written, ``torch.add(x, dy)`` for two read and a new one written.

In a network the layer before has just written what statistics are taken of. So there are rows ``moments, warm`` for the
tensors of ResNet-50 on the CPU: as much of the tensor is in the caches as stays there when it is written.
"""

import itertools
import statistics
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Question, Result, goal
from benchmarks.harness.inputs import LAYOUTS, ODD, RESNET50, Pair, Setting, dtype_name, pairs, random_pool
from benchmarks.harness.timing import Times, comparison, copy_bandwidth, in_time, measure, rounds_of, speeds
from benchmarks.peers.kernels import PEERS, READS, WRITES, Contestant, able, check, contestants
from benchmarks.questions._kernels_plot import plot

__all__ = ["QUESTION", "page", "plot", "run"]

QUESTION = Question(
    "How far is each operator from what memory allows?",
    against="`x.sum()`, `torch.add`, `torch.var_mean`, `torch.batch_norm_update_stats`, "
    "`batch_norm_stats`, `batch_norm_elemt`, `batch_norm_backward_reduce`, "
    "`batch_norm_backward_elemt`, `native_batch_norm_backward`, `F.batch_norm`",
    share=8,
)

OTHER_DTYPES = [torch.float64, torch.bfloat16, torch.float16]
LARGE = 64 << 20
"""Bytes of a tensor from which the goals for bandwidth on CUDA hold."""


def run(device: str = "cpu", quick: bool = False, deadline: float = float("inf")) -> Result:
    """A row for every operator on every tensor: time, floor, GB/s, and how many times as fast as each peer."""
    chosen = list(_settings(device, quick))
    copy = copy_bandwidth(quick) if device == "cuda" else None
    rows: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    done = 0
    for _, same_dtype in itertools.groupby(chosen, lambda setting: setting.dtype):  # one pool at a time
        group = list(same_dtype)
        pool = None
        for setting in in_time(group, deadline):
            pool = random_pool(group, device, quick) if pool is None else pool
            more, not_able = _rows(setting, pool, device, quick, copy)
            rows += more
            failed |= not_able
            done += 1
    summary: dict[str, Any] = {
        "goals": _cuda_goals(rows) if device == "cuda" else _cpu_goals(rows),
        **({} if device == "cuda" else _limits(rows)),
        "tensors left out for lack of time": len(chosen) - done,
        "peers that do not run": "; ".join(f"{name}: {why}" for name, why in failed.items()) or "none",
    }
    if copy is not None:
        summary["bandwidth of a device-to-device copy, GB/s"] = copy / 1e9
    return {"rows": rows, "summary": summary}


# ---- What is measured -----------------------------------------------------------------------------------------------


def _settings(device: str, quick: bool) -> Iterator[Setting]:
    """Grouped by dtype."""
    if quick:
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        for shape, layout in itertools.product([(32, 64, 56, 56), (32, 512, 7, 7)], LAYOUTS):
            yield Setting(shape, layout, dtype)
        yield Setting(ODD[-1], "contiguous", torch.float16)
        return
    yield from _cuda_settings() if device == "cuda" else _cpu_settings()


def _cpu_settings() -> Iterator[Setting]:
    for dtype in [torch.float32, *OTHER_DTYPES]:
        shapes = RESNET50 if dtype == torch.float32 else RESNET50[2::4]
        yield from (Setting(shape, layout, dtype) for layout in LAYOUTS for shape in shapes)
        yield from (Setting(shape, "contiguous", dtype) for shape in ODD)


def _cuda_settings() -> Iterator[Setting]:
    """The dtypes of training first, in case time runs out; and batch 256, where bfloat16 reaches 64 MiB."""
    for dtype in (torch.bfloat16, torch.float32, torch.float16, torch.float64):
        shapes = RESNET50[2::4] if dtype == torch.float64 else RESNET50
        yield from (Setting(shape, layout, dtype) for layout in LAYOUTS for shape in shapes)
        larger = [] if dtype == torch.float64 else [Setting((256, *s[1:]), "", dtype) for s in RESNET50]
        for layout, setting in itertools.product(LAYOUTS, larger):
            if LARGE <= setting.bytes <= 8 * LARGE:
                yield setting._replace(layout=layout)
        for shape in [*ODD, (1, 256, 56, 56)]:
            yield Setting(shape, "contiguous", dtype)
        yield from (Setting(shape, "channels_last", dtype) for shape in ODD if len(shape) == 4)


def _rows(
    setting: Setting, pool: Tensor, device: str, quick: bool, copy: float | None
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    feed = pairs(setting, pool)
    with torch.no_grad():
        errors = check(feed[0])
        running, failed = able(contestants(feed[0], device), feed[0])
        times = measure(
            running, feed, device, rounds_of(device, quick), budget=3 if device == "cuda" else 8,
            calls=max(2, min(32, (1 << 30) // setting.bytes)),
        )  # fmt: skip
    rows = _warm_rows(setting, feed, running, errors, quick) if device == "cpu" and setting.is_resnet50() else []
    for operator in READS:
        passes = READS[operator] + WRITES[operator]
        moved = passes * setting.bytes
        floor = _floor_on_cpu(operator, times) if copy is None else [moved / copy] * len(times[operator])
        row = {"operator": operator, **setting.columns(), **comparison(times, operator, PEERS[operator], floor)}
        row["GB/s"] = moved / (1e3 * row["us"])
        row |= {"error": errors.get(operator), "_floor GB/s": moved / (1e3 * row["floor us"]), "_passes": passes}
        rows.append({**row, "_large": setting.bytes >= LARGE, "_resnet50": setting.is_resnet50()})
    return rows, failed


def _warm_rows(
    setting: Setting, feed: list[Pair], contestants: dict[str, Contestant], errors: dict[str, float], quick: bool
) -> list[dict[str, Any]]:
    """Of the moments of a tensor that has just been written, by all threads."""
    names = [name for name in ("moments", *PEERS["moments"]) if name != "var_mean"]  # which is twenty times as slow
    chosen = {name: contestants[name] for name in names if name in contestants}
    with torch.no_grad():
        times = measure(
            chosen, feed, "cpu", rounds=5 if quick else 41, budget=4, calls=1,
            before=lambda x, dy, raw_x, raw_dy: torch.neg(raw_x, out=raw_x),
        )  # fmt: skip
    row: dict[str, Any] = {"operator": "moments, warm", **setting.columns()}
    row |= comparison(times, "moments", PEERS["moments"], times["x.sum()"])
    row |= {"GB/s": setting.bytes / (1e3 * row["us"]), "error": errors["moments"], "_passes": 1}
    row |= {"_floor GB/s": setting.bytes / (1e3 * row["floor us"]), "_large": False, "_resnet50": True}
    return [row]


def _floor_on_cpu(operator: str, times: Times) -> list[float]:
    """Seconds in each round."""
    read, read_two, write = times["x.sum()"], times["dot(x, dy)"], times["add(x, 1)"]
    write_from_two = times["add(x, dy)"]
    return {
        "moments": read,
        "accumulate": read,
        "normalize": write,
        "backward_reduce": read_two,
        "backward_apply": write_from_two,
        "forward": [a + b for a, b in zip(read, write, strict=True)],
        "backward": [a + b for a, b in zip(read_two, write_from_two, strict=True)],
    }[operator]


# ---- Goals ----------------------------------------------------------------------------------------------------------


def _cpu_goals(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    goals = []
    for layout, least in zip(LAYOUTS, (4.0, 2.0), strict=True):
        mine = [row for row in rows if (row["_resnet50"], row["dtype"], row["layout"]) == (True, "float32", layout)]
        if not mine:  # time ran out before
            continue
        moments = [row for row in mine if row["operator"] == "moments"]
        share = speeds(moments, "x.sum()")
        peer = speeds(moments, "batch_norm_update_stats")
        write = speeds([row for row in mine if row["operator"] == "normalize"], "add(x, 1)")
        label = f"ResNet-50 float32 {layout}"
        goals += [
            goal(f"moments, {label}, geometric mean: x x.sum()", statistics.geometric_mean(share), at_least=0.85),
            goal(f"moments, {label}, slowest: x x.sum()", min(share), at_least=0.65),
            goal(f"moments, {label}, geometric mean: x update_stats", statistics.geometric_mean(peer), at_least=least),
            goal(f"normalize, {label}, geometric mean: x add", statistics.geometric_mean(write), at_least=0.9),
        ]
        warm = [row for row in mine if row["operator"] == "moments, warm"]
        share, peer = speeds(warm, "x.sum()"), speeds(warm, "batch_norm_update_stats")
        label = f"warm, {label}"
        goals += [
            goal(f"moments, {label}, geometric mean: x x.sum()", statistics.geometric_mean(share), at_least=0.85),
            goal(f"moments, {label}, slowest: x x.sum()", min(share), at_least=0.65),
            goal(f"moments, {label}, geometric mean: x update_stats", statistics.geometric_mean(peer), at_least=2),
        ]
    every = speeds([row for row in rows if row["operator"].startswith("moments")], "batch_norm_update_stats")
    if every:
        goals.append(goal("moments, slowest of all rows: x batch_norm_update_stats", min(every), at_least=1.0))
    return goals


def _limits(rows: list[dict[str, Any]]) -> dict[str, str]:
    """How many times as fast as update_stats is x.sum() itself: as much as reading once at full speed can reach."""
    limits = {}
    for layout, (operator, warm) in itertools.product(LAYOUTS, {"moments": "", "moments, warm": ", warm"}.items()):
        mine = [row for row in rows if (row["_resnet50"], row["dtype"], row["layout"]) == (True, "float32", layout)]
        mine = [row for row in mine if row["operator"] == operator]
        peer, share = speeds(mine, "batch_norm_update_stats"), speeds(mine, "x.sum()")
        if mine:
            limit = statistics.geometric_mean(peer) / statistics.geometric_mean(share)
            limits[f"x.sum() itself, {layout}{warm}: x update_stats"] = f"{limit:.2f}"
    return limits


def _cuda_goals(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For the tensors of ResNet-50, of every dtype and layout."""
    goals = []
    mine = [row for row in rows if row["_resnet50"]]
    for operator, least in {"moments": 0.9, "normalize": 0.9, "backward_reduce": 0.85, "backward_apply": 0.85}.items():
        share = [1 / row["x floor"] for row in mine if row["operator"] == operator and row["_large"]]
        if share:
            what = f"{operator}, ResNet-50, from 64 MiB up, slowest: of the copy's bytes/s"
            goals.append(goal(what, min(share), at_least=least))
    for operator, peer in {
        "moments": "batch_norm_stats",
        "normalize": "batch_norm_elemt",
        "backward_reduce": "batch_norm_backward_reduce",
        "backward_apply": "batch_norm_backward_elemt",
    }.items():
        times = speeds([row for row in mine if row["operator"] == operator], peer)
        if times:
            mean, least = statistics.geometric_mean(times), 1.2 if operator == "moments" else 1.0
            goals.append(goal(f"{operator}, ResNet-50, slowest: x {peer}", min(times), at_least=1.0))
            goals.append(goal(f"{operator}, ResNet-50, geometric mean: x {peer}", mean, at_least=least))
    return goals


# ---- The page of results --------------------------------------------------------------------------------------------


def page(result: Result) -> dict[str, list[dict[str, Any]]]:
    """What README.md shows: a line for a tensor, and a line for a peer. The JSON has all rows with their quartiles."""
    return {
        "Time of every operator over its floor": _floors(result["rows"]),
        "Times as fast as each peer: geometric mean (slowest), over the shapes of ResNet-50, or the others": _peers(
            result["rows"]
        ),
    }


def _floors(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    lines: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        tensor = {name: row[name] for name in ("shape", "layout", "dtype", "MiB")}
        line = lines.setdefault(tuple(tensor.values()), tensor)
        if row["operator"] in ("moments", "normalize", "backward_apply"):
            passes = "1 pass" if row["_passes"] == 1 else f"{row['_passes']} passes"
            line[f"floor of {passes}, us"] = row["floor us"]
        line[row["operator"]] = row["x floor"]
    first = ["shape", "layout", "dtype", "MiB"]
    return [
        {
            name: line.get(name)
            for name in (*first, *sorted(n for n in line if n.startswith("floor")), *READS, "moments, warm")
        }
        for line in lines.values()
    ]


def _peers(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    lines = []
    columns = [
        (dtype, layout, resnet50)
        for dtype in map(dtype_name, (torch.float32, torch.bfloat16, torch.float16, torch.float64))
        for layout, resnet50 in (*((layout, True) for layout in LAYOUTS), ("contiguous", False))
    ]
    for operator, peers in {"moments, warm": PEERS["moments"], **PEERS}.items():
        for peer in peers:
            line: dict[str, Any] = {"operator": operator, "peer": peer}
            for dtype, layout, resnet50 in columns:
                key = operator, dtype, layout, resnet50
                mine = [r for r in rows if (r["operator"], r["dtype"], r["layout"], r["_resnet50"]) == key]
                if times := speeds(mine, peer):
                    where = layout if resnet50 else "other shapes"
                    line[f"{dtype} {where}"] = f"{statistics.geometric_mean(times):.3g} ({min(times):.3g})"
            if len(line) > 2:
                lines.append(line)
    return lines
