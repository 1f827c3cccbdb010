"""Run the benchmarks, or some of them; ``python -m benchmarks --help`` tells how."""

import argparse
import importlib
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console

from benchmarks import harness


class Benchmark(NamedTuple):
    """What a benchmark asks, and where that makes sense."""

    question: str
    devices: tuple[str, ...] = harness.DEVICES
    share: int = 1
    """Of the time, where ``--budget`` limits it."""
    threads: int | None = None
    """How many it runs on, where the question fixes that; otherwise torch's default, or ``--threads``."""


BENCHMARKS = {
    "kernels": Benchmark("the operators against torch's own and the speed of memory", share=8),
    "update": Benchmark("update_bn_stats against fvcore, swa_utils and the plain forward", share=4),
    "batch_norm": Benchmark("functional.batch_norm, forward and backward, against torch's", share=5),
    "modules": Benchmark("the modules against what they replace", share=4),
    "overhead": Benchmark("what a call costs beside its work", devices=("cpu",), threads=1),
    "numerics": Benchmark("the error of the variance over mean / std"),
    # It counts samples, not seconds: the device would change nothing but the waiting.
    "tolerance": Benchmark("samples to accuracy with tolerance=", devices=("cpu",)),
}
"""Every benchmark is a module of this package; README.md says what it holds."""


def main() -> None:
    """Run what was asked for, print its tables and the goals, and write results."""
    arguments = _parser().parse_args()
    if arguments.readme:
        harness.refresh_readme()
        return
    names = _chosen(arguments)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    console = Console() if sys.stdout.isatty() else Console(width=180)
    path = arguments.json
    if path is None and not arguments.quick:
        path = harness.RESULTS / f"{arguments.device}.json"
    results: dict[str, harness.Result] = {}
    failed = []
    end = time.perf_counter() + arguments.budget
    for i, name in enumerate(names):
        left = end - time.perf_counter()
        deadline = time.perf_counter() + left * BENCHMARKS[name].share / sum(BENCHMARKS[n].share for n in names[i:])
        try:
            results[name] = _run(console, name, arguments, path, deadline)
        except Exception:  # a wrong result, say: the others are worth running nevertheless
            console.print_exception()
            failed.append(name)
    goals = harness.goals_of(results)
    if goals:
        harness.print_table(console, "goals", goals)
    if path is not None:
        console.print(f"results: {path}")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def _chosen(arguments: argparse.Namespace) -> list[str]:
    """The benchmarks to run; ends the program, with one line, where that cannot be done."""
    device = arguments.device
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit(f"--device cuda: torch {torch.__version__} finds no CUDA device here")
    elsewhere = [name for name in arguments.only or () if device not in BENCHMARKS[name].devices]
    if elsewhere:
        sys.exit(f"--device {device}: {', '.join(elsewhere)} does not run there, only on the CPU")
    return arguments.only or [name for name in BENCHMARKS if device in BENCHMARKS[name].devices]


def _run(
    console: Console, name: str, arguments: argparse.Namespace, path: Path | None, deadline: float
) -> harness.Result:
    benchmark = importlib.import_module(f"benchmarks.{name}")
    question = BENCHMARKS[name].question
    start = time.perf_counter()
    with _threads(BENCHMARKS[name].threads), console.status(f"{name}: {question}"):
        machine = harness.machine(arguments.device)
        result: harness.Result = benchmark.run(device=arguments.device, quick=arguments.quick, deadline=deadline)
    result |= {"machine": machine, "quick": arguments.quick, "seconds": round(time.perf_counter() - start, 1)}
    harness.print_table(console, f"{name}: {question}", result["rows"])
    console.print(f"{harness.describe(machine)}; took {result['seconds']:.0f} s")
    for key, value in harness.notes_of(result):
        console.print(f"{key}: {harness.format_value(value)}")
    if path is not None:
        harness.save_results(path, {name: result})
        if arguments.plot and result["rows"] and hasattr(benchmark, "plot"):
            benchmark.plot(result, path.with_name(f"{arguments.device}-{name}.png"))
    return result


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Benchmarks of precisebn and its peers.")
    parser.add_argument("--device", default="cpu", choices=harness.DEVICES)
    parser.add_argument("--only", nargs="+", choices=list(BENCHMARKS), metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--quick", action="store_true", help="small inputs and few rounds: to see that all runs")
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="where to write results (default: results/DEVICE.json; nowhere with --quick)",
    )
    parser.add_argument("--plot", action="store_true", help="draw plots beside the JSON, as DEVICE-NAME.png")
    parser.add_argument(
        "--budget",
        type=float,
        default=float("inf"),
        metavar="SECONDS",
        help="begin nothing more after that time, shared out among the benchmarks; what was left out is said",
    )
    parser.add_argument(
        "--readme", action="store_true", help="rewrite the tables of README.md from results/, and do nothing else"
    )
    parser.add_argument("--threads", type=int, help="torch.set_num_threads; 1: measure CPU time")
    return parser


if __name__ == "__main__":
    main()
