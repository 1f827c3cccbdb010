"""Batch normalization over ranks as others do it: the peers of the benchmark ``sync``."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules._functions import SyncBatchNorm

__all__ = ["NaiveSyncBatchNorm", "torchs_on_one_rank"]


class NaiveSyncBatchNorm(nn.BatchNorm2d):
    """The formula of detectron2's NaiveSyncBatchNorm: averages over ranks of mean and mean square, in float32.

    Right where all ranks have as many samples, and no mean is large against its standard deviation.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalize by the averages over all ranks."""
        values = x.float() if x.dtype == torch.float16 else x
        moments = torch.cat([values.mean((0, 2, 3)), (values * values).mean((0, 2, 3))])
        mean, mean_square = (_AllReduce.apply(moments) / dist.get_world_size()).split(x.shape[1])  # type: ignore[no-untyped-call]
        var = mean_square - mean * mean
        scale = self.weight * (var + self.eps).rsqrt()
        shift = self.bias - mean * scale
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.momentum is not None
        self.running_mean += self.momentum * (mean.detach() - self.running_mean)
        self.running_var += self.momentum * (var.detach() - self.running_var)
        y: Tensor = values * scale[:, None, None] + shift[:, None, None]
        return y.to(x.dtype)


class _AllReduce(torch.autograd.Function):
    """As fvcore's ``differentiable_all_reduce``."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        dist.all_reduce(total)
        return total


def torchs_on_one_rank(x: Tensor, bn: nn.Module) -> Tensor:
    """What torch's SyncBatchNorm does over ranks, done over one: with a single rank the layer itself does without."""
    # In the order of its arguments; the last is the number of ranks.
    y: Tensor = SyncBatchNorm.apply(
        x, bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.eps, bn.momentum, dist.group.WORLD, 1
    )
    return y
