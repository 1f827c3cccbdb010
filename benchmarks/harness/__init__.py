"""What every benchmark shares: questions, timing, inputs, the machine, results, and the page that shows them."""

from benchmarks.harness.question import Question
from benchmarks.harness.results import Result, goal

__all__ = ["Question", "Result", "goal"]
