"""What of layers must be the same on all ranks that merge their statistics, in words that ranks can compare."""

from collections.abc import Mapping

import torch
from torch import nn

from precisebn._reports import counted
from precisebn.models.families import populations_of

__all__ = ["describe_layers"]


def describe_layers(layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """What of each layer must be the same on all ranks, in words: what is summed over ranks, and written; by its name.

    Args:
        layers: with running statistics, by name.
    """
    devices: list[torch.device] = []  # those of each device are merged together
    texts = {}
    for name, layer in layers.items():
        populations = populations_of(layer)
        first = populations[0]
        if first.mean.device not in devices:
            devices.append(first.mean.device)
        kinds = " and ".join(dict.fromkeys(str(t.dtype).removeprefix("torch.") for t in (first.mean, first.var)))
        number = f"{counted(len(populations), 'population')} of " if first.index is not None else ""
        untracked = "" if first.num_batches is not None else ", mini-batches not counted"
        place = f", on device {devices.index(first.mean.device)} of the model's" if len(devices) > 1 else ""
        channels = counted(first.mean.numel(), "channel")
        texts[f"layer {name!r}"] = f"{number}{channels} in {kinds}, eps={first.eps:g}{untracked}{place}"
    return texts
