"""CycleBatchNormList: one BatchNorm after the other, for a layer that is called on several domains in turn."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.modules.batchnorm import _BatchNorm

from precisebn._torch import in_backward, is_tracing
from precisebn.errors import CycleError, InputError
from precisebn.functional import batch_norm, frozen_batch_norm, portable
from precisebn.nn.norm import TO_PLAIN
from precisebn.nn.population import ACCUMULATOR, STATISTICS, Recordable, Recorder, update_running_statistics

__all__ = ["CycleBatchNormList", "one_cycle"]


class CycleBatchNormList(Recordable):
    r"""Domain-specific BatchNorm by order of calls: call k of a cycle uses BatchNorm k; weight and bias are shared.

    .. math::
        y = \frac{x - \mathrm{mean}_k}{\sqrt{\mathrm{var}_k + \epsilon}} \cdot \mathrm{weight} + \mathrm{bias},
        \quad k = 0, 1, \dots, \mathrm{length} - 1, 0, 1, \dots

    detectron2's class of the same name, with its constructor and state dict ("Rethinking 'Batch' in BatchNorm",
    arXiv 2105.07576, section 5.2 and table 5, row 4), normalization and affine being one pass here.

    Use it in a head that is called on feature levels one by one, in the same order and number every time, and cannot be
    changed. Where it can, :class:`DomainSpecificBN` is told the domain and cannot lose count.

    What goes wrong with counting raises :class:`CycleError` rather than mixing statistics up: a backward, or a forward
    in another mode, that comes after an unfinished cycle. That a cycle ran twice can only be known where it is said
    which code runs it once: :func:`one_cycle` around that code. A deep copy, or one loaded by pickle, starts a cycle
    afresh. Under activation checkpointing the repeated forwards of training neither count nor update statistics.

    Args:
        length: BatchNorms in a cycle.
        bn_class: their class; called with ``affine=False`` and the keyword arguments.
        **kwargs: as ``num_features``, which is needed; ``affine`` and ``bias`` are those of the shared weight and bias.

    Shape:
        What ``bn_class`` takes, to the same.

    State dict:
        ``0.running_mean`` and so on, ``weight``, ``bias``: detectron2's. A plain BatchNorm's checkpoint fills all.

    Raises:
        CycleError: see above.

    Example:
        >>> bn = CycleBatchNormList(2, num_features=8)
        >>> levels = [torch.randn(4, 8, 6, 6), torch.randn(4, 8, 3, 3)]
        >>> [tuple(bn(level).shape) for level in levels]
        [(4, 8, 6, 6), (4, 8, 3, 3)]
        >>> [int(member.num_batches_tracked) for member in bn]
        [1, 1]
    """

    weight: Tensor | None
    bias: Tensor | None

    # Where the cycle stood when a recording began. Of the class unless one lasts, so that no state is left behind.
    _aside: tuple[int, int] | None = None

    def __init__(self, length: int, bn_class: type[nn.Module] = nn.BatchNorm2d, **kwargs: Any) -> None:
        super().__init__()
        if isinstance(length, bool) or not isinstance(length, int) or length < 1:
            raise InputError(f"length={length!r} must be a whole number, 1 or more")
        if "num_features" not in kwargs:
            raise InputError(
                "CycleBatchNormList needs num_features= as a keyword: CycleBatchNormList(length, num_features=C)"
            )
        affine, bias = kwargs.pop("affine", True), kwargs.pop("bias", True)
        self.length = length
        for k in range(length):
            self.add_module(str(k), bn_class(**kwargs, affine=False))
        for name, fill, there in (("weight", torch.ones, affine), ("bias", torch.zeros, affine and bias)):
            own = fill(kwargs["num_features"], device=kwargs.get("device"), dtype=kwargs.get("dtype"))
            self.register_parameter(name, nn.Parameter(own) if there else None)
        self._pos = 0
        self._left_at = 0  # where an earlier cycle was left when the mode changed
        self._calls: int | None = None  # since one_cycle began

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[nn.Module]:
        return islice(self.children(), self.length)

    def __getitem__(self, k: int) -> nn.Module:
        return self.get_submodule(str(range(self.length)[k]))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize by the next BatchNorm of the cycle."""
        if self._left_at:
            raise CycleError(
                f"{self._shown()} changed between training and evaluation after {self._left_at} of {self.length} "
                "calls; call it on every domain, in order, every time, and reset() after an exception"
            )
        repeated = in_backward()
        if repeated:
            self._check_finished()
            self._check_repeatable()
        y = self._normalize(self[self._pos], x, repeated)
        if not repeated:
            self._pos = (self._pos + 1) % self.length
            if self._calls is not None:
                self._calls += 1
            if _is_eager(y) and y.requires_grad:
                y.register_hook(self._check_finished)
        return y

    def reset(self) -> None:
        """Start a cycle afresh: the next call uses BatchNorm 0."""
        self._pos = self._left_at = 0

    @property
    def unfinished(self) -> int:
        """How many calls of a cycle have been made that has not come to its end; 0 between cycles."""
        return self._pos or self._left_at

    def start_recording(self, recorder: Recorder) -> None:
        """Put the cycle under way aside, as an interrupted forward leaves it; the members are recorded themselves."""
        self._aside = self._pos, self._left_at
        self.reset()

    def stop_recording(self) -> None:
        """Take up the cycle that was under way before."""
        if self._aside is not None:
            self._pos, self._left_at = self._aside
            del self._aside

    def end_batch(self, name: str) -> None:
        """Of a mini-batch, every domain is called; an unfinished cycle would shift the domains of the next one."""
        if self._pos:
            raise CycleError(
                f"layer {name!r} ({self._shown()}) was left after {self._pos} of {self.length} calls in a mini-batch; "
                "call it on every domain, in order"
            )

    def members(self) -> Sequence[nn.Module]:
        """The BatchNorms of the cycle."""
        return list(self)

    def tracks(self, member: nn.Module) -> bool:
        """Whether a member has nothing of its own to do, so that its forward is never called."""
        return _is_plain(member)

    def reset_parameters(self) -> None:
        """Set weight to 1 and bias to 0, which ``to_empty`` leaves unset; the members have the same for theirs."""
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def train(self, mode: bool = True) -> "CycleBatchNormList":
        """As every module's; a cycle that is under way then raises at the next call."""
        if mode != self.training:
            self._left_at = self._pos
        return super().train(mode)

    def extra_repr(self) -> str:
        """Whether there is an affine; the members show the rest."""
        return f"affine={self.weight is not None}"

    def _normalize(self, member: nn.Module, x: Tensor, repeated: bool) -> Tensor:
        if not _is_plain(member):
            y: Tensor = member(x)
            if self.weight is None:
                return y
            zero, one = torch.zeros_like(self.weight), torch.ones_like(self.weight)
            return frozen_batch_norm(y, zero, one, self.weight, self.bias, eps=0.0)
        assert isinstance(member, _BatchNorm)  # plain
        mean, var = member.running_mean, member.running_var
        if isinstance(x, Proxy):
            if member.training or mean is None or var is None:
                raise InputError(
                    f"{self._shown()}: torch.fx cannot trace what takes the statistics of its input; call eval() "
                    f"before, or {TO_PLAIN}"
                )
            return portable.frozen_batch_norm(x, mean, var, self.weight, self.bias, member.eps)
        member._check_input_dim(x)
        if not member.training and mean is not None and var is not None:
            return frozen_batch_norm(x, mean, var, self.weight, self.bias, eps=member.eps)
        y, moments = batch_norm(x, self.weight, self.bias, eps=member.eps)
        tracked = member.num_batches_tracked
        updated = member.training and member.track_running_stats and not repeated
        if updated and mean is not None and var is not None and tracked is not None:
            accumulator: Recorder | None = getattr(member, ACCUMULATOR, None)
            if accumulator is not None:
                accumulator(moments, None)
                return y
            update_running_statistics(self._shown(), moments, mean, var, tracked, member.momentum)
        return y

    def _check_repeatable(self) -> None:
        """Raise where it matters which call of the cycle activation checkpointing repeats: that cannot be known."""
        for member in self:
            if not _is_plain(member):
                what = "with hooks on a BatchNorm, or a bn_class with a forward of its own,"
            elif not member.training and member.running_mean is not None:
                what = "in evaluation mode"
            else:
                continue
            raise CycleError(
                f"{self._shown()} {what} is called inside a backward, where activation checkpointing repeats forwards "
                "in another order: which BatchNorm to use is unknown. Do without checkpointing there"
            )

    def _check_finished(self, grad: Tensor | None = None) -> None:
        if self._pos:
            raise CycleError(
                f"a backward has begun after {self._pos} of {self.length} calls of {self._shown()} in a cycle; call it "
                "on every domain, in order, every time, and reset() after an exception"
            )

    def _shown(self) -> str:
        return f"CycleBatchNormList({self.length})"

    def __prepare_scriptable__(self) -> nn.Module:
        """What torch.jit.script asks first."""
        raise InputError(f"{self._shown()}: torch.jit.script cannot compile it; {TO_PLAIN}")

    def __getstate__(self) -> dict[str, Any]:
        own = {key: value for key, value in super().__getstate__().items() if key != "_aside"}
        return own | {"_pos": 0, "_left_at": 0, "_calls": None}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Let a plain BatchNorm's checkpoint fill every member."""
        for name in STATISTICS:
            if prefix + name in state_dict:
                value = state_dict.pop(prefix + name)
                state_dict.update({f"{prefix}{k}.{name}": value.clone() for k in range(self.length)})
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


