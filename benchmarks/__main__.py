"""Run the benchmarks: ``python -m benchmarks [--only NAME ...] [--quick] [--json FILE] [--plot] [--threads N]``."""

import argparse
import importlib
import time
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import harness

BENCHMARKS = {
    "moments": "the operator `moments` against torch's own and the read bandwidth",
    "update": "update_bn_stats against fvcore, swa_utils and the plain forward",
    "numerics": "the error of the variance over mean / std",
    "tolerance": "samples to accuracy with tolerance=",
}
"""Every benchmark is a module of this package with ``run(quick=False)`` and, if it draws, ``plot(result, path)``."""


def main() -> None:
    """Run what was asked for, print its tables and the goals, and write results."""
    arguments = _parser().parse_args()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    console = Console()
    results: dict[str, harness.Result] = {}
    for name in arguments.only or BENCHMARKS:
        results[name] = _run(console, name, arguments)
    goals = harness.goals_of(results)
    if goals:
        harness.print_table(console, "goals", goals)
    if arguments.json is not None:
        harness.save_results(arguments.json, results)
        console.print(f"results: {arguments.json}")
    if arguments.readme:
        path = Path(__file__).with_name("README.md")
        harness.refresh_readme(path, harness.load_results(arguments.json), arguments.device)


def _run(console: Console, name: str, arguments: argparse.Namespace) -> harness.Result:
    benchmark = importlib.import_module(f"benchmarks.{name}")
    machine = harness.machine(arguments.device)
    start = time.perf_counter()
    with console.status(f"{name}: {BENCHMARKS[name]}"):
        result: harness.Result = benchmark.run(quick=arguments.quick)
    result |= {"machine": machine, "quick": arguments.quick, "seconds": round(time.perf_counter() - start, 1)}
    caption = f"{harness.describe(machine)}; took {result['seconds']:.0f} s"
    harness.print_table(console, f"{name}: {BENCHMARKS[name]}", result["rows"], caption)
    for key, value in result["summary"].items():
        if key != "goals":
            console.print(f"{key}: {harness.format_value(value)}")
    if arguments.plot and hasattr(benchmark, "plot"):
        path = (arguments.json or harness.RESULTS / "x").parent / f"{arguments.device}-{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        benchmark.plot(result, path)
        console.print(f"plot: {path}")
    return result


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Benchmarks of precisebn and its peers.")
    parser.add_argument("--only", nargs="+", choices=list(BENCHMARKS), metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--quick", action="store_true", help="small inputs and few rounds: to see that all runs")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="where to write results (default: results/DEVICE.json)"
    )
    parser.add_argument("--plot", action="store_true", help="draw plots, beside the JSON")
    parser.add_argument("--readme", action="store_true", help="rewrite the tables of README.md from the JSON")
    parser.add_argument("--device", default="cpu", choices=["cpu"])
    parser.add_argument("--threads", type=int, help="torch.set_num_threads; default: torch's")
    return parser


if __name__ == "__main__":
    main()
