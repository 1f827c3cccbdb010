"""A benchmark is a question: a module of ``benchmarks.questions``, found by its file; here is what such a module holds.

    QUESTION = Question("How fast is it?", against="torch's")

    def run(device: str, quick: bool, deadline: float) -> Result: ...  # ends soon after time.perf_counter() == deadline
    def plot(result: Result, path: Path) -> None: ...                   # where a picture says more
    def page(result: Result) -> dict[str, list[dict]]: ...              # tables for README.md in place of all rows

A file whose name begins with an underscore is a part of a question.
"""

import importlib
import pkgutil
from dataclasses import dataclass
from types import ModuleType


@dataclass(frozen=True)
class Question:
    """What a benchmark asks, and how it is to be run."""

    asks: str
    against: str
    """The peers, for the page."""
    devices: tuple[str, ...] = ("cpu", "cuda")
    share: int = 1
    """Of the time, where ``--budget`` limits it."""
    threads: int | None = None
    """How many it runs on, where the question fixes that; otherwise torch's default, or ``--threads``."""


def names() -> list[str]:
    """Every benchmark, by the name of its file."""
    import benchmarks.questions

    found = (module.name for module in pkgutil.iter_modules(benchmarks.questions.__path__))
    return [name for name in found if not name.startswith("_")]


def module_of(name: str) -> ModuleType:
    """The module of a benchmark.

    Raises:
        ModuleNotFoundError: it needs a package that is not installed.
    """
    return importlib.import_module(f"benchmarks.questions.{name}")


def question_of(name: str) -> Question:
    """What a benchmark asks."""
    question = module_of(name).QUESTION
    assert isinstance(question, Question)
    return question


def questions() -> dict[str, Question]:
    """Every benchmark, with what it asks."""
    return {name: question_of(name) for name in names()}
