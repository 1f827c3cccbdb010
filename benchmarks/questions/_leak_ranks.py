"""Training on two ranks whose mini-batches are of one class each: what the processes of ``leak.py`` do."""

import datetime
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from examples.digits import digits, small_resnet
from precisebn import convert_ghost, update_bn_stats
from precisebn.nn import ShuffleBN

__all__ = ["HEADS", "WORLD", "train_all"]

WORLD, BATCH, WIDTH, LEARNING_RATE = 2, 64, 8, 0.1
SLOWEST_S = 600
LAST = 20
"""Steps over whose mini-batches the accuracy in training is taken."""

HEADS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "BatchNorm": lambda model: model,
    "GhostBN, ghost batches of 16": lambda model: convert_ghost(model, ghost_size=16),
    "ShuffleBN": lambda model: ShuffleBN(model, sizes="equal"),
    "one BatchNorm over both ranks": lambda model: model,
}
"""What is made of the network. The last is given the mini-batches of both ranks: what SyncBatchNorm computes."""

Row = dict[str, Any]


def train_all(noise: float, steps: int, seeds: int) -> list[Row]:
    """A row for each head, means over the seeds, from two processes.

    Args:
        noise: the standard deviation of what is added to the images, whose values are from 0 to 1.
        steps: of training.
        seeds: how many trainings.
    """
    context = multiprocessing.get_context("spawn")
    with TemporaryDirectory() as folder:
        processes = [context.Process(target=_rank, args=(rank, folder, noise, steps, seeds)) for rank in range(WORLD)]
        try:
            for process in processes:
                process.start()
            for process in processes:
                process.join(SLOWEST_S)
        finally:
            for process in processes:
                if process.pid is not None:
                    process.kill()
                    process.join()
        path = Path(folder, "rows")
        if not path.exists():
            raise RuntimeError("a process of the benchmark `leak` has failed; its traceback stands above")
        rows: list[Row] = torch.load(path)
    return rows


def _rank(rank: int, folder: str, noise: float, steps: int, seeds: int) -> None:
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=SLOWEST_S)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD, timeout=timeout)
    vars(dist)["all_to_all_single"] = _counted  # which the library calls
    rows = []
    for name in HEADS:
        runs = [_train(name, rank, noise, steps, seed) for seed in range(seeds)]
        rows.append({"head": name} | {key: sum(run[key] for run in runs) / seeds for key in runs[0]})
    if rank == 0:
        torch.save(rows, f"{folder}/rows.part")
        Path(folder, "rows.part").rename(Path(folder, "rows"))
    dist.barrier()
    dist.destroy_process_group()


def _train(name: str, rank: int, noise: float, steps: int, seed: int) -> dict[str, float]:
    """Accuracies in percent, and what this rank sends of its samples in a step."""
    common = torch.Generator().manual_seed(seed)  # the same on both ranks
    (images, labels), (test_images, test_labels) = (_odd_or_even(data.tensors, noise, common) for data in digits())
    torch.manual_seed(seed)
    model = HEADS[name](small_resnet(WIDTH))
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE)
    together = name == "one BatchNorm over both ranks"
    of_class = [(labels == label).nonzero().flatten() for label in range(2)]
    right = torch.zeros(())
    _sent.clear()
    for step in range(steps):
        first = int(torch.randint(2, (), generator=common))
        chosen = [_draw(of_class[(first + other) % 2], common) for other in range(WORLD)]
        batch = torch.cat(chosen) if together else chosen[rank]
        optimizer.zero_grad()
        logits = model(images[batch])
        F.cross_entropy(logits, labels[batch]).backward()
        _average([p.grad for p in model.parameters() if p.grad is not None])
        optimizer.step()
        if step >= steps - LAST:
            right += (logits.argmax(1) == labels[batch]).float().mean() / LAST
    dist.all_reduce(right)
    # Population statistics of both ranks' halves of the training images, which are in no order.
    update_bn_stats(model, images[rank::WORLD].split(100), None)
    return {
        "accuracy in training": 100 * float(right) / WORLD,
        "on training images, population statistics": _accuracy(model, images, labels),
        "on test images": _accuracy(model, test_images, test_labels),
        "KiB of samples sent": sum(_sent) / 1024 / steps,
    }


_sent: list[int] = []
_all_to_all = dist.all_to_all_single


def _counted(output: Tensor, samples: Tensor, *arguments: Any, **keywords: Any) -> Any:
    _sent.append(samples.numel() * samples.element_size())
    return _all_to_all(output, samples, *arguments, **keywords)


def _odd_or_even(tensors: tuple[Tensor, ...], noise: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    images, digit = tensors
    return images + noise * torch.randn(images.shape, generator=generator), digit % 2


def _draw(indices: Tensor, generator: torch.Generator) -> Tensor:
    return indices[torch.randint(len(indices), (BATCH,), generator=generator)]


def _average(gradients: list[Tensor]) -> None:
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient) / WORLD)


def _accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return 100 * float((model.eval()(images).argmax(1) == labels).float().mean())
