"""EarlyExit: forwards that end behind the last recorded layer, where nothing is measured any more.

A forward can be left in the middle only by an exception, and what that does to the code of a model is not for this
library to know: code behind the last layer does not run, whatever it was to do (a counter, a collective that other
ranks wait in), and ``except:`` may catch it. So it is asked for by ``early_exit=True`` and never taken by itself; and
what can be checked is checked: the first mini-batch goes through the whole model, every later one has to call the
recorded layers in the same order, and it is an error if one is run past its hooks, or if an exit does not come out of
the model. Modes are put back, which code behind the exit may have been about to do.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

from torch import nn

from precisebn.distributed import is_sharded
from precisebn.errors import InputError
from precisebn.models.families import is_batch_norm
from precisebn.models.selection import named_modules
from precisebn.models.transaction import Transaction
from precisebn.nn.population import Recordable

__all__ = ["EarlyExit"]


class EarlyExit:
    """Leaves the forwards of a model behind its last recorded layer, from the second mini-batch on.

    Args:
        model: the model.
        layers: what is recorded, by qualified name.

    Raises:
        InputError: a model sharded by FSDP, which frees in the end of a forward what it has gathered in its course.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
        if any(is_sharded(parameter) for parameter in model.parameters()):
            raise InputError(
                "early_exit=True does not work for a model sharded by FSDP, which needs the end of every forward"
            )
        self._modules = list(model.modules())
        self._holders = _outermost(model, layers)
        self._inside: Counter[nn.Module] = Counter()
        """How many calls of each are under way."""
        self._order: list[str] = []
        """The calls of the first mini-batch, by name."""
        self._position = 0
        self._is_first = True
        self._raised = False
        """Whether this forward was left, if nothing caught that."""

    def put(self, changes: Transaction) -> None:
        """From now on note the calls of recorded layers."""
        for module, name in dict.fromkeys(self._holders.values()):
            changes.on_undo(module.register_forward_pre_hook(self._enters).remove)
            changes.on_undo(module.register_forward_hook(partial(self._called, name)).remove)

    def reached(self, layer: nn.Module) -> None:
        """A layer is being measured.

        Raises:
            InputError: but not in a call that is watched, so that it would not show when it is done.
        """
        module, name = self._holders[layer]
        if not self._inside[module]:
            raise InputError(
                f"early_exit=True: {name!r} is run past its __call__, by its forward() or by one of its parts, so that "
                "it does not show when it is done; pass early_exit=False. The model is as it was"
            )

    @contextmanager
    def forward(self) -> Iterator[None]:
        """One forward of the model, which may end early.

        Raises:
            InputError: it called other layers than the first one; or code of the model has caught the exit.
        """
        self._position, self._raised = 0, False
        self._inside.clear()
        modes = [(module, module.training) for module in self._modules]
        try:
            yield
        except _Exit:
            for module, mode in modes:
                if module.training != mode:
                    module.training = mode
            return
        if self._raised:
            raise _caught()
        if not self._is_first and self._position < len(self._order):
            raise self._differs(f"ended before layer {self._order[self._position]!r}")
        self._is_first = False

    def _enters(self, module: nn.Module, args: object) -> None:
        self._inside[module] += 1

    def _called(self, name: str, module: nn.Module, args: object, output: object) -> None:
        self._inside[module] -= 1
        if self._is_first:
            self._order.append(name)
            return
        if self._raised:
            raise _caught()
        expected = self._order[self._position] if self._position < len(self._order) else "none"
        if expected != name:
            raise self._differs(f"called layer {name!r} where the first called {expected!r}")
        self._position += 1
        if self._position == len(self._order):
            self._raised = True
            raise _Exit

    def _differs(self, how: str) -> InputError:
        return InputError(
            f"early_exit=True takes every mini-batch to go through the same layers, and one {how}; pass "
            "early_exit=False. The model is as it was"
        )


class _Exit(BaseException):
    """Leaves a forward; no Exception, so that a model that falls back on another way does not take it for a failure."""


def _caught() -> InputError:
    return InputError(
        "early_exit=True: code of the model, or of forward=, caught what leaves a forward behind its last recorded "
        "layer (`except:` or `except BaseException:` does); pass early_exit=False. The model is as it was"
    )


def _outermost(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[nn.Module, tuple[nn.Module, str]]:
    """Of each layer itself and its name; of one inside a module that has a state of the mini-batch (a cycle, say) that.

    So several layers may have the same.
    """
    holders = {
        part: (module, name)
        for name, module in named_modules(model)
        if isinstance(module, Recordable) and not is_batch_norm(module)
        for part in module.modules()
    }
    return {layer: holders.get(layer, (layer, name)) for name, layer in layers.items()}
