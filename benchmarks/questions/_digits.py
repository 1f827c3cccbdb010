"""The network of ``examples/digits.py``, stopped when it has learnt its task and its running averages lag behind."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from examples.digits import BATCH_SIZE, LEARNING_RATE, digits, shuffled, small_resnet, train_one_epoch

NUM_EPOCHS = 8


def trained(seed: int) -> tuple[nn.Module, TensorDataset, TensorDataset]:
    """The network, and the data that it was trained on and is tested on."""
    torch.manual_seed(seed)
    train_data, test_data = digits()
    model = small_resnet()
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE)
    loader = shuffled(train_data, BATCH_SIZE, seed, drop_last=True)
    for _ in range(NUM_EPOCHS):
        train_one_epoch(model, loader, optimizer)
    return model, train_data, test_data


def endless(data: TensorDataset, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Images in shuffled mini-batches, without end."""
    loader = shuffled(data, batch_size, seed, drop_last=True)
    while True:
        for images, _ in loader:
            yield images


def distance(model: nn.Module, reference: nn.Module) -> float:
    """How far statistics lie from the reference's: in the units of standard errors, and the worst layer's."""
    statistics, exact = dict(model.named_buffers()), dict(reference.named_buffers())
    distances = []
    for layer in [name.removesuffix(".running_var") for name in exact if name.endswith(".running_var")]:
        mean, var = f"{layer}.running_mean", f"{layer}.running_var"
        scale = exact[var] + 1e-5  # every layer's eps
        distances.append((statistics[mean] - exact[mean]).square().div(scale).mean().sqrt().item())
        distances.append((statistics[var] - exact[var]).div(scale).square().mean().sqrt().item())
    return max(distances)
