"""Run the benchmarks, or one of them; ``python -m benchmarks --help`` tells how."""

import argparse
import importlib
import sys
import time
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import harness

BENCHMARKS = {
    "moments": "the operator `moments` against torch's own and the read bandwidth",
    "update": "update_bn_stats against fvcore, swa_utils and the plain forward",
    "batch_norm": "functional.batch_norm, forward and backward, against torch's",
    "numerics": "the error of the variance over mean / std",
    "tolerance": "samples to accuracy with tolerance=",
}
"""Every benchmark is a module of this package with ``run(quick=False)`` and, if it draws, ``plot(result, path)``."""


def main() -> None:
    """Run what was asked for, print its tables and the goals, and write results."""
    arguments = _parser().parse_args()
    if arguments.readme:
        harness.refresh_readme(arguments.device)
        return
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    console = Console() if sys.stdout.isatty() else Console(width=180)
    path = arguments.json
    if path is None and not arguments.quick:
        path = harness.RESULTS / f"{arguments.device}.json"
    results: dict[str, harness.Result] = {}
    for name in arguments.only or BENCHMARKS:
        results[name] = _run(console, name, arguments, path)
    goals = harness.goals_of(results)
    if goals:
        harness.print_table(console, "goals", goals)
    if path is not None:
        console.print(f"results: {path}")


def _run(console: Console, name: str, arguments: argparse.Namespace, path: Path | None) -> harness.Result:
    benchmark = importlib.import_module(f"benchmarks.{name}")
    machine = harness.machine(arguments.device)
    start = time.perf_counter()
    with console.status(f"{name}: {BENCHMARKS[name]}"):
        result: harness.Result = benchmark.run(quick=arguments.quick)
    result |= {"machine": machine, "quick": arguments.quick, "seconds": round(time.perf_counter() - start, 1)}
    harness.print_table(console, f"{name}: {BENCHMARKS[name]}", result["rows"])
    console.print(f"{harness.describe(machine)}; took {result['seconds']:.0f} s")
    for key, value in result["summary"].items():
        if key != "goals":
            console.print(f"{key}: {harness.format_value(value)}")
    if path is not None:
        harness.save_results(path, {name: result})
        if arguments.plot and hasattr(benchmark, "plot"):
            benchmark.plot(result, path.with_name(f"{arguments.device}-{name}.png"))
    return result


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Benchmarks of precisebn and its peers.")
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
        "--readme", action="store_true", help="rewrite the tables of README.md from results/, and do nothing else"
    )
    parser.add_argument("--device", default="cpu", choices=["cpu"])
    parser.add_argument("--threads", type=int, help="torch.set_num_threads; 1: measure CPU time")
    return parser


if __name__ == "__main__":
    main()
