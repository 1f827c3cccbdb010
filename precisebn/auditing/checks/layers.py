"""Layers and precision: parameters that do nothing, and statistics in dtypes that cannot hold them."""

import math
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor, fx, nn

from precisebn.auditing.check import Problem, check
from precisebn.auditing.norms import is_training, keepers, kept
from precisebn.auditing.subject import Subject
from precisebn.models.families import is_batch_norm, is_frozen, normalizes_its_input
from precisebn.models.selection import named_modules

__all__ = ["eps_too_small", "half_precision", "wasted_bias"]


@check(
    "PBN601", "note", "a bias that BatchNorm takes away again",
    source="Batch Normalization, arXiv 1502.03167, section 3.2",
)  # fmt: skip
def wasted_bias(subject: Subject) -> Iterator[Problem]:
    """``conv(bias=True)`` straight before BatchNorm: the mean that is subtracted holds the bias, whatever it is.

    Only where the order of layers is known without running them: neighbours in an nn.Sequential, and the graph of an
    fx.GraphModule. Not before layers that are frozen, which subtract a mean that does not follow.
    """
    places = Counter(module for _, module in named_modules(subject.model, remove_duplicate=False))
    wasted = [
        name
        for name, conv, norm in _neighbours(subject)
        if isinstance(conv, _BIASED) and conv.bias is not None and conv.bias.requires_grad
        and is_batch_norm(norm) and not is_frozen(norm) and (norm.training or not is_training(subject))
        and normalizes_its_input(norm) and getattr(norm, "num_features", None) == _channels(conv)
        and places[conv] == 1
    ]  # fmt: skip
    if wasted:
        yield Problem(
            "Their bias is subtracted again by the BatchNorm that follows, and its gradient is zero but for rounding.",
            "Build them with bias=False.",
            wasted,
        )


_BIASED = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear,
)  # fmt: skip


def _channels(layer: nn.Module) -> object:
    return layer.out_features if isinstance(layer, nn.Linear) else getattr(layer, "out_channels", None)


def _neighbours(subject: Subject) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """Pairs of modules of which the output of the first goes to the second, and nowhere else; with the first's name."""
    names = {module: name for name, module in subject.modules.items()}
    for module in subject.modules.values():
        if isinstance(module, fx.GraphModule):
            pairs = _neighbours_in_graph(module)
        elif isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
            pairs = _neighbours_in_sequence(module)
        else:
            continue
        for first, second in pairs:
            if first in names:
                yield names[first], first, second


def _neighbours_in_sequence(container: nn.Sequential) -> Iterator[tuple[nn.Module, nn.Module]]:
    parts = [part for part in container if not isinstance(part, nn.Identity)]
    yield from pairwise(parts)


def _neighbours_in_graph(module: fx.GraphModule) -> Iterator[tuple[nn.Module, nn.Module]]:
    called = dict(module.named_modules())
    for node in module.graph.nodes:
        source = node.args[0] if node.op == "call_module" and node.args else None
        if isinstance(source, fx.Node) and source.op == "call_module" and len(source.users) == 1:
            yield called[str(source.target)], called[str(node.target)]


@check(
    "PBN602", "warning", "BatchNorm in half precision",
    source="https://github.com/NVIDIA/apex/pull/144",
)  # fmt: skip
def half_precision(subject: Subject) -> Iterator[Problem]:
    """A moving average in bfloat16 stands still once its steps are below 1/256 of it; in float16 variances overflow."""
    by_dtype: dict[tuple[torch.dtype, bool], list[str]] = {}
    for name, layer in subject.norms.items():
        halves = {t.dtype for t in _own_tensors(layer) if t.dtype in (torch.float16, torch.bfloat16)}
        for dtype in sorted(halves, key=str):
            by_dtype.setdefault((dtype, layer.training and not is_frozen(layer)), []).append(name)
    for (dtype, training), names in by_dtype.items():
        digits = torch.finfo(dtype).eps
        yield Problem(
            f"Their statistics or parameters are {str(dtype).removeprefix('torch.')}, which "
            + (
                f"loses changes below {digits / 2:.2%} of a value, as most of a moving average's are."
                if training
                else f"holds them to {digits / 2:.2%}: enough to deploy, not to train."
            ),
            "Train in float32 under torch.autocast, where BatchNorm takes half precision and keeps its own in float32; "
            "layer.float() for each of these.",
            names,
            None if training else "note",
        )


def _own_tensors(layer: nn.Module) -> Iterator[Tensor]:
    yield from (t for t in (*layer._parameters.values(), *layer._buffers.values()) if t is not None)


@check(
    "PBN603", "warning", "eps too small",
    source="https://github.com/pytorch/vision/issues/2599",
)  # fmt: skip
def eps_too_small(subject: Subject) -> Iterator[Problem]:
    """A constant channel is divided by ``sqrt(eps)``, which must neither be zero in its dtype nor blow up rounding.

    torch adds eps in float32 at least, but frozen layers and the fusion with a convolution add it in the dtype of the
    variance. And below the square of float32's own precision, 1.4e-14, the rounding of values of a constant channel
    comes out as large as what a normalized channel varies.
    """
    rounding = torch.finfo(torch.float32).eps ** 2
    small: dict[float, list[str]] = {}
    for name, layer in keepers(subject).items():
        for one in kept(layer)[:1]:  # all populations of a layer have one eps
            vanishes = one.var.is_floating_point() and not torch.tensor(one.eps, dtype=one.var.dtype, device="cpu")
            if not math.isnan(one.eps) and (vanishes or one.eps < rounding):
                small.setdefault(one.eps, []).append(name)
    for eps, names in small.items():
        yield Problem(
            f"eps is {eps:g}: a channel that is constant, or whose variance underflows, becomes NaN, Inf or noise.",
            "layer.eps = 1e-5, torch's default (at the cost of slightly other outputs).",
            names,
        )
