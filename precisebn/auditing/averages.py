"""Averages of weights: the wrappers that keep one, by the class that they are of."""

from typing import Any

from torch import nn
from torch.optim.swa_utils import AveragedModel

__all__ = ["averages_in", "number_averaged"]


def averages_in(model: nn.Module) -> dict[str, nn.Module]:
    """Torch's AveragedModel (Lightning's WeightAveraging makes one) and timm's ModelEmaV2 and V3, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, AveragedModel)
        or (type(module).__module__ == "timm.utils.model_ema" and type(module).__name__.startswith("ModelEma"))
    }


def number_averaged(average: nn.Module) -> int:
    """How many models have gone into an AveragedModel; 0 for other averages, which do not count."""
    count: Any = average.n_averaged if isinstance(average, AveragedModel) else 0
    return int(count)
