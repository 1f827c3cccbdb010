"""Checks of what two models share: each finds it, and is quiet where they are nearly one."""

import copy
import functools
import random
import types
import weakref

import numpy as np
import pytest
import torch
from torch import nn

from precisebn import freeze
from precisebn.auditing.finding import Finding
from precisebn.auditing.run import audit

pytestmark = pytest.mark.usefixtures("one_thread")


def found(code: str, model: nn.Module, other: nn.Module) -> tuple[Finding, ...]:
    return audit(model, other=other, only=code)[code]


def layers(code: str, model: nn.Module, other: nn.Module) -> tuple[str, ...]:
    return tuple(name for one in found(code, model, other) for name in one.layers)


def model() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1, bias=False))


def alone(model: nn.Module, other: nn.Module) -> bool:
    return not audit(model, other=other, only="PBN5*")


def test_a_deep_copy_is_alone():
    original = freeze(model(), "0")  # a frozen layer has a `train` of its own, bound to it
    assert alone(copy.deepcopy(original), original)


# ---- PBN501 to PBN503: memory and modules ---------------------------------------------------------------------------


def test_parameters_taken_over_by_assignment():
    one, other = model(), model()
    one.load_state_dict(other.state_dict(), assign=True)
    assert layers("PBN501", one, other) == ("0.weight", "0.bias", "1.weight", "1.bias", "2.weight")
    assert layers("PBN502", one, other) == ("1.running_mean", "1.running_var", "1.num_batches_tracked")
    assert layers("PBN503", one, other) == ()


def test_a_part_of_a_parameter_is_shared():
    one, other = model(), model()
    one[1].weight = nn.Parameter(other[1].weight.data[2:])  # a view
    one[1].running_mean = other[1].running_mean.view(2, 2)[:, 1]
    assert layers("PBN501", one, other) == ("1.weight",)
    assert layers("PBN502", one, other) == ("1.running_mean",)


def test_a_parameter_of_one_that_is_a_buffer_of_the_other():
    one, other = model(), model()
    one[1].running_mean = other[1].weight.detach()
    assert layers("PBN502", one, other) == ("1.running_mean",)
    assert layers("PBN501", other, one) == ("1.weight",)


def test_neighbours_in_one_flat_tensor_share_nothing():
    one, other = model(), model()
    flat = torch.zeros(12)
    one[1].weight, other[1].weight = nn.Parameter(flat[:4]), nn.Parameter(flat[4:8])
    one[1].running_mean, other[1].running_mean = flat[8:12:2], flat[9:12:2]
    assert alone(one, other)


def test_an_encoder_in_two_models():
    encoder = model()
    one, other = nn.Sequential(encoder, nn.Flatten()), nn.ModuleDict({"encoder": encoder, "head": nn.ReLU()})
    assert layers("PBN503", one, other) == ("0",)


def test_a_shallow_copy():
    original = model()
    assert layers("PBN503", copy.copy(original), original) == ("0", "1", "2")


def test_a_wrapper_is_no_copy():
    original = model()
    assert layers("PBN503", nn.DataParallel(original), original) == ("",)


# ---- PBN504: hooks --------------------------------------------------------------------------------------------------


def test_a_hook_that_closes_over_the_original():
    original = model()
    original[0].register_forward_hook(lambda module, args, output: original[1](output))
    twin = copy.deepcopy(original)
    [finding] = found("PBN504", twin, original)
    assert (finding.layers, finding.severity) == (("0._forward_hooks",), "error")


@pytest.mark.parametrize("register", ["register_forward_pre_hook", "register_full_backward_hook"])
def test_hooks_of_other_kinds(register):
    original = model()
    getattr(original[0], register)(functools.partial(lambda owner, *args: None, weakref.ref(original)))
    assert len(layers("PBN504", copy.deepcopy(original), original)) == 1


