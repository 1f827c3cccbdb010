"""Run the benchmarks, or some of them; ``python -m benchmarks --help`` tells how."""

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.harness import Question, Result
from benchmarks.harness.machine import DEVICES, describe, machine
from benchmarks.harness.page import format_value, notes_of, print_table, refresh_readme
from benchmarks.harness.question import module_of, names, question_of
from benchmarks.harness.results import RESULTS, goals_of, save_results


def main() -> None:
    """Run what was asked for, print its tables and the goals, and write results."""
    arguments = _parser().parse_args()
    if arguments.readme:
        refresh_readme()
        return
    console = Console() if sys.stdout.isatty() else Console(width=180)
    questions = _chosen(console, arguments)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    path = arguments.json
    if path is None and not arguments.quick:
        path = RESULTS / f"{arguments.device}.json"
    results: dict[str, Result] = {}
    failed = []
    end = time.perf_counter() + arguments.budget
    shares = {name: question.share for name, question in questions.items()}
    for name, question in questions.items():
        left = end - time.perf_counter()
        deadline = time.perf_counter() + left * shares[name] / sum(shares.values())
        del shares[name]
        try:
            results[name] = _run(console, name, question, arguments, path, deadline)
        except Exception:  # a wrong result, say: the others are worth running nevertheless
            console.print_exception()
            failed.append(name)
    goals = goals_of(results)
    if goals:
        print_table(console, "goals", goals)
    if path is not None:
        console.print(f"results: {path}")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def _chosen(console: Console, arguments: argparse.Namespace) -> dict[str, Question]:
    """The benchmarks to run; ends the program, with one line, where that cannot be done."""
    device = arguments.device
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit(f"--device cuda: torch {torch.__version__} finds no CUDA device here")
    found = {}
    for name in arguments.only or names():
        try:
            found[name] = question_of(name)
        except ModuleNotFoundError as error:
            if arguments.only:
                sys.exit(f"{name} needs {error.name}, which is not installed: pip install '.[bench]'")
            console.print(f"{name} left out: {error.name} is not installed")
    elsewhere = [name for name, question in found.items() if device not in question.devices]
    if arguments.only and elsewhere:
        sys.exit(f"--device {device}: {', '.join(elsewhere)} does not run there, only on the CPU")
    return {name: question for name, question in found.items() if name not in elsewhere}


def _run(
    console: Console, name: str, question: Question, arguments: argparse.Namespace, path: Path | None, deadline: float
) -> Result:
    benchmark = module_of(name)
    start = time.perf_counter()
    with _threads(question.threads), console.status(f"{name}: {question.asks}"):
        where = machine(arguments.device)
        result: Result = benchmark.run(device=arguments.device, quick=arguments.quick, deadline=deadline)
    result |= {"machine": where, "quick": arguments.quick, "seconds": round(time.perf_counter() - start, 1)}
    print_table(console, f"{name}: {question.asks}", result["rows"])
    console.print(f"{describe(where)}; took {result['seconds']:.0f} s")
    for key, value in notes_of(result):
        console.print(f"{key}: {format_value(value)}")
    if path is not None:
        save_results(path, {name: result})
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
    parser.add_argument("--device", default="cpu", choices=DEVICES)
    parser.add_argument("--only", nargs="+", choices=names(), metavar="NAME", help=", ".join(names()))
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
