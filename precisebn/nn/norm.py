"""Norm: the constructor, parameters and buffers of nn.BatchNorm, on every torch."""

from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

__all__ = ["TO_PLAIN", "Norm"]

TO_PLAIN = "convert_to_batchnorm(model, domain=k) makes it a plain BatchNorm (of domain k, where it has several)"
"""The remedy wherever a layer cannot be exported."""


class Norm(_NormBase):
    """Base of the modules of this package: torch's own, as torch 2.13 has it, where ``bias=False`` leaves out the bias.

    Not a ``torch.nn.modules.batchnorm._BatchNorm``, so that nothing that treats those alike (SyncBatchNorm's
    conversion, the fusion of convolutions) replaces it by something with another meaning.

    Args:
        num_features: C.
        eps: as in :class:`torch.nn.BatchNorm2d`, as are all the others.
        momentum: None averages over all mini-batches.
        affine: whether there are ``weight`` and ``bias``.
        track_running_stats: whether there are population statistics.
        device: where parameters and buffers live.
        dtype: theirs.
        bias: whether an affine has a bias; it is a weight alone otherwise.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        if not bias:  # not an argument of torch's before 2.13
            self.register_parameter("bias", None)

    def reset_parameters(self) -> None:
        """Set statistics, weight and bias to what they are at first."""
        self.reset_running_stats()
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def extra_repr(self) -> str:
        """As torch's, which speaks of the bias from 2.13 on."""
        shown: str = super().extra_repr()  # type: ignore[no-untyped-call]
        return shown if self.bias is not None or "bias=" in shown else f"{shown}, bias=False"

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Keep a buffer one, also with ``assign=True`` and a checkpoint of parameters (``keep_vars=True``)."""
        for name in self._buffers:
            value = state_dict.get(prefix + name)
            if isinstance(value, nn.Parameter):
                state_dict[prefix + name] = value.detach()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