def test_hooks_that_write_to_one_list():
    original = model()
    seen: list[torch.Tensor] = []
    original[0].register_forward_hook(lambda module, args, output: seen.append(output))
    [finding] = found("PBN504", copy.deepcopy(original), original)
    assert (finding.layers, finding.severity) == (("0._forward_hooks",), "warning")


def test_hooks_that_hold_nothing_of_the_original():
    class Scale:
        def __init__(self, by: float) -> None:
            self.by = by

        def __call__(self, module, args, output):
            return output * self.by

    def bound(self, module, args, output):
        return output

    original = model()
    original[0].register_forward_hook(lambda module, args, output: output * 2)
    original[1].register_forward_hook(Scale(2.0))
    original[2].register_forward_hook(types.MethodType(bound, original[2]))  # which deepcopy copies along
    assert alone(copy.deepcopy(original), original)


# ---- PBN505: functions on instances ---------------------------------------------------------------------------------


def test_a_forward_patched_by_a_closure_runs_the_original():
    original = model()
    layer = original[0]
    layer.forward = lambda x: nn.Conv2d.forward(layer, x)
    twin = copy.deepcopy(original)
    assert layers("PBN505", twin, original) == ("0.forward",)
    with torch.no_grad():
        twin[0].weight.zero_()
    x = torch.randn(1, 3, 4, 4)
    assert torch.equal(twin[0](x), original[0](x))  # and so it does


def test_a_forward_patched_by_a_bound_method_is_copied_along():
    original = model()
    layer = original[0]
    layer.forward = types.MethodType(nn.Conv2d.forward, layer)
    assert alone(copy.deepcopy(original), original)


def test_a_forward_patched_by_a_function_of_no_model():
    original = model()
    original[1].forward = nn.functional.relu
    assert alone(copy.deepcopy(original), original)


def test_a_teacher_hidden_in_a_list():
    teacher = model()
    student = model()
    student.teachers = [teacher]
    assert layers("PBN505", student, teacher) == ("teachers",)
    student.teachers = [copy.deepcopy(teacher)]
    assert layers("PBN505", student, teacher) == ()


# ---- PBN506, PBN507: generators and other state ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "generator",
    [torch.Generator(), random.Random(0), np.random.default_rng(0), np.random.RandomState(0)],
    ids=lambda generator: type(generator).__module__,
)
def test_a_random_generator_for_two(generator):
    one, other = model(), model()
    one[0].noise = other[2].rng = generator
    assert layers("PBN506", one, other) == ("0.noise",)


def test_a_random_generator_for_each():
    one, other = model(), model()
    one.rng, other.rng = torch.Generator(), torch.Generator()
    one.everybodys = other.everybodys = torch.default_generator
    assert alone(one, other)


def test_a_queue_for_two():
    one, other = model(), model()
    one.queue = other.queue = torch.zeros(4, 4)  # an attribute: of a state dict it is no part
    one.losses = other.losses = [1.0]
    tensors, containers = found("PBN507", one, other)
    assert (tensors.severity, tensors.layers) == ("warning", ("queue",))
    assert (containers.severity, containers.layers) == ("note", ("losses",))


def test_what_cannot_change_may_be_shared():
    one, other = model(), model()
    one.size = other.size = (3, "same", torch.float32, nn.ReLU)
    one.act = other.act = torch.relu
    assert alone(one, other)


def test_hooks_of_one_annotated_function_share_nothing():
    """Torch wraps such hooks, and copies the annotations of the function: one dictionary for all models."""

    def fills(module: nn.Module, state: dict[str, object], *others: object) -> None:
        pass

    def hooked() -> nn.Module:
        layer = nn.Linear(2, 2)
        layer._register_load_state_dict_pre_hook(fills, with_module=True)
        return layer

    assert "PBN504" not in audit(hooked(), other=hooked())
    assert "PBN504" not in audit(nn.LazyLinear(2), other=nn.LazyLinear(2))
