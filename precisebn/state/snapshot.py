"""snapshot: the values of a model's parameters and buffers now, by name, to compare with later ones.

It knows nothing of the model: it can be kept when the model has gone, saved, sent to another process, compared with
another model. (What is compared by identity, and can be put back, is :class:`precisebn.models.snapshot.Snapshot`.)
"""

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from precisebn._reports import counted
from precisebn.errors import InputError
from precisebn.models.selection import named_modules
from precisebn.models.statistics_buffers import statistics_of
from precisebn.state.entries import Entry, State, Uninitialized, check_kinds, entries_of, place_of

__all__ = ["StateSnapshot", "snapshot", "state_of_model"]

EXTRA_STATE = "_extra_state"  # the key of torch's state dicts for what get_extra_state returns


class StateSnapshot(Mapping[str, Tensor]):
    """Values of a model's tensors at one time; a mapping from qualified names to tensors, as a state dict is.

    Names are those without wrappers (``backbone.bn1.running_mean``, also of a model under DDP or torch.compile). A
    tensor under several names is kept once, and all of its names lead to the same tensor.

    Attributes:
        training: of every module, by name: whether it was in training mode.
        requires_grad: of every parameter, by name.
    """

    def __init__(self, state: State) -> None:
        self.state = state
        """As one side of a comparison."""
        self.training = dict(state.training)
        self.requires_grad = dict(state.requires_grad)

    @property
    def nbytes(self) -> int:
        """How much memory its tensors take."""
        return sum(tensor.nbytes for tensor in {id(t): t for t in self.values() if not t.is_meta}.values())

    def __getitem__(self, name: str) -> Tensor:
        entry = self.state.entries[name]
        if entry.kind == "value":
            raise KeyError(name)
        tensor: Tensor = entry.load()
        return tensor

    def __iter__(self) -> Iterator[str]:
        return (name for name, entry in self.state.entries.items() if entry.kind != "value")

    def __len__(self) -> int:
        return sum(1 for _ in self)

    __hash__ = None  # type: ignore[assignment]  # and no ==: diff_state says what differs
    __eq__ = object.__eq__

    def __repr__(self) -> str:
        return f"<StateSnapshot of {counted(len(self), 'tensor')}, {self.nbytes / 2**20:.1f} MiB>"


def snapshot(
    model: nn.Module,
    *,
    kinds: str | Iterable[str] | None = None,
    device: str | torch.device | None = None,
) -> StateSnapshot:
    """Copy what a model holds now, to compare it later: ``diff_state(before, model)``.

    Every parameter and every buffer, also those that no state dict has, and the extra state of modules that have one;
    of shared tensors one copy. It costs that much memory and one pass over it, and the model is only read.

    Args:
        model: any module; also one wrapped by DDP or torch.compile, sharded (this rank's part), or on the meta device.
        kinds: only these: ``"parameter"``, ``"statistic"`` (running statistics), ``"buffer"`` (all others),
            ``"value"`` (what is no tensor, in extra states); one or several. Running statistics are small.
        device: where to keep the copies; each on its own device by default. ``"cpu"`` spares a GPU's memory.

    Raises:
        InputError: ``model`` is no module, or ``kinds`` names something else.

    Example:
        >>> import torch
        >>> from precisebn import diff_state
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).requires_grad_(False)
        >>> before = snapshot(model)
        >>> _ = model(torch.randn(2, 3, 8, 8))
        >>> [row.name for row in diff_state(before, model).changed]
        ['1.running_mean', '1.running_var', '1.num_batches_tracked']
        >>> before["1.running_mean"]
        tensor([0., 0., 0., 0.])
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"snapshot takes a module, not {type(model).__name__}; diff_state takes state dicts and files")
    state = state_of_model(model)
    state.kinds = check_kinds(kinds)
    copies: dict[int, Entry] = {}
    with torch.no_grad():
        for name, entry in list(state.entries.items()):
            if state.kinds is not None and entry.kind not in state.kinds:
                del state.entries[name]
            else:
                if id(entry) not in copies:
                    copies[id(entry)] = entry
                    entry.load = _Kept(_copy(entry.load(), device))
    return StateSnapshot(state)


def state_of_model(model: nn.Module) -> State:
    """A model as one side of a comparison: nothing is copied."""
    state = State({}, whole=True)
    by_place: dict[Any, Entry] = {}
    for name, module in named_modules(model, remove_duplicate=False):  # a state dict has every name, too
        prefix = f"{name}." if name else ""
        state.training[name] = module.training
        statistics = statistics_of(module)
        hidden = getattr(module, "_non_persistent_buffers_set", ())
        for owned, kind in ((module._parameters, "parameter"), (module._buffers, "buffer")):
            for key, tensor in owned.items():
                if tensor is None:
                    continue
                value, place = (Uninitialized(), id(tensor)) if is_lazy(tensor) else (tensor, place_of(tensor))
                entry = by_place.setdefault(place, Entry(_Kept(value), kind, certain=True))
                entry.names.append(prefix + key)
                state.entries[prefix + key] = entry
                if kind == "parameter":
                    state.requires_grad[prefix + key] = tensor.requires_grad
                else:
                    entry.persistent = key not in hidden or (len(entry.names) > 1 and entry.persistent)
                    if key in statistics:
                        one = statistics[key]
                        entry.kind, entry.statistic = "statistic", one._replace(var=one.var and prefix + one.var)
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            extra = entries_of({EXTRA_STATE: module.get_extra_state()})
            for key, entry in extra.items():
                entry.kind = "buffer" if isinstance(entry.load(), Tensor) else "value"
                entry.certain, entry.names = True, [prefix + name for name in entry.names]
                state.entries[prefix + key] = entry
    return state


class _Kept:
    """Gives what it has been given; unlike a lambda it can be pickled."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __call__(self) -> Any:
        return self.value


def _copy(value: Any, device: str | torch.device | None) -> Any:
    """Values of its own, on its own device or another; of an expanded tensor no more than it has memory for."""
    if not isinstance(value, Tensor):
        return copy.deepcopy(value)
    tensor = value.detach()
    if type(tensor) is Tensor and tensor.layout is torch.strided and not tensor.is_nested and 0 in tensor.stride():
        once = tensor
        for dim, (stride, size) in enumerate(zip(tensor.stride(), tensor.shape, strict=True)):
            if stride == 0 and size > 1:
                once = once.narrow(dim, 0, 1)
        return _moved(once, device).expand(tensor.shape)
    return _moved(tensor, device)


def _moved(tensor: Tensor, device: str | torch.device | None) -> Tensor:
    try:
        return tensor.clone() if device is None or tensor.is_meta else tensor.to(device, copy=True)
    except (RuntimeError, NotImplementedError):  # some quantized ones, of which deepcopy knows more
        return copy.deepcopy(tensor)
