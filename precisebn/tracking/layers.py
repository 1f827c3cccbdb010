"""Which layers a block of this room is about: those asked for, if anything can be done to them."""

from collections.abc import Callable, Iterable

from torch import nn

from precisebn.errors import InputError
from precisebn.models.families import tracking_code
from precisebn.models.selection import select

__all__ = ["select_tracking"]


def select_tracking(
    model: nn.Module, modules: Iterable[str | nn.Module], is_layer: Callable[[nn.Module], bool], call: str
) -> dict[str, nn.Module]:
    """The layers of a model that the arguments of a block stand for, by name.

    Args:
        model: where to look.
        modules: what was asked for; nothing is everything.
        is_layer: what counts as a layer.
        call: the function that was called, for the message.

    Raises:
        InputError: something that matches no layer; code of torch.jit or torch.export in training mode, which tracks
            its statistics whatever is put on it from outside.
    """
    items = list(modules) or None
    chosen = select(
        model, items, argument="modules", is_layer=lambda module: is_layer(module) or tracking_code(module) != ""
    ).chosen
    for name, module in chosen.items():
        compiler = tracking_code(module)
        if compiler == "torch.export" or (compiler and module.training):
            raise InputError(
                f"{f'layer {name!r}' if name else 'the model'} is code of {compiler}, which tracks its statistics "
                f"whatever is put on it from outside; call {call} on the model that it was made from, or give that to "
                f"{compiler} in eval mode"
            )
    return {name: module for name, module in chosen.items() if is_layer(module)}
