"""Peers beyond torch: who is installed, and who needs help to be imported.

What is not installed is left out and named in the result, so that the same command runs anywhere.
"""

import importlib
from collections.abc import Iterable
from types import ModuleType

import torch

_kept: list[torch.library.Library] = []  # a Library takes its operators along when it is collected


def installed(name: str) -> ModuleType | None:
    """The module, or None where it, or what it needs, is not installed."""
    if name.partition(".")[0] in ("torchvision", "timm"):
        _help_torchvision()
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def missing(names: Iterable[str]) -> str:
    """``"apex: not installed"`` and so on; empty where nothing is missing."""
    return ", ".join(f"{name}: not installed" for name in names if installed(name) is None)


def _help_torchvision() -> None:
    """Define operators that torchvision registers fake kernels for when it is imported.

    Beside a CPU build of torch, torchvision's compiled operators are often not there, and the import fails.
    """
    try:
        importlib.import_module("torchvision")
    except ImportError:
        return
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _kept.append(library)
