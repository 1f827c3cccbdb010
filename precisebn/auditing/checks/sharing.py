"""Sharing: what two models that should be independent have in common, from memory to random generators."""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor, nn

from precisebn.auditing.check import Problem, check
from precisebn.auditing.generators import generators_in
from precisebn.auditing.memory import overlapping
from precisebn.auditing.reach import attributes, hooks, modules_held, objects_held
from precisebn.auditing.subject import Subject
from precisebn.auditing.tensors import buffers_of, parameters_and_buffers_of, parameters_of

__all__ = [
    "shared_attributes",
    "shared_buffers",
    "shared_generators",
    "shared_hooks",
    "shared_modules",
    "shared_parameters",
    "bound_to_the_other",
]

_COPY = "copy.deepcopy(model) makes a copy that shares nothing of this."


@check(
    "PBN501", "error", "parameters shared with another model", needs=("other",),
    source="https://docs.pytorch.org/docs/stable/generated/torch.nn.Module.html#torch.nn.Module.state_dict",
)  # fmt: skip
def shared_parameters(subject: Subject) -> Iterator[Problem]:
    """The same tensors, or views of the same memory, as after ``load_state_dict(other.state_dict(), assign=True)``."""
    if shared := overlapping(parameters_of(subject.modules), parameters_and_buffers_of(subject.other_modules)):
        yield Problem(
            "They lie in the memory of parameters of the other model: a step of either one changes both.",
            f"{_COPY} load_state_dict(other.state_dict()) without assign=True copies values.",
            list(shared),
        )


@check(
    "PBN502", "error", "buffers shared with another model", needs=("other",),
    source="https://docs.pytorch.org/docs/stable/generated/torch.nn.Module.html#torch.nn.Module.state_dict",
)  # fmt: skip
def shared_buffers(subject: Subject) -> Iterator[Problem]:
    """Running statistics among them: a forward of either model in training mode then changes the other's output."""
    if shared := overlapping(buffers_of(subject.modules), parameters_and_buffers_of(subject.other_modules)):
        yield Problem(
            "They lie in the memory of the other model: running statistics among them move with the forwards of both.",
            f"{_COPY} load_state_dict(other.state_dict()) without assign=True copies values.",
            list(shared),
        )


@check(
    "PBN503", "error", "modules shared with another model", needs=("other",),
    source="https://docs.python.org/3/library/copy.html",
)  # fmt: skip
def shared_modules(subject: Subject) -> Iterator[Problem]:
    """The same module in both, as after ``copy.copy``, or where both were built around one encoder."""
    theirs = set(subject.other_modules.values())
    shared = [name for name, module in subject.modules.items() if module in theirs]
    outermost = [name for name in shared if not any(_is_inside(name, other) for other in shared)]
    if outermost:
        yield Problem(
            "They are the very modules of the other model: mode, hooks, parameters and statistics are those of both.",
            _COPY,
            outermost,
        )


@check(
    "PBN504", "error", "hooks that work on another model", needs=("other",),
    source="https://github.com/facebookresearch/fairscale/issues/816",
)  # fmt: skip
def shared_hooks(subject: Subject) -> Iterator[Problem]:
    """A hook is a function, which is never copied: what it closes over is still the other model, or common to both."""
    theirs = _others_alone(subject)
    own = list(hooks(subject.modules))
    bound = [name for name, hook in own if not theirs.isdisjoint(modules_held(hook))]
    if bound:
        yield Problem(
            "Their hooks are bound to modules of the other model, and read or change that one.",
            "handle.remove() before copying, and register the hooks of each model with functions of its own.",
            list(dict.fromkeys(bound)),
        )
    common = _states(hook for _, hook in hooks(subject.other_modules))
    both = [name for name, hook in own if name not in bound and not common.isdisjoint(_states([hook]))]
    if both:
        yield Problem(
            "Their hooks keep what they see in a container that the other model's hooks use as well.",
            "handle.remove() before copying, and register the hooks of each model with functions of its own.",
            list(dict.fromkeys(both)),
            "warning",
        )


