"""How fast is a diff of two states, and how much memory does it take? ResNet-50 in memory, and files of 1e9 values.

What to expect. To find that nothing differs, both sides are read once and compared as integers: the speed of
``torch.equal`` on the widest integers, which is that of memory, and of a plain read where the files are in the system's
cache; from a disk, that of the disk. Where values differ, ten short passes over pieces that stay in the cache take 1.1
ns a value on one thread (measured one by one): 7 GB/s of both files together, where ``torch.equal`` stops at the first
value. Memory: a piece of 16 MiB of either file and 3 MiB of scratch, whatever the size of the files; half of a GPU's
or a laptop's memory is not needed to compare what fills it.

Files are compared in a process of their own, each time: the peak is the most that the process has held, pages of mapped
files counted, beyond what it held before. Its peers are a plain read of both files, ``torch.equal`` tensor by tensor
over mapped files, and the few lines that one writes for the largest difference and the root mean square in float64.
"""

import copy
import json
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import precisebn
from benchmarks.harness import Question, Result, goal
from benchmarks.harness.timing import Times, comparison, in_time, interleave, now, quartiles, ratios, speeds
from benchmarks.peers import installed, missing

__all__ = ["QUESTION", "run"]

QUESTION = Question(
    "How fast is a diff of two states, and in how much memory?",
    against="`torch.equal` tensor by tensor, a plain read of the files, plain float64, `deepcopy` of a state dict",
    devices=("cpu",),
    share=3,
)
OURS = "precisebn"
VALUES, TENSORS = 1_000_000_000, 40
ROOT = Path(__file__).parents[2]


def run(device: str = "cpu", quick: bool = False, deadline: float = float("inf")) -> Result:
    """Rows of a model in memory, then of files."""
    rows = _in_memory(quick)
    values = VALUES // 100 if quick else VALUES
    for suffix in in_time(_suffixes(), deadline):
        rows += _of_files(suffix, values, 1 if quick else 3)
    goals = [
        goal("resnet50, equal: x torch.equal", _speed(rows, "resnet50, equal", "torch.equal"), at_least=0.8),
        goal("resnet50, all different: x plain float64", _speed(rows, "resnet50, all different", "plain float64"),
             at_least=1.0),
        goal("snapshot of resnet50: x deepcopy", _speed(rows, "resnet50, snapshot", "deepcopy"), at_least=1.0),
    ]  # fmt: skip
    files = [row for row in rows if "peak MiB" in row]
    if files:
        equal, different = ([row for row in files if kind in row["what"]] for kind in ("equal", "different"))
        goals += [
            goal("equal files, slower format: x plain read", min(speeds(equal, "plain read")), at_least=0.8),
            goal("equal files, slower format: x torch.equal", min(speeds(equal, "torch.equal")), at_least=1.0),
            goal("different files, slower format: x plain float64", min(speeds(different, "plain float64")),
                 at_least=2.0),
            goal("memory beyond the start, largest [MiB]", max(row["peak MiB"] for row in files), at_most=64),
        ]  # fmt: skip
    return {"rows": rows, "summary": {"goals": goals, "peers": missing(["torchvision", "safetensors"])}}


def _speed(rows: list[dict[str, Any]], what: str, peer: str) -> float:
    return speeds([row for row in rows if row["what"] == what], peer)[0]


# ---- In memory -------------------------------------------------------------------------------------------------------


