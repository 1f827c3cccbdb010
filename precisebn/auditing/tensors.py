"""Parameters and buffers of modules, by qualified name: those of each module itself, shared ones under every name."""

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

__all__ = ["buffers_of", "parameters_and_buffers_of", "parameters_of", "parameters_once"]


def parameters_of(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The parameters of some modules."""
    return _named((prefix, module._parameters) for prefix, module in modules.items())


def parameters_once(modules: Mapping[str, nn.Module]) -> dict[int, tuple[str, Tensor]]:
    """The parameters of some modules by identity, each under the first of its names."""
    found: dict[int, tuple[str, Tensor]] = {}
    for name, parameter in parameters_of(modules).items():
        found.setdefault(id(parameter), (name, parameter))
    return found


def buffers_of(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Their buffers, also those that no state dict has."""
    return _named((prefix, module._buffers) for prefix, module in modules.items())


def parameters_and_buffers_of(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Both, module by module."""
    return _named(
        (prefix, tensors) for prefix, module in modules.items() for tensors in (module._parameters, module._buffers)
    )


def _named(owned: Iterable[tuple[str, Mapping[str, Tensor | None]]]) -> dict[str, Tensor]:
    return {
        f"{prefix}.{name}".lstrip("."): tensor
        for prefix, tensors in owned
        for name, tensor in tensors.items()
        if tensor is not None
    }
