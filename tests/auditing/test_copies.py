"""check_copy: a copy that stands on its own passes, and each of what it may still share or lack is found."""

import copy
import pickle
import random
import types

import numpy as np
import pytest
import torch
from torch import nn

from precisebn import InputError, check_copy, convert_frozen_batchnorm, freeze
from precisebn.auditing.copies import COPY_CHECKS
from precisebn.nn import CycleBatchNormList, DomainSpecificBN

pytestmark = pytest.mark.usefixtures("one_thread")


def model() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Conv2d(4, 4, 1, bias=False))


def stepped(some: nn.Module, **settings) -> torch.optim.SGD:
    """An optimizer with state: momentum, after one step."""
    optimizer = torch.optim.SGD(some.parameters(), **{"lr": 0.1, "momentum": 0.9, **settings})
    some(torch.randn(2, 3, 8, 8)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def codes(*args, **kwargs) -> list[str]:
    return sorted({one.code for one in check_copy(*args, **kwargs)})


# ---- Copies that are ------------------------------------------------------------------------------------------------


def test_a_deep_copy_with_its_optimizer():
    """Story 3, done right."""
    original = model()
    optimizer = stepped(original)
    twin, its = copy.deepcopy((original, optimizer))
    report = check_copy(original, twin, optimizer=optimizer, copy_optimizer=its)
    assert not report
    assert set(report.passed) == {one.code for one in COPY_CHECKS}
    assert not report.not_run


def test_copies_by_pickle_and_by_state_dict():
    original = freeze(model(), "0").train()
    assert codes(original, pickle.loads(pickle.dumps(original))) == []
    plain, twin = model(), model()
    twin.load_state_dict(plain.state_dict())
    assert codes(plain, twin) == []


@pytest.mark.parametrize(
    "layer",
    [
        nn.LazyConv2d(4, 3),
        nn.BatchNorm2d(4, device="meta"),
        nn.BatchNorm2d(4, affine=False, track_running_stats=False),
        nn.InstanceNorm2d(4, track_running_stats=True),
        DomainSpecificBN(4, num_domains=2),
        CycleBatchNormList(2, num_features=4),
        nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 1)),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_layers_of_all_kinds(layer):
    original = nn.Sequential(layer)
    assert codes(original, copy.deepcopy(original)) == []


def test_a_frozen_and_converted_model():
    original = convert_frozen_batchnorm(model())
    assert codes(original, copy.deepcopy(original)) == []


def test_nan_is_equal_to_nan():
    original = model()
    original[1].running_mean[0] = float("nan")
    assert codes(original, copy.deepcopy(original)) == []


def test_a_copy_in_a_wrapper_has_the_same_names():
    original = model()
    assert codes(original, nn.DataParallel(copy.deepcopy(original))) == []


# ---- Copies that are none -------------------------------------------------------------------------------------------


def test_what_is_shared():
    original = model()
    assert codes(original, copy.copy(original)) == ["PBN501", "PBN502", "PBN503", "PBN507"]
    twin = copy.deepcopy(original)
    twin.load_state_dict(original.state_dict(), assign=True)
    assert codes(original, twin) == ["PBN501", "PBN502"]


def test_what_a_deep_copy_does_not_copy():
    original = model()
    layer = original[0]
    layer.forward = lambda x: nn.Conv2d.forward(layer, x)
    original[1].register_forward_pre_hook(lambda module, args: layer.zero_grad())
    assert codes(original, copy.deepcopy(original)) == ["PBN504", "PBN505"]
    layer.forward = types.MethodType(nn.Conv2d.forward, layer)
    original[1]._forward_pre_hooks.clear()
    assert codes(original, copy.deepcopy(original)) == []


def test_other_values():
    original, twin = model(), model()
    [finding] = check_copy(original, twin)
    assert (finding.code, finding.layers) == ("PBN511", ("0.weight", "0.bias", "3.weight"))


def test_a_forward_in_train_mode_parts_two_models():
    """Story 3: what looks at a model moves its buffers."""
    original = model()
    twin = copy.deepcopy(original)
    twin.train()(torch.randn(2, 3, 8, 8))
    [finding] = check_copy(original, twin)
    assert (finding.code, finding.layers) == (
        "PBN511",
        ("1.running_mean", "1.running_var", "1.num_batches_tracked"),
    )


def generators() -> list[object]:
    return [
        torch.Generator().manual_seed(3),
        random.Random(3),
        np.random.default_rng(3),
        np.random.Generator(np.random.MT19937(3)),
        np.random.RandomState(3),
    ]


@pytest.mark.parametrize("kind", range(5))
def test_random_generators_that_have_drawn(kind):
    """Story 3: two models that were alike, and draw other numbers."""
    original = model()
    original[0].noise = generators()[kind]
    twin = copy.deepcopy(original)
    assert codes(original, twin) == []
    rng = twin[0].noise
    torch.rand(1, generator=rng) if isinstance(rng, torch.Generator) else rng.random()
    [finding] = check_copy(original, twin)
    assert (finding.code, finding.layers) == ("PBN511", ("0.noise",))


def test_other_hooks_and_classes():
    original = model()
    original[1].register_forward_hook(lambda module, args, output: output)
    twin = model()
    twin.load_state_dict(original.state_dict())
    [finding] = check_copy(original, twin)
    assert (finding.code, finding.layers) == ("PBN511", ("1._forward_hooks",))
    twin[1] = nn.SyncBatchNorm(4)
    twin[1].register_forward_hook(lambda module, args, output: output)
    twin.load_state_dict(original.state_dict())
    [finding] = check_copy(original, twin)
    assert (finding.code, finding.layers) == ("PBN511", ("1",))


def test_other_dtypes_zeros_and_parts():
    original = model()
    with torch.no_grad():
        original[0].bias.zero_()
    negative = copy.deepcopy(original)
    with torch.no_grad():
        negative[0].bias.neg_()
    assert codes(original, negative) == ["PBN511"]  # -0 is not 0
    assert codes(original, copy.deepcopy(original).double()) == ["PBN511"]
    longer = copy.deepcopy(original).append(nn.Linear(2, 2))
    [finding] = check_copy(original, longer)
    assert finding.layers == ("4.weight", "4.bias")


def test_other_modes():
    original = freeze(model(), "0")
    original[2].eval()
    twin = model()
    twin.load_state_dict(original.state_dict())
    modes, trained = check_copy(original, twin)
    assert (modes.code, modes.layers) == ("PBN512", ("2",))
    assert (trained.code, trained.layers) == ("PBN512", ("0.weight", "0.bias"))


# ---- Optimizers -----------------------------------------------------------------------------------------------------


def test_an_optimizer_copied_by_itself():
    original = model()
    optimizer = stepped(original)
    twin, its = copy.deepcopy(original), copy.deepcopy(optimizer)
    assert codes(original, twin, optimizer=optimizer, copy_optimizer=its) == ["PBN301"]


def test_the_optimizer_of_the_original():
    original = model()
    optimizer = stepped(original)
    twin = copy.deepcopy(original)
    assert codes(original, twin, optimizer=optimizer, copy_optimizer=optimizer) == ["PBN301", "PBN513"]


def test_a_new_optimizer_has_no_momentum():
    original = model()
    optimizer = stepped(original)
    twin = copy.deepcopy(original)
    its = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    assert codes(original, twin, optimizer=optimizer, copy_optimizer=its) == ["PBN514"]
    its.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert codes(original, twin, optimizer=optimizer, copy_optimizer=its) == []
    its.param_groups[0]["lr"] = 0.2
    assert codes(original, twin, optimizer=optimizer, copy_optimizer=its) == ["PBN514"]


def test_a_state_dict_hands_over_the_very_tensors():
    original = model()
    optimizer = stepped(original)
    twin = copy.deepcopy(original)
    its = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    its.load_state_dict(optimizer.state_dict())
    momentum = [optimizer.state[original[0].weight]["momentum_buffer"], its.state[twin[0].weight]["momentum_buffer"]]
    shared = momentum[0].data_ptr() == momentum[1].data_ptr()
    found = codes(original, twin, optimizer=optimizer, copy_optimizer=its)
    assert found == (["PBN513"] if shared else [])
    assert shared  # torch documents no copy, and makes none where dtype and device are right


def test_what_is_not_given_is_not_looked_at():
    original = model()
    report = check_copy(original, copy.deepcopy(original), optimizer=stepped(original))
    assert report.not_run["PBN301"] == report.not_run["PBN513"] == "needs copy_optimizer="
    assert check_copy(original, copy.deepcopy(original)).not_run["PBN513"] == "needs copy_optimizer= and optimizer="
    report = check_copy(original, copy.deepcopy(original), copy_optimizer=stepped(original))
    assert report.not_run["PBN513"] == "needs optimizer="


# ---- Wrong calls ----------------------------------------------------------------------------------------------------


def test_wrong_calls():
    original = model()
    with pytest.raises(InputError, match="copy is the model itself"):
        check_copy(original, original)
    with pytest.raises(InputError, match="copy must be a module, not dict"):
        check_copy(original, {})
    with pytest.raises(InputError, match="copy_optimizer must be an optimizer, or several in a list, not int"):
        check_copy(original, model(), copy_optimizer=3)
    with pytest.raises(InputError, match="only='PBN999' matches the code of no check"):
        check_copy(original, model(), only="PBN999")