def _in_memory(quick: bool) -> list[dict[str, Any]]:
    models = installed("torchvision.models")
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(*[nn.Linear(512, 512) for _ in range(90)]) if models is None else models.resnet50()
    same, other = copy.deepcopy(model), copy.deepcopy(model)
    with torch.no_grad():
        for tensor in (*other.parameters(), *other.buffers()):
            tensor.copy_(tensor * 1.001 + 1)
    assert precisebn.diff_state(model, same).is_empty
    assert not precisebn.diff_state(model, other).unchanged
    rounds = 3 if quick else 15
    works: dict[str, dict[str, Callable[[], object]]] = {
        "resnet50, equal": {
            OURS: lambda: precisebn.diff_state(model, same),
            "torch.equal": lambda: [torch.equal(a, b) for a, b in _pairs(model, same)],
        },
        "resnet50, all different": {
            OURS: lambda: precisebn.diff_state(model, other),
            "plain float64": lambda: [_plain_numbers(a, b) for a, b in _pairs(model, other)],
        },
        "resnet50, snapshot": {
            OURS: lambda: precisebn.snapshot(model),
            "deepcopy": lambda: copy.deepcopy(model.state_dict()),
        },
    }
    nbytes = sum(tensor.nbytes for tensor in model.state_dict().values())
    rows = []
    for what, contestants in works.items():
        times = interleave({name: _timed(work) for name, work in contestants.items()}, rounds)
        row = comparison(times, OURS, [name for name in contestants if name != OURS])
        read = nbytes if "snapshot" in what else 2 * nbytes
        middle = 1e-6 * row.pop("us")
        low, high = (1e-6 * each for each in row.pop("quartiles"))
        head = {"what": what, "values": nbytes // 4, "seconds": middle, "quartiles": [low, high]}
        rows.append({**head, "GB/s": read / middle / 1e9, **row})
    return rows


def _pairs(before: nn.Module, after: nn.Module) -> list[tuple[Tensor, Tensor]]:
    return list(zip(before.state_dict().values(), after.state_dict().values(), strict=True))


def _plain_numbers(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    d = b.double() - a.double()
    return d.abs().max(), d.square().mean().sqrt()


def _timed(work: Callable[[], object]) -> Callable[[], float]:
    def once() -> float:
        start = now()
        work()
        return now() - start

    return once


# ---- Files -----------------------------------------------------------------------------------------------------------


def _suffixes() -> list[str]:
    return [".pt"] if installed("safetensors") is None else [".pt", ".safetensors"]


def _of_files(suffix: str, values: int, rounds: int) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder) / f"{name}{suffix}" for name in ("small", "before", "same", "other")}
        _save({"weight": torch.ones(64)}, paths["small"])
        torch.manual_seed(0)
        state = {f"layers.{i}.weight": torch.randn(values // TENSORS) for i in range(TENSORS)}
        _save(state, paths["before"])
        _save(state, paths["same"])
        for tensor in state.values():
            tensor.mul_(1.001)
        _save(state, paths["other"])
        del state
        _check(paths)
        return [
            _row(f"equal {suffix} files", values, paths, "same", ["plain read", "torch.equal"], rounds),
            _row(f"different {suffix} files", values, paths, "other", ["plain read", "plain float64"], rounds),
        ]


def _save(state: dict[str, Tensor], path: Path) -> None:
    if path.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file(state, path)
    else:
        torch.save(state, path)


def _check(paths: dict[str, Path]) -> None:
    """Correct before fast; every value of the other file is 0.1% larger."""
    assert precisebn.diff_state(paths["before"], paths["same"]).is_empty
    diff = precisebn.diff_state(paths["before"], paths["other"])
    assert len(diff.changed) == TENSORS
    assert all(abs(row.relative - 0.001) < 1e-6 for row in diff.changed if row.relative is not None)


def _row(what: str, values: int, paths: dict[str, Path], after: str, peers: list[str], rounds: int) -> dict[str, Any]:
    times: Times = {name: [] for name in (OURS, *peers)}
    peaks: dict[str, list[int]] = {name: [] for name in times}
    for turn in range(rounds):
        for name in random.Random(turn).sample(list(times), len(times)):
            found = _measured(name, paths["small"], paths["before"], paths[after])
            times[name].append(found["seconds"])
            peaks[name].append(int(found["peak"]))
    against = {peer: quartiles(ratios(times[peer], times[OURS])) for peer in peers}
    texts = [f"{peer} {middle:.3g} ({low:.3g} to {high:.3g})" for peer, (low, middle, high) in against.items()]
    low, middle, high = quartiles(times[OURS])
    return {
        "what": what,
        "values": values,
        "seconds": middle,
        "quartiles": [low, high],
        "GB/s": 2 * paths["before"].stat().st_size / middle / 1e9,
        "peak MiB": max(peaks[OURS]) / 2**20,
        **{f"{peer}, peak MiB": statistics.median(peaks[peer]) / 2**20 for peer in peers},
        "times as fast as (quartiles)": ", ".join(texts),
        "_peers": against,
    }


def _measured(contestant: str, small: Path, before: Path, after: Path) -> dict[str, float]:
    module = "benchmarks.questions._state_files"
    command = [sys.executable, "-m", module, contestant, str(small), str(before), str(after)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    found: dict[str, float] = json.loads(done.stdout)
    return found
