"""The hooks of layers through conversions: they run with the new layer, and their handles remove them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from model_zoo import EVERY_CONVERSION, Picture, X, to_domain_0, train
from torch import nn

from precisebn import InputError
from precisebn.conversion.converters import (
    convert_ghost,
)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # torch.compile of 2.10 to 2.13, and torch.ao, warn of the use of deprecated parts of torch.
    pytest.mark.filterwarnings("ignore::FutureWarning:torch.*"),
]

HOOKS: dict[str, Callable[[nn.Module, Callable[..., None]], Any]] = {
    "forward": lambda layer, f: layer.register_forward_hook(f),
    "forward with kwargs": lambda layer, f: layer.register_forward_hook(f, with_kwargs=True),
    "forward always": lambda layer, f: layer.register_forward_hook(f, always_call=True),
    "forward pre": lambda layer, f: layer.register_forward_pre_hook(f),
    "forward pre with kwargs": lambda layer, f: layer.register_forward_pre_hook(f, with_kwargs=True),
    "backward": lambda layer, f: layer.register_full_backward_hook(f),
    "backward pre": lambda layer, f: layer.register_full_backward_pre_hook(f),
    "state dict": lambda layer, f: layer.register_state_dict_post_hook(f),
    "state dict pre": lambda layer, f: layer.register_state_dict_pre_hook(f),
    "load state dict pre": lambda layer, f: layer.register_load_state_dict_pre_hook(f),
    "load state dict post": lambda layer, f: layer.register_load_state_dict_post_hook(f),
}


@EVERY_CONVERSION
def test_hooks_run_with_the_new_layer_and_their_handles_remove_them(convert):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    calls: dict[str, list[nn.Module]] = {}

    def register(name: str) -> Any:
        return HOOKS[name](model[1], lambda module, *args: calls.setdefault(name, []).append(module))

    def exercise() -> None:
        calls.clear()
        train(model, X)
        model.load_state_dict(model.state_dict())

    before, handles = Picture(model), {name: register(name) for name in HOOKS}
    for layer_of in (convert, to_domain_0, convert):
        layer_of(model)
        exercise()
        assert set(calls) == set(HOOKS)
        assert {module for modules in calls.values() for module in modules} == {model[1]}
    handles["later"] = model[1].register_forward_hook(lambda *args: None)
    for name in list(HOOKS)[::2]:
        handles.pop(name).remove()
    exercise()
    assert set(calls) == set(list(HOOKS)[1::2])
    to_domain_0(model)
    exercise()
    assert set(calls) == set(list(HOOKS)[1::2])
    for handle in handles.values():
        handle.remove()
    assert not any(hooks for key, hooks in vars(model[1]).items() if "_hooks" in key)
    assert before.modules == Picture(model).modules


def test_a_hook_that_is_always_called_is_so_on_the_new_layer():
    model, calls = nn.Sequential(nn.BatchNorm2d(3)), []
    model[0].register_forward_hook(lambda module, *args: calls.append(module), always_call=True)
    convert_ghost(model, 2)
    with pytest.raises(InputError):
        model(torch.ones(2, 4, 3, 3))
    assert calls == [model[0]]
