"""Does shuffling stop a leak? Two processes learn odd from even digits, each on mini-batches of one class alone.

The label of a sample can then be read off its mini-batch, and BatchNorm hands that on ("Rethinking 'Batch' in
BatchNorm", Wu & Johnson 2021, section 6). A network that reads it there is right in training and wrong on any image by
itself. The more noise is on the images, the less there is to be learnt from them, and the more from the leak. In every
step the classes of the two ranks are drawn anew, one each; so both ranks together have as many of either, always.
"""

from statistics import mean
from typing import Any

from benchmarks.harness import Question, Result, goal
from benchmarks.questions._leak_ranks import train_all

__all__ = ["QUESTION", "run"]

QUESTION = Question(
    "Does ShuffleBN stop a leak through mini-batches?",
    against="`nn.BatchNorm2d`, GhostBN, one BatchNorm over all ranks (SyncBatchNorm)",
    devices=("cpu",),
    threads=1,
)

NOISE = (0.0, 0.25, 0.5)
STEPS, SEEDS = 100, 3


def run(device: str = "cpu", quick: bool = False, deadline: float = float("inf")) -> Result:
    """Accuracies in percent, means over seeds; and what a rank sends of the samples in a step, gradients included."""
    rows: list[dict[str, Any]] = []
    for noise in NOISE[-1:] if quick else NOISE:
        found = train_all(noise, 30 if quick else STEPS, 1 if quick else SEEDS)
        rows += [{"noise": noise} | row for row in found]
    last = {row["head"]: row["on test images"] for row in rows if row["noise"] == NOISE[-1]}
    ours, leaking, together = last["ShuffleBN"], last["BatchNorm"], last["one BatchNorm over both ranks"]
    gaps = {
        head: mean(row["accuracy in training"] - row["on test images"] for row in rows if row["head"] == head)
        for head in last
    }
    summary = {
        "training minus test accuracy, mean over noise": ", ".join(f"{head} {gap:.1f}" for head, gap in gaps.items()),
        "goals": [
            goal("points of test accuracy over BatchNorm, most noise", ours - leaking, at_least=5),
            goal("points of test accuracy under one BatchNorm over both ranks, most noise", together - ours, at_most=3),
        ],
    }
    return {"rows": rows, "summary": summary}
