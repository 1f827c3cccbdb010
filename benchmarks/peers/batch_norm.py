"""Batch norm layers of other packages, which train as torch's does."""

from collections.abc import Callable
from types import ModuleType

from torch import Tensor, nn

from benchmarks.peers import installed


def batch_norm_peers(channels: int, layout: str, device: str) -> dict[str, Callable[[Tensor], Tensor]]:
    """Batch norm layers in training mode of the packages that are installed, by name."""
    found: dict[str, Callable[[Tensor], Tensor]] = {"nn.BatchNorm2d": nn.BatchNorm2d(channels, device=device)}
    timm_layers = installed("timm.layers")
    if timm_layers is not None:
        found["timm BatchNormAct2d"] = timm_layers.BatchNormAct2d(channels, apply_act=False, device=device)
    apex = installed("apex.parallel") if device == "cuda" else None
    if apex is not None:
        found["apex SyncBatchNorm"] = _apex(apex, channels, layout)
    return found


def right_ones(
    layers: dict[str, Callable[[Tensor], Tensor]], x: Tensor, tolerance: float
) -> tuple[dict[str, Callable[[Tensor], Tensor]], dict[str, str]]:
    """Those layers that normalize x as they should, and why the others do not take part."""
    right, failed = {}, {}
    truth = nn.functional.batch_norm(x.detach().double(), None, None, training=True)
    for name, layer in layers.items():
        try:
            error = float((layer(x).detach().double() - truth).abs().max())
        except RuntimeError as reason:
            failed[name] = str(reason).splitlines()[0]
            continue
        if error <= tolerance:
            right[name] = layer
        else:
            failed[name] = f"off by {error:.1g}"
    return right, failed


def _apex(apex: ModuleType, channels: int, layout: str) -> Callable[[Tensor], Tensor]:
    """The layer of apex on one rank; its channel_last takes (N, H, W, C)."""
    if layout == "contiguous":
        layer: nn.Module = apex.SyncBatchNorm(channels).cuda()
        return layer
    last = apex.SyncBatchNorm(channels, channel_last=True).cuda()
    return lambda x: last(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