@contextmanager
def one_cycle(model: nn.Module) -> Iterator[None]:
    """Say that within this block every CycleBatchNormList of a model runs through once, or not at all.

    Cycles start afresh at its beginning, also after an earlier forward that was interrupted.

    Raises:
        CycleError: at the end, if one was left unfinished or ran more than once; it names the layer and gives the
        counts.

    Example:
        >>> head = nn.Sequential(CycleBatchNormList(2, num_features=8))
        >>> with one_cycle(head):
        ...     head(torch.randn(4, 8, 6, 6)).shape
        Traceback (most recent call last):
        precisebn.errors.CycleError: layer '0' (CycleBatchNormList(2)) was called 1 times, not 2; call it on every ...
    """
    cycles = {name: layer for name, layer in model.named_modules() if isinstance(layer, CycleBatchNormList)}
    for layer in cycles.values():
        layer.reset()
        layer._calls = 0
    try:
        yield
        for name, layer in cycles.items():
            if layer._calls not in (0, layer.length):
                raise CycleError(
                    f"layer {name!r} ({layer._shown()}) was called {layer._calls} times, not {layer.length}; call it "
                    "on every domain, in order, once"
                )
    finally:
        for layer in cycles.values():
            layer.reset()
            layer._calls = None


def _is_eager(y: Tensor) -> bool:
    """Whether this runs, rather than being made into a graph, which has no hooks."""
    return not (torch.compiler.is_compiling() or is_tracing() or isinstance(y, Proxy))


def _is_plain(member: nn.Module) -> bool:
    """Whether calling a member would do nothing but torch's batch normalization: no own forward, no hooks."""
    own_forward = type(member).forward is not _BatchNorm.forward or "forward" in vars(member)
    return not own_forward and not (
        member._forward_hooks or member._forward_pre_hooks or member._backward_hooks or member._backward_pre_hooks
    )
