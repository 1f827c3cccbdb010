"""SyncBN: batch normalization by the statistics of the mini-batches of all ranks."""

from typing import Literal

import torch
from torch import Tensor

from precisebn.distributed import ProcessGroup, sync_group
from precisebn.distributed.collectives import ranks_beside
from precisebn.functional import batch_norm
from precisebn.functional.synchronized import sync_batch_norm
from precisebn.nn.among_ranks import AmongRanks
from precisebn.nn.population import PopulationNorm

__all__ = ["SyncBN", "sync_group"]


class SyncBN(AmongRanks, PopulationNorm):
    r"""Batch normalization over ranks: every rank normalizes by the mini-batches of all of them.

    .. math:: y = \frac{x - \mathrm{mean}_{B_1 \cup \dots \cup B_W}}
        {\sqrt{\mathrm{var}_{B_1 \cup \dots \cup B_W} + \epsilon}} \cdot \mathrm{weight} + \mathrm{bias}

    over the mini-batches :math:`B_r` of W ranks. (Peng et al. 2017, "MegDet", arXiv 1711.07240, which calls it
    Cross-GPU Batch Normalization; "Rethinking 'Batch' in BatchNorm", arXiv 2105.07576, section 4, on the normalization
    batch size.) It is what one process computes on the concatenated mini-batches, however many samples each rank has,
    none and one included: the ranks' Moments merge, by one all-reduce of 2 C + 1 float64 numbers in the forward and one
    of 2 C in the backward.

    It stands where :class:`torch.nn.SyncBatchNorm` does, takes the same arguments and has the same state dict, and also
    runs on the CPU (gloo), in graphs of ``torch.compile(fullgraph=True)``, and in a backward that is to be
    differentiated again. In training only: in evaluation, and wherever there is no other rank, it is plain batch
    normalization, by the running statistics or by the mini-batch at hand, and so it is while
    :func:`precisebn.update_bn_stats` measures, which merges ranks itself. Running statistics are the same bits on all
    ranks, if they were before.

    Gradients of weight and bias are each rank's own share, as torch's are: DistributedDataParallel averages them. All
    ranks of the group must run the layer as often, in the same mode and with as many channels, forward and backward;
    dtypes and sizes may differ. One that does not come is noticed after the timeout of the process group, when all that
    wait raise. (``TORCH_DISTRIBUTED_DEBUG=DETAIL`` lets torch compare what ranks bring.)

    Use it where a rank's mini-batch is too small for statistics of its own: detection, segmentation, video, large
    images. Not to hide from a model which samples share a rank, where a label can be read off the batch: statistics of
    all ranks still are statistics of the batch.

    Args:
        num_features: C.
        eps: as in :class:`torch.nn.BatchNorm2d`, as are the next three.
        momentum: of the running statistics.
        affine: whether there are ``weight`` and ``bias``, ``(C,)``.
        track_running_stats: whether there are running statistics; without, the rank's own mini-batch serves at test
            time too.
        process_group: the ranks: a process group, as of :func:`sync_group`, or a DeviceMesh of one dimension; None is
            all ranks, False this one alone. A deep copy has the same one. An unpickled layer has lost it, and says so
            where it would need it: set ``process_group`` anew.
        device: where parameters and buffers live.
        dtype: theirs.
        bias: whether an affine has a bias; it is a weight alone otherwise.

    Shape:
        ``(N, C, *)``, float32, float64, float16 or bfloat16, to the same.

    Raises:
        InputError: wrong input; without other ranks a single value per channel, which has no variance; a rank that does
            not belong to the process group; a graph that is to run elsewhere, in training.
        RankFailedError: a rank has ended, or has not come within the timeout of the process group.

    Example:
        >>> bn = SyncBN(1, eps=0.0, momentum=1.0)  # on the only rank
        >>> bn(torch.tensor([[2.0], [6.0]])).flatten().tolist()
        [-1.0, 1.0]
        >>> bn.running_mean.item()
        4.0
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: ProcessGroup | Literal[False] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, bias=bias)
        self.process_group = process_group

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``(N, C, *)``: in training by the mini-batches of all ranks, else by the running statistics."""
        x = self.check(x)
        if not self.uses_batch_statistics:
            return self.frozen(x, self.weight, self.bias)
        # What evaluation sees may be of another number of mini-batches on each rank, and so may a recalibration.
        synchronizes = self.training and self.recorder is None
        group = ranks_beside(self.process_group) if synchronizes else None
        if group is None:
            y, moments = batch_norm(x, self.weight, self.bias, eps=self.eps)
        else:
            y, moments = sync_batch_norm(x, self.weight, self.bias, self.eps, group)
        self.track(moments)
        return y
