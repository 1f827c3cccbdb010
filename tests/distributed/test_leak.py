"""A leak through BatchNorm, and what stops it: two processes, of which each has mini-batches of a single class.

A sample is 16 coins, of which one class shows heads a little more often than tails, and the other less. A sample by
itself tells its class in seven cases of eight at best, a mini-batch of one class always: by the mean of any coin. And
BatchNorm hands that mean on with every coin of a sample: heads are less than a standard deviation above the mean where
heads are frequent ("Rethinking 'Batch' in BatchNorm", arXiv 2105.07576, section 6).
"""

from collections.abc import Callable

import processes
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from processes import Outcome, Result
from torch import Tensor, nn

from precisebn import update_bn_stats
from precisebn.nn import GhostBN, ShuffleBN, SyncBN

COINS, BIAS = 16, 0.15
BATCH, STEPS, TAIL = 32, 150, 50
"""Samples of a rank, steps, and over how many of the last the accuracy in training is taken."""

CHANCE = 3 * (0.9 * 0.1 / (2 * BATCH * TAIL)) ** 0.5
"""Three standard errors of an accuracy of 90% in training."""


def thrown(labels: Tensor, generator: torch.Generator) -> Tensor:
    chances = 0.5 + BIAS * (2 * labels.float().unsqueeze(1) - 1)
    return (torch.rand(len(labels), COINS, generator=generator) < chances).float()


def data(n: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 2
    return thrown(labels, generator), labels


def batches_of(step: int, world: int) -> list[tuple[Tensor, Tensor]]:
    """Of each rank: all of one class, of another one on each, and which on which by chance."""
    generator = torch.Generator().manual_seed(step)
    first = int(torch.randint(2, (), generator=generator))
    every = []
    for rank in range(world):
        labels = torch.full((BATCH,), (first + rank) % 2)
        every.append((thrown(labels, generator), labels))
    return every


def head(bn: Callable[[int], nn.Module] = nn.BatchNorm1d) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(bn(COINS), nn.Linear(COINS, 32), nn.ReLU(), nn.Linear(32, 2))


HEADS: dict[str, Callable[[], nn.Module]] = {
    "BatchNorm": head,
    "ShuffleBN": lambda: ShuffleBN(head(), sizes="equal"),
    "SyncBN": lambda: head(SyncBN),
    "GhostBN": lambda: head(lambda channels: GhostBN(channels, ghost_size=16)),
}


def trained(rank: int, world: int, name: str) -> dict[str, float]:
    """Accuracies: in the last steps of training, and on new samples by population statistics."""
    model = HEADS[name]()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    right = torch.zeros(())
    for step in range(STEPS):
        x, labels = batches_of(step, world)[rank]
        optimizer.zero_grad()
        logits = model(x)
        F.cross_entropy(logits, labels).backward()
        average([p.grad for p in model.parameters()], world)
        optimizer.step()
        if step >= STEPS - TAIL:
            right += (logits.argmax(1) == labels).float().mean() / TAIL
    dist.all_reduce(right)
    seen, _ = data(2048, seed=1000 + rank)
    update_bn_stats(model, seen.split(64), None)
    test, labels = data(4000, seed=2000)
    return {"train": float(right) / world, "test": (model.eval()(test).argmax(1) == labels).float().mean().item()}


def average(gradients: list[Tensor], world: int) -> None:
    flat = nn.utils.parameters_to_vector(gradients)
    dist.all_reduce(flat)
    nn.utils.vector_to_parameters(flat / world, gradients)


def leak(rank: int, world: int) -> Result:
    return {name: trained(rank, world, name) for name in HEADS}


@pytest.fixture(scope="module")
def accuracies(tmp_path_factory: pytest.TempPathFactory) -> Result:
    processes.skip_without_gloo()
    first, second = Outcome([leak], 2, tmp_path_factory.mktemp("leak")).of(leak)
    assert first == second
    return first


def best_possible() -> float:
    """Of one sample by itself: whether more than half of the coins show heads, and a guess if just half do."""
    test, labels = data(4000, seed=2000)
    heads = test.sum(1)
    guessed = heads == COINS / 2
    return torch.where(guessed, 0.5, ((heads > COINS / 2) == labels).float()).mean().item()


@pytest.mark.parametrize("name", ["BatchNorm", "GhostBN"])
def test_a_head_that_can_read_its_mini_batch_learns_nothing_of_its_samples(accuracies, name):
    """Better in training than anyone can be who looks at the sample; and far worse on new samples than it could be."""
    assert accuracies[name]["train"] > best_possible() + CHANCE
    assert accuracies[name]["test"] < best_possible() - 0.15


@pytest.mark.parametrize("name", ["ShuffleBN", "SyncBN"])
def test_shuffled_or_together_the_mini_batches_tell_nothing_and_it_learns_what_there_is(accuracies, name):
    assert accuracies[name]["train"] < best_possible() + CHANCE
    assert accuracies[name]["test"] > best_possible() - 0.05
    assert accuracies[name]["test"] > accuracies["BatchNorm"]["test"] + 0.2