@check(
    "PBN505", "error", "functions on instances that run another model", needs=("other",),
    source="https://github.com/huggingface/accelerate/pull/1971",
)  # fmt: skip
def bound_to_the_other(subject: Subject) -> Iterator[Problem]:
    """A ``forward`` patched on an instance that closes over it: the copy's computes with the other model's weights."""
    theirs = _others_alone(subject)
    bound = [
        name
        for name, value in attributes(subject.modules)
        if not isinstance(value, nn.Module) and not theirs.isdisjoint(modules_held(value))
    ]
    if bound:
        yield Problem(
            "These attributes are bound to modules of the other model, or hold them: what they compute is of that one.",
            "Patch each model by itself, after copying; a bound method (types.MethodType) is copied along, a "
            "closure is not.",
            bound,
        )


@check(
    "PBN506", "warning", "random generators shared with another model", needs=("other",),
    source="https://github.com/pytorch/pytorch/issues/43672",
)  # fmt: skip
def shared_generators(subject: Subject) -> Iterator[Problem]:
    """What one draws the other misses: two models that were alike part, depending on which runs first.

    The global generators, which are everybody's, are not meant.
    """
    theirs = {id(held) for _, value in attributes(subject.other_modules) for held in generators_in(value)}
    shared = [
        name for name, value in attributes(subject.modules) if any(id(g) in theirs for g in generators_in(value))
    ]  # fmt: skip
    if shared:
        yield Problem(
            "They draw from a random generator of the other model's: what one draws, the other does not.",
            "Give each model one of its own: torch.Generator().set_state(other.generator.get_state()).",
            shared,
        )


@check(
    "PBN507", "warning", "other state shared with another model", needs=("other",),
    source="https://docs.python.org/3/library/copy.html",
)  # fmt: skip
def shared_attributes(subject: Subject) -> Iterator[Problem]:
    """Tensors and containers in attributes: caches, queues, lists of losses. A configuration may be meant for both."""
    tensors = overlapping(_attribute_tensors(subject.modules), _attribute_tensors(subject.other_modules))
    if tensors:
        yield Problem(
            "These attributes hold tensors in the memory of the other model.",
            _COPY,
            list(tensors),
        )
    theirs = {id(held) for _, value in attributes(subject.other_modules) for held in _containers(value)}
    containers = [
        name
        for name, value in attributes(subject.modules)
        if name not in tensors and any(id(held) in theirs for held in _containers(value))
    ]
    if containers:
        yield Problem(
            "These attributes are, or hold, the very list, dictionary or set that the other model has.",
            _COPY,
            containers,
            "note",
        )


def _others_alone(subject: Subject) -> set[nn.Module]:
    """The other model's modules that are not this one's too: PBN503 speaks of those."""
    return set(subject.other_modules.values()) - set(subject.modules.values())


def _is_inside(name: str, other: str) -> bool:
    return name != other and (not other or name.startswith(f"{other}."))


def _attribute_tensors(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Tensors in attributes, each under the attribute's name: the first of each."""
    found: dict[str, Tensor] = {}
    for name, value in attributes(modules):
        for held in objects_held(value):
            if isinstance(held, Tensor):
                found.setdefault(name, held)
    return found


def _containers(value: object) -> list[object]:
    """Lists, dictionaries and sets that a value is or holds; not what a function in it closes over."""
    if not isinstance(value, dict | list | set | deque | tuple):
        return []
    return [held for held in objects_held(value) if isinstance(held, dict | list | set | deque)]


def _states(functions: Iterable[object]) -> set[int]:
    """Identities of what can change in what functions hold on to."""
    return {
        id(held)
        for function in functions
        for held in objects_held(function)
        if isinstance(held, dict | list | set | deque | Tensor)
    }
