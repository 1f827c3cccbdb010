"""GradientFlow: which parameters a value was worked out from, and where their gradients were lost on the way.

Autograd knows which parameters a loss has gradients for, and nothing of the others. What is followed here is the flow
of values, whether there is a graph or not: every call of a torch function hands the parameters behind its inputs on to
its outputs. Where a value still comes from a parameter, and autograd no longer leads back to it, the gradient was cut;
and the call that did it, the module that it happened in and the first module that worked with the rest are known.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from precisebn.models.nested import tensors_in

__all__ = ["Cut", "GradientFlow", "Origin"]


class Origin(NamedTuple):
    """Where a value lost its history.

    Attributes:
        how: what did it, as the user would call it: ``torch.no_grad()``, ``detach()``.
        module: qualified name of the module that was running.
        line: ``file.py:12``, the user's line; empty where there is none.
    """

    how: str
    module: str
    line: str


class Cut(NamedTuple):
    """A call that worked on with values whose history was lost.

    Attributes:
        parameters: those that it therefore has no gradient for, as bits.
        behind: qualified name of the module that was running.
        origin: where it was lost.
    """

    parameters: int
    behind: str
    origin: Origin | None


@dataclass(slots=True)
class _Flow:
    """What is behind a tensor; parameters and cuts are bits of whole numbers.

    Attributes:
        parameters: that its values come from.
        live: of those, the ones that autograd leads back to.
        cuts: that lie between.
        behind_cuts: parameters of those cuts.
        origin: where its history was lost, if it has none.
    """

    parameters: int = 0
    live: int = 0
    cuts: int = 0
    behind_cuts: int = 0
    origin: Origin | None = None


class GradientFlow(TorchFunctionMode):
    """Follows values from parameters through all torch functions that are called inside its block.

    What is worked out where no torch function is seen (scripted code, extensions) is followed by :meth:`leave`, which
    takes all that went into a module to be behind what came out.

    Args:
        parameters: those to follow, by name.

    Attributes:
        used: parameters that any call took.
        cuts: in the order in which they happened.
        exits: values handed over to Python or NumPy: parameters behind them, and where.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> with GradientFlow(dict(layer.named_parameters())) as flow:
        ...     loss = (layer(torch.ones(1, 2)).detach() * 2).sum()
        >>> [cut.origin.how for cut in flow.cuts_behind(loss)]
        ['detach()']
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._bits = {id(p): 1 << index for index, p in enumerate(parameters.values())}
        self._parameters = list(parameters.values())  # whose identities must not be given to others
        self._flows = WeakTensorKeyDictionary()
        self._modules: list[str] = []
        self._exits_before: list[int] = []  # how many there were when each of these modules began
        self.used = 0
        self.cuts: list[Cut] = []
        self.exits: list[tuple[int, Origin]] = []
        self._paused = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._paused:
            return func(*args, **kwargs)
        inputs = list(tensors_in((args, kwargs)))
        lost = [t for t in inputs if self._is_lost(t)]
        result = func(*args, **kwargs)
        if inputs:
            self._follow(func, inputs, lost, args, list(tensors_in((result, kwargs.get("out")))))
        return result

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A block in which nothing is followed."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def enter(self, module: str) -> None:
        """A module of that name begins to run."""
        self._modules.append(module)
        self._exits_before.append(len(self.exits))

    def leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        """The module that runs has ended: of its outputs that nothing is known of, what went in is behind."""
        name, inside = self._modules.pop(), self.exits[self._exits_before.pop() :]
        unknown = [t for t in tensors_in(output) if self._flow(t) is None and t.is_floating_point()]
        if not unknown:
            return
        sources = [*tensors_in(inputs), *module.parameters()]
        together = self._merged(sources)
        if together.parameters:
            self.used |= self._merged(module.parameters()).parameters
            # Where values left torch in it, what came out was most likely made of them.
            origin = inside[-1][1] if inside else Origin("a call that autograd does not see", name, "")
            for tensor in unknown:
                self._note(tensor, together, origin)

    def bits(self, tensor: Tensor) -> int:
        """The bit of a parameter."""
        return self._bits[id(tensor)]

    def parameters_behind(self, tensor: Tensor) -> int:
        """The parameters that a tensor was worked out from."""
        flow = self._flow(tensor)
        return flow.parameters if flow is not None else 0

    def cuts_behind(self, tensor: Tensor) -> list[Cut]:
        """The cuts between the parameters and a tensor."""
        flow = self._flow(tensor)
        if flow is None:
            return []
        cuts = [cut for index, cut in enumerate(self.cuts) if flow.cuts >> index & 1]
        if self._is_lost(tensor) and (left := flow.parameters & ~flow.behind_cuts):
            cuts.append(Cut(left, "", flow.origin))
        return cuts

    def _follow(
        self,
        func: Callable[..., Any],
        inputs: list[Tensor],
        lost: list[Tensor],
        args: Sequence[Any],
        outputs: list[Tensor],
    ) -> None:
        together = self._merged(inputs)
        name = getattr(func, "__name__", "")
        if not outputs:
            if name == "__setitem__" and together.parameters:
                self._write(args[0], together, _shown(func))
            elif name in _EXITS and together.parameters:
                self.exits.append((together.parameters, self._origin(_shown(func))))
            return
        self.used |= together.parameters
        if not together.parameters:
            return
        if torch.is_grad_enabled() and name not in _NO_WORK:
            self._cut(lost, together)
        origin: Origin | None = next((f.origin for t in lost if (f := self._flow(t)) and f.origin), None)
        for output in outputs:
            if origin is None and self._is_without_history(output):
                origin = self._origin(_shown(func))
            self._note(output, together, origin)
        if (name.endswith("_") and not name.endswith("__")) or name in _IN_PLACE:
            self._write(args[0], together, _shown(func))

    def _cut(self, lost: list[Tensor], together: _Flow) -> None:
        """Note a cut where a call works on with lost values, for parameters that no other input leads back to."""
        for tensor in lost:
            flow = self._flow(tensor)
            assert flow is not None  # it would not be lost
            missing = flow.parameters & ~flow.behind_cuts & ~together.live
            if missing:
                together.cuts |= 1 << len(self.cuts)
                together.behind_cuts |= missing
                self.cuts.append(Cut(missing, self._modules[-1] if self._modules else "", flow.origin))

    def _merged(self, tensors: Iterable[Tensor]) -> _Flow:
        """What is behind several tensors together."""
        together = _Flow()
        for tensor in tensors:
            flow = self._flow(tensor)
            if flow is not None:
                together.parameters |= flow.parameters
                together.live |= self._live(tensor, flow)
                together.cuts |= flow.cuts
                together.behind_cuts |= flow.behind_cuts
        return together

    def _live(self, tensor: Tensor, flow: _Flow) -> int:
        # An autograd.Function of the user's runs without a graph, and gives its outputs a history afterwards.
        return flow.parameters if not flow.live and tensor.grad_fn is not None else flow.live

    def _note(self, tensor: Tensor, together: _Flow, origin: Origin | None) -> None:
        if id(tensor) in self._bits:
            return
        without = self._is_without_history(tensor)
        self._flows[tensor] = _Flow(
            together.parameters, 0 if without else together.live, together.cuts, together.behind_cuts,
            origin if without else None,
        )  # fmt: skip

    def _write(self, tensor: Any, together: _Flow, how: str) -> None:
        """A tensor was written to in place, and with it what it is a view of."""
        for target in (tensor, getattr(tensor, "_base", None)):
            if isinstance(target, Tensor):
                before = self._flow(target)
                both = self._merged([target])
                both.parameters |= together.parameters
                both.live |= together.live
                both.cuts |= together.cuts
                both.behind_cuts |= together.behind_cuts
                self._note(target, both, before.origin if before is not None and before.origin else self._origin(how))

    def _flow(self, tensor: Tensor) -> _Flow | None:
        bit = self._bits.get(id(tensor))
        if bit is not None:
            return _Flow(bit, bit)
        found: _Flow | None = self._flows.get(tensor)
        return found

    def _is_lost(self, tensor: Tensor) -> bool:
        """Whether it comes from parameters, and autograd leads back to none of them."""
        flow = self._flow(tensor)
        return (
            flow is not None
            and flow.parameters != 0
            and id(tensor) not in self._bits
            and self._is_without_history(tensor)
        )

    @staticmethod
    def _is_without_history(tensor: Tensor) -> bool:
        return tensor.grad_fn is None

    def _origin(self, how: str) -> Origin:
        if torch.is_inference_mode_enabled():
            how = "torch.inference_mode()"
        elif not torch.is_grad_enabled():
            how = "torch.no_grad()"
        return Origin(how, self._modules[-1] if self._modules else "", _users_line())


_EXITS = frozenset({"item", "tolist", "numpy", "__array__", "__float__", "__int__", "__dlpack__"})
_NO_WORK = frozenset({"detach", "detach_", "requires_grad_"})  # what cuts by itself is not what is behind the cut
_IN_PLACE = frozenset({"__iadd__", "__isub__", "__imul__", "__itruediv__", "__ipow__"})
_TORCH = str(Path(torch.__file__).parent)
_PRECISEBN = Path(__file__).parents[2]
_CALLERS = (str(_PRECISEBN / "auditing"), str(_PRECISEBN / "models"))  # of the model, in whose frames its own end


def _shown(func: Callable[..., Any]) -> str:
    """A function as users call it."""
    name = getattr(func, "__name__", "") or str(func)
    if name == "__get__":  # a property of a tensor
        return f".{getattr(getattr(func, '__self__', None), '__name__', 'data')}"
    return f"{name}()"


def _users_line() -> str:
    """The line that runs, of code that is neither torch's nor ours; empty where only these run."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(_CALLERS) and file != __file__:
            return ""
        if not file.startswith((_TORCH, str(_PRECISEBN))):
            return f"{Path(file).name}:{frame.f_lineno}"
        frame = frame.f_back
    return ""
