"""Layers of libraries that are not installed here, under the names that they have there; nothing imports these."""

import types

import torch
from torch import nn


def pretend(module: str, source: str) -> types.ModuleType:
    """A module with the source and the name of another, as its classes will say."""
    pretended = types.ModuleType(module)
    vars(pretended).update(torch=torch, nn=nn, F=nn.functional)
    exec(compile(source, module, "exec"), vars(pretended))
    return pretended


DETECTRON2 = pretend(
    "detectron2.layers.batch_norm",
    """
class FrozenBatchNorm2d(nn.Module):
    def __init__(self, num_features, eps=1e-5):
        super().__init__()
        self.num_features = num_features
        self.eps = eps
        self.register_buffer("weight", torch.ones(num_features))
        self.register_buffer("bias", torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features) - eps)
        self.register_buffer("num_batches_tracked", None)

    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)

class NaiveSyncBatchNorm(nn.BatchNorm2d):
    def forward(self, input):
        return super().forward(input)
""",
)
APEX = pretend(
    "apex.parallel.optimized_sync_batchnorm",
    """
from torch.nn.modules.batchnorm import _BatchNorm

class SyncBatchNorm(_BatchNorm):
    def __init__(self, num_features, fuse_relu=False, channel_last=False):
        super().__init__(num_features)
        self.fuse_relu, self.channel_last = fuse_relu, channel_last

    def forward(self, input, z=None):
        return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, self.training)
""",
)
