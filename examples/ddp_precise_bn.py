"""Training over several processes with statistics that are the same everywhere: DDP or FSDP2, BatchNorm or SyncBN.

Every process trains on its part of scikit-learn's digits. With plain BatchNorm each normalizes by its own mini-batches,
and running averages know one process's data alone. Before each evaluation ``precisebn.recalibrated`` replaces them, in
all processes, by the exact statistics of all the data, and puts them back for the training to go on. In the end they
are replaced for good, ``precisebn.check_ranks`` makes sure that all processes hold the same model, and process 0 saves;
``--resume`` goes on from there, with any number of processes and either wrapper.

Run: ``torchrun --nproc-per-node 2 examples/ddp_precise_bn.py --wrap ddp --norm plain``
"""

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import precisebn

BATCH_SIZE, LEARNING_RATE = 64, 0.2  # per process


def network(width: int = 16) -> nn.Sequential:
    """A small convolutional network for digits: (N, 1, 8, 8) to logits (N, 10)."""

    def block(channels: int, features: int, stride: int) -> list[nn.Module]:
        return [nn.Conv2d(channels, features, 3, stride, padding=1, bias=False), nn.BatchNorm2d(features), nn.ReLU()]

    convolutions = [*block(1, width, 1), *block(width, 2 * width, 2), *block(2 * width, 4 * width, 2)]
    return nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10))


def wrap(model: nn.Module, how: str, device: torch.device) -> nn.Module:
    """The model as processes train it together."""
    model.to(device)
    if how == "ddp":
        return DistributedDataParallel(model)  # whose forwards hand process 0's running averages to all
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    fully_shard(model, mesh=mesh)  # in place; weight and bias of BatchNorm are sharded too, its buffers are not
    return model


def digits(device: torch.device) -> tuple[TensorDataset, TensorDataset]:
    """1,437 training and 360 test images, (1, 8, 8), values from 0 to 1, and their labels."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(data.images, dtype=torch.float32)[order].unsqueeze(1).to(device) / 16
    labels = torch.tensor(data.target)[order].to(device)
    return TensorDataset(images[360:], labels[360:]), TensorDataset(images[:360], labels[:360])


def train_one_epoch(model: nn.Module, loader: "DataLoader[Any]", optimizer: torch.optim.Optimizer) -> None:
    """Plain supervised training; leaves the model in training mode."""
    model.train()
    for images, labels in loader:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()


@torch.no_grad()
def error_percent(model: nn.Module, data: TensorDataset) -> float:
    """Percentage of wrong answers in eval mode, each process looking at its part of the data."""
    images, labels = (tensor[dist.get_rank() :: dist.get_world_size()] for tensor in data.tensors)
    training = model.training
    wrong = (model.eval()(images).argmax(dim=1) != labels).sum()
    model.train(training)
    dist.all_reduce(wrong)
    return 100 * int(wrong) / len(data)


def save(model: nn.Module, optimizer: torch.optim.Optimizer, epoch: int, path: Path) -> None:
    """Process 0 writes the whole, whatever the wrapper; the others give their parts."""
    state, optimizer_state = get_state_dict(
        model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    if dist.get_rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"model": state, "optimizer": optimizer_state, "epoch": epoch}, path)
    dist.barrier()


def resume(model: nn.Module, optimizer: torch.optim.Optimizer, path: Path) -> int:
    """Load what :func:`save` wrote. Returns the number of epochs done."""
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    set_state_dict(
        model, optimizer,
        model_state_dict=checkpoint["model"], optim_state_dict=checkpoint["optimizer"],
        options=StateDictOptions(full_state_dict=True),
    )  # fmt: skip
    return int(checkpoint["epoch"])


def run(arguments: argparse.Namespace, device: torch.device) -> None:
    """Train, evaluating after each epoch, and save."""
    first = dist.get_rank() == 0
    torch.manual_seed(0)  # all processes begin with the same weights
    train_data, test_data = digits(device)
    sampler: DistributedSampler[Any] = DistributedSampler(train_data, seed=0)
    loader = DataLoader(train_data, BATCH_SIZE, sampler=sampler)

    model: nn.Module = network()
    if arguments.norm == "sync":
        precisebn.convert_sync_batchnorm(model, implementation="precisebn")  # on the CPU too
    model = wrap(model, arguments.wrap, device)
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, momentum=0.9)
    start = resume(model, optimizer, arguments.checkpoint) if arguments.resume else 0

    for epoch in range(start, start + arguments.epochs):
        sampler.set_epoch(epoch)
        train_one_epoch(model, loader, optimizer)
        own = error_percent(model, test_data)
        with precisebn.recalibrated(model, loader, None) as report:
            precise = error_percent(model, test_data)
        if first:
            print(
                f"epoch {epoch}: test error {own:.1f}% with running averages, {precise:.1f}% with PreciseBN", end="; "
            )
            print(f"statistics of {report.num_samples} samples in {report.world_size} processes", flush=True)

    precisebn.update_bn_stats(model, loader, None)
    found = precisebn.check_ranks(model)
    if first:
        print(found)
    found.raise_if_different()
    save(model, optimizer, start + arguments.epochs, arguments.checkpoint)


def main() -> None:
    """Parse the command line, and run as one of torchrun's processes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--wrap", choices=("ddp", "fsdp2"), default="ddp")
    parser.add_argument("--norm", choices=("plain", "sync"), default="plain")
    parser.add_argument("--epochs", type=int, default=3, help="how long to train (default: %(default)s)")
    parser.add_argument("--checkpoint", type=Path, default=Path("build/ddp.pt"), help="(default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    arguments = parser.parse_args()

    cuda = torch.cuda.is_available()
    torch.set_num_threads(1)
    dist.init_process_group("nccl" if cuda else "gloo")
    device = torch.device("cuda", dist.get_node_local_rank()) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    try:
        run(arguments, device)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
