"""GhostBN: batch normalization over parts of the mini-batch."""

import torch
from torch import Tensor

from precisebn.errors import InputError
from precisebn.functional import batch_norm
from precisebn.nn.population import PopulationNorm

__all__ = ["GhostBN"]


class GhostBN(PopulationNorm):
    r"""Batch normalization with a normalization batch smaller than the SGD batch.

    The samples of a mini-batch are cut, in their order, into ghost batches of ``ghost_size``; the last one may be
    smaller. Each is normalized by its own statistics, for sample i in ghost batch :math:`g = \lfloor i / s \rfloor`:

    .. math:: y_i = \frac{x_i - \mathrm{mean}_g}{\sqrt{\mathrm{var}_g + \epsilon}} \cdot \mathrm{weight} + \mathrm{bias}

    (Hoffer, Hubara & Soudry 2017, "Train longer, generalize better", arXiv 1705.08741, algorithm 1; "Rethinking 'Batch'
    in BatchNorm", arXiv 2105.07576, section 4, on the normalization batch size.) The running statistics are
    those of the whole mini-batch, the Moments of all ghost batches merged, and are updated once a forward. (Hoffer et
    al. update them ghost batch by ghost batch, which weighs the last ones most, and average variances within ghost
    batches, which leaves out what lies between them.) At test time it is plain batch normalization.

    Use it to keep the regularizing noise of small batches when training with large ones, or to reproduce on one device
    what several would do without SyncBatchNorm. Not where batches are small already: there statistics are too noisy.

    Args:
        num_features: C.
        ghost_size: samples in a ghost batch; 1 or more.
        eps: as in :class:`torch.nn.BatchNorm2d`, as are all the others.
        momentum: of the running statistics.
        affine: whether there are ``weight`` and ``bias``, ``(C,)``.
        track_running_stats: whether there are running statistics; without, ghost batches serve at test time too.
        device: where parameters and buffers live.
        dtype: theirs.
        bias: whether an affine has a bias; it is a weight alone otherwise.

    Shape:
        ``(N, C, *)``, float32, float64, float16 or bfloat16, to the same.

    Raises:
        InputError: wrong input, or a ghost batch with a single value per channel, which has no variance.

    Example:
        >>> bn = GhostBN(1, ghost_size=2, eps=0.0, momentum=1.0)
        >>> bn(torch.tensor([[0.0], [2.0], [10.0], [30.0]])).flatten().tolist()
        [-1.0, 1.0, -1.0, 1.0]
        >>> bn.running_mean.item()
        10.5
    """

    def __init__(
        self,
        num_features: int,
        ghost_size: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
    ) -> None:
        if not isinstance(ghost_size, int) or isinstance(ghost_size, bool) or ghost_size < 1:
            raise InputError(f"ghost_size={ghost_size!r} must be a whole number of samples, 1 or more")
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, bias=bias)
        self.ghost_size = ghost_size

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``(N, C, *)``: in training by ghost batches, at test time by the running statistics."""
        x = self.check(x)
        if not self.uses_batch_statistics:
            return self.frozen(x, self.weight, self.bias)
        num_samples = x.shape[0]
        last = num_samples % self.ghost_size or min(num_samples, self.ghost_size)
        if num_samples and last * x[0].numel() == self.num_features:
            raise InputError(
                f"{self._shown()}: x {tuple(x.shape)}, cut into ghost batches of {self.ghost_size}, ends with one of a "
                "single value per channel, which has no variance; drop the data's last samples (drop_last=True), or "
                "choose another ghost_size"
            )
        if num_samples <= self.ghost_size:
            return self.normalize_and_track(x, self.weight, self.bias)
        group = torch.arange(num_samples, device=x.device) // self.ghost_size
        num_groups = -(-num_samples // self.ghost_size)
        y, moments = batch_norm(x, self.weight, self.bias, eps=self.eps, group=group, num_groups=num_groups)
        self.track(moments.sum())
        return y

    def extra_repr(self) -> str:
        """As torch's, and the ghost size."""
        return f"{super().extra_repr()}, ghost_size={self.ghost_size}"
