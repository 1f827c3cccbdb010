"""Which layers a block of this room is about: those asked for, if anything can be done to them."""

from collections.abc import Callable, Iterable

from torch import nn

from precisebn.errors import InputError
from precisebn.models.families import is_scripted_norm
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
        InputError: something that matches no layer; a layer in training mode that is code of torch.jit, which tracks
            its statistics whatever is put on it from outside.
    """
    items = list(modules) or None
    chosen = select(
        model, items, argument="modules", is_layer=lambda module: is_layer(module) or is_scripted_norm(module)
    ).chosen
    for name, module in chosen.items():
        if is_scripted_norm(module) and module.training:
            raise InputError(
                f"layer {name!r} is code of torch.jit, which tracks its running statistics whatever is put on it from "
                f"outside; call {call} on the model that it was made from, or put this part into eval mode"
            )
    return {name: module for name, module in chosen.items() if is_layer(module)}
