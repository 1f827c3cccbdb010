"""watch_state: what a block of code changes in a model."""

from collections.abc import Iterable
from types import TracebackType

from torch import nn

from precisebn.errors import InputError
from precisebn.state.compare import compare_states
from precisebn.state.diff import StateDiff
from precisebn.state.entries import State, check_kinds
from precisebn.state.snapshot import snapshot, state_of_model

__all__ = ["StateWatch", "watch_state"]


class StateWatch:
    """What :func:`watch_state` returns; a context manager, once or several times.

    Attributes:
        model: what is watched.
    """

    def __init__(self, model: nn.Module, kinds: frozenset[str] | None) -> None:
        self.model = model
        self._kinds = kinds
        self._before: State | None = None
        self._diff: StateDiff | None = None

    @property
    def diff(self) -> StateDiff:
        """What the block has changed; inside of it, what it has changed so far.

        Raises:
            InputError: the block has not begun.
        """
        if self._before is not None:
            return compare_states(self._before, state_of_model(self.model))[0]
        if self._diff is None:
            raise InputError("nothing was watched yet: `with watch_state(model) as watch: ...`, then `watch.diff`")
        return self._diff

    def __enter__(self) -> "StateWatch":
        self._before = snapshot(self.model, kinds=self._kinds).state
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._diff = self.diff
        finally:
            self._before = None  # the memory of the copies

    def __repr__(self) -> str:
        state = "watching" if self._before is not None else repr(self._diff) if self._diff is not None else "not begun"
        return f"<StateWatch of {type(self.model).__name__}: {state}>"


def watch_state(model: nn.Module, *, kinds: str | Iterable[str] | None = None) -> StateWatch:
    """Within this block, watch what a model holds; ``.diff`` says what has changed, also after an exception.

    Bit for bit: a forward that moved a running mean by one digit shows. Modules that come and go do, as tensors on one
    side only, and so do flips of training mode and ``requires_grad``. It costs the memory of what is watched once, and
    two passes over it.

    Args:
        model: any module, also wrapped by DDP or torch.compile.
        kinds: what to watch, as :func:`snapshot` takes it; ``kinds="statistic"`` is cheap enough for every epoch.

    Raises:
        InputError: ``model`` is no module, or ``kinds`` names something else.

    Example:
        >>> import torch
        >>> encoder = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).requires_grad_(False)
        >>> with watch_state(encoder) as watch:
        ...     _ = encoder(torch.randn(2, 3, 8, 8))
        >>> [row.name for row in watch.diff.changed]
        ['1.running_mean', '1.running_var', '1.num_batches_tracked']
        >>> with watch_state(encoder.eval()) as watch:
        ...     _ = encoder(torch.randn(2, 3, 8, 8))
        >>> watch.diff.is_empty
        True
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"watch_state takes a module, not {type(model).__name__}")
    return StateWatch(model, check_kinds(kinds))
