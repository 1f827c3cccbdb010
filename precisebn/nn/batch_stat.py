"""BatchStatBN: batch normalization that uses the statistics of the mini-batch at test time too."""

from torch import Tensor
from torch.fx import Proxy

from precisebn.functional import portable
from precisebn.nn.population import PopulationNorm

__all__ = ["BatchStatBN"]


class BatchStatBN(PopulationNorm):
    r"""Batch normalization with mini-batch statistics in training and at test time.

    .. math:: y = \frac{x - \mathrm{mean}_B}{\sqrt{\mathrm{var}_B + \epsilon}} \cdot \mathrm{weight} + \mathrm{bias}

    over the batch B, whatever the mode ("Rethinking 'Batch' in BatchNorm", arXiv 2105.07576, section 4, "mini-batch in
    inference": such a model has no gap between training and testing, but its output for a sample depends on the others
    in the batch). Running statistics are updated in training as in :class:`torch.nn.BatchNorm2d`, and not used: they
    are there for the way back.

    Use it where the test batch resembles a training batch and may be seen as a whole: R-CNN's second stage, whose batch
    is the proposals of an image; GAN generators; adapting to a shifted domain at test time. Not where single samples
    are to be classified, where the order of the test data is not random, or where samples must not influence each
    other.

    Args:
        num_features: C.
        eps: as in :class:`torch.nn.BatchNorm2d`, as are all the others.
        momentum: of the running statistics.
        affine: whether there are ``weight`` and ``bias``, ``(C,)``.
        track_running_stats: whether there are running statistics.
        device: where parameters and buffers live.
        dtype: theirs.
        bias: whether an affine has a bias; it is a weight alone otherwise.

    Shape:
        ``(N, C, *)``, float32, float64, float16 or bfloat16, to the same.

    Raises:
        InputError: wrong input, or a single value per channel, which has no variance.

    Example:
        >>> import torch
        >>> bn = BatchStatBN(1, eps=0.0).eval()
        >>> bn(torch.tensor([[2.0], [6.0]])).flatten().tolist()
        [-1.0, 1.0]
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``(N, C, *)`` by its own statistics."""
        if isinstance(x, Proxy) and not self.training:  # by torch.fx, of which no sizes are known
            return portable.batch_norm_operator(x, None, None, self.weight, self.bias, True, self.eps)
        return self.normalize_and_track(self.check(x), self.weight, self.bias)
