"""audit as a whole: what it leaves as it was, which checks it runs, what it refuses, and that clean models pass."""

import copy
import inspect
import random

import numpy as np
import pytest
import torch
from conftest import state_of, values_of
from torch import nn

import precisebn
from precisebn import (
    InputError,
    accumulate_statistics,
    audit,
    check_copy,
    check_determinism,
    convert_sync_batchnorm,
    freeze,
    update_bn_stats,
)
from precisebn.auditing.checks import CHECKS
from precisebn.auditing.copies import COPY_CHECKS
from precisebn.auditing.finding import SEVERITIES
from precisebn.nn import BatchStatBN, CycleBatchNormList, DomainSpecificBN, GhostBN

pytestmark = pytest.mark.usefixtures("one_thread")


def model() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))


def generators() -> list[object]:
    numbers = np.random.get_state()
    return [torch.get_rng_state().tolist(), random.getstate(), [str(numbers[0]), list(numbers[1]), *numbers[2:]]]


# ---- What it leaves as it was ----------------------------------------------------------------------------------------


def test_model_optimizer_and_generators_are_as_before():
    """On a model with as many mistakes as there is room for: checks that find something may do more."""
    some, other = model(), model()
    some[1].eval()
    some[4].requires_grad_(False)
    some[3].register_forward_hook(lambda module, args, output: other(output))
    some.add_module("cycle", CycleBatchNormList(2, num_features=4))
    optimizer = torch.optim.AdamW(some.parameters())
    other.load_state_dict(model().state_dict(), assign=True)
    some[:2](torch.randn(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    pictures = state_of(some), state_of(other)
    gradients = {name: None if p.grad is None else p.grad.clone() for name, p in some.named_parameters()}
    settings, random_state = copy.deepcopy(optimizer.state_dict()), generators()
    report = audit(some, optimizer=optimizer, other=other, num_steps=10)
    assert len(report) >= 5
    assert (state_of(some), state_of(other)) == pictures
    assert generators() == random_state
    for name, p in some.named_parameters():
        assert (p.grad is None) == (gradients[name] is None)
        assert p.grad is None or torch.equal(p.grad, gradients[name])
    now = optimizer.state_dict()
    assert now["param_groups"] == settings["param_groups"]
    for key, entries in settings["state"].items():
        assert all(torch.equal(now["state"][key][name], value) for name, value in entries.items())


# ---- Which checks ----------------------------------------------------------------------------------------------------


def test_codes_are_unique_in_order_and_in_the_form_of_codes():
    codes = [one.code for one in CHECKS]
    assert codes == sorted(set(codes))
    assert all(len(code) == 6 and code.startswith("PBN") and code[3:].isdigit() for code in codes)
    every = {one.code: one for one in (*CHECKS, *COPY_CHECKS)}
    assert len(every) == len({id(one) for one in (*CHECKS, *COPY_CHECKS)})
    assert all(one.severity in SEVERITIES for one in every.values())


def test_every_argument_that_a_check_needs_is_one_of_audits():
    arguments = set(inspect.signature(audit).parameters)
    assert {name for one in CHECKS for name in one.needs} <= arguments


def test_only_and_ignore():
    some = model()
    assert set(audit(some, only="PBN101").passed) == {"PBN101"}
    assert set(audit(some, only=["PBN20[12]", "pbn101"]).passed) == {"PBN101", "PBN201", "PBN202"}
    assert "PBN203" in audit(some)
    assert "PBN203" not in audit(some, ignore="PBN2*")
    everything = audit(some)
    rest = audit(some, ignore="PBN203")
    assert set(everything.passed) == set(rest.passed)
    assert set(audit(some, ignore=[]).passed) == set(everything.passed)
    assert set(audit(some, only="PBN5*").not_run) >= {"PBN501", "PBN502"}


def test_findings_are_gravest_first_and_then_by_code():
    some = model()
    some[1].running_mean[0] = float("nan")
    some[4].eval()
    found = [(one.severity, one.code) for one in audit(some)]
    assert found[0] == ("error", "PBN201")
    assert found == sorted(found, key=lambda one: (-SEVERITIES.index(one[0]), one[1]))


# ---- What it refuses -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": {}}, "model must be a module, not dict"),
        ({"model": model().state_dict()}, "model must be a module, not OrderedDict"),
        ({"model": nn.ReLU}, "model must be a module, not type"),
        ({"other": "model"}, "other must be a module, not str"),
        ({"optimizer": 3}, "optimizer must be an optimizer, or several in a list, not int"),
        ({"optimizer": []}, "optimizer must be an optimizer, or several in a list, not list"),
        ({"num_steps": 0}, "num_steps=0 must be a whole number, 1 or more"),
        ({"num_steps": 1.5}, "num_steps=1.5 must be a whole number, 1 or more"),
        ({"loss": 0.1}, "loss must be a function, not float"),
        ({"forward": "call"}, "forward must be a function, not str"),
        ({"only": "PBN1O1"}, "only='PBN1O1' matches the code of no check; did you mean 'PBN"),
        ({"only": "E501"}, "only='E501' matches the code of no check; "),
        ({"only": []}, "only= is empty, so that nothing would be looked for"),
        ({"ignore": [101]}, "ignore= takes codes and patterns over them, not int"),
    ],
)
def test_wrong_calls(arguments, message):
    with pytest.raises(InputError) as raised:
        audit(**{"model": model(), **arguments})
    assert str(raised.value).startswith(message)


LOOKS = {
    "audit": lambda some, x: audit(some, x),
    "other=": lambda some, x: audit(model(), other=some),
    "check_copy": lambda some, x: check_copy(some, copy.deepcopy(some)),
    "check_determinism": lambda some, x: check_determinism(
        lambda: some(x), model=some, optimizer=torch.optim.SGD(some.parameters(), lr=0.1)
    ),
}


@pytest.mark.parametrize("look", LOOKS)
def test_a_model_whose_forwards_something_stands_in_is_refused(look):
    """Its running statistics are scratch buffers then, and forwards of an audit would be counted."""
    some, batches, refused = model(), [torch.randn(4, 3, 6, 6) for _ in range(3)], []

    def batches_that_look():
        for batch in batches:
            with pytest.raises(InputError, match=r"Sequential, or a part of it, is being recalibrated") as caught:
                LOOKS[look](some, batch)
            refused.append(caught)
            yield batch

    some[2].p = 0.0
    expected = copy.deepcopy(some)
    update_bn_stats(expected, batches, None)
    update_bn_stats(some, batches_that_look(), None)
    assert len(refused) == 3
    assert values_of(some) == values_of(expected)
    with accumulate_statistics(some, "1"), pytest.raises(InputError, match="accumulate_statistics"):
        LOOKS[look](some, batches[0])
    LOOKS[look](some, batches[0])


def test_a_model_beside_itself():
    some = model()
    with pytest.raises(InputError, match="other= is the model itself"):
        audit(some, other=some)


# ---- Clean models ----------------------------------------------------------------------------------------------------


def graver_than_notes(some: nn.Module) -> list[str]:
    """Of a model as it comes, about to be trained, and of its copy."""
    optimizer = torch.optim.SGD(some.parameters(), lr=0.1)
    report = audit(some, optimizer=optimizer, num_steps=10_000)
    twin, its = copy.deepcopy((some, optimizer))
    copied = check_copy(some, twin, optimizer=optimizer, copy_optimizer=its)
    return [f"{one.code} {one.layers}" for of in (report, copied) for one in of.at_least("warning")]


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "densenet121", "googlenet", "mnasnet0_5"])
def test_nothing_above_a_note_in_models_of_torchvision(name, torchvision):
    arguments = {"init_weights": False} if name == "googlenet" else {}
    assert graver_than_notes(getattr(torchvision.models, name)(weights=None, **arguments)) == []


@pytest.mark.parametrize("name", ["efficientnet_b0", "tf_efficientnet_b0", "regnetx_002", "levit_128s", "repvgg_a0"])
def test_nothing_above_a_note_in_models_of_timm(name, timm):
    assert graver_than_notes(timm.create_model(name)) == []


def test_nothing_above_a_note_in_models_of_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
    assert graver_than_notes(transformers.ResNetForImageClassification(config)) == []


def test_the_momentum_of_transformers_mobilenet_is_tensorflows():
    """0.997, which torch takes for the weight of the new value: a note, until the model is to be trained."""
    transformers = pytest.importorskip("transformers")
    some = transformers.MobileNetV2Model(transformers.MobileNetV2Config(depth_multiplier=0.25))
    assert [one.code for one in audit(some).at_least("warning")] == []
    optimizer = torch.optim.SGD(some.parameters(), lr=0.1)
    assert [one.code for one in audit(some, optimizer=optimizer).at_least("warning")] == ["PBN206"]


def test_nothing_above_a_note_in_modules_of_ours():
    some = nn.ModuleList(
        [GhostBN(4, 2), DomainSpecificBN(4, num_domains=2), BatchStatBN(4), CycleBatchNormList(2, num_features=4)]
    )
    assert graver_than_notes(some) == []
    assert graver_than_notes(convert_sync_batchnorm(model())) == []
    some = freeze(model(), "0", "1")
    assert [one.code for one in audit(some.train()).at_least("warning")] == []


def test_models_in_other_forms():
    """Compiled, traced, scripted: what is there is looked at, and nothing raises."""
    some = model().eval()
    forms = [torch.compile(some), torch.fx.symbolic_trace(some), nn.DataParallel(some)]
    forms.append(torch.jit.script(some))
    forms.append(torch.jit.trace(some, torch.randn(1, 3, 8, 8)))
    for form in forms:
        assert audit(form).at_least("warning") == []
        assert audit(form, other=model(), num_steps=10, only="PBN5*").at_least("warning") == []
    some[1].running_mean[0] = float("nan")
    for form in forms[:3]:  # torch.jit's modules are of no class that is known
        assert audit(form, only="PBN201")["PBN201"][0].layers == ("1",)


def test_models_without_values():
    with torch.device("meta"):
        meta = model()
    lazy = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d())
    for some in (meta, lazy):
        optimizer = torch.optim.SGD(some.parameters(), lr=0.1)
        report = audit(some, optimizer=optimizer, other=model(), num_steps=100)
        assert {one.code for one in report} <= {"PBN601"}  # a bias needs no values to be wasted


def test_another_default_device_makes_no_difference():
    """Such as torch.set_default_device("cuda") is one for a model on the CPU."""
    some = nn.Sequential(model(), nn.Flatten(), nn.Linear(64, 3))
    optimizer = torch.optim.SGD(some.parameters(), lr=0.1)
    loader = [(torch.randn(8, 3, 6, 6), torch.arange(8) % 3) for _ in range(4)]

    def run() -> list[str]:
        loss = nn.functional.cross_entropy
        report = audit(
            some, loader[0], optimizer=optimizer, loss=lambda out, batch: loss(out, batch[1]), loader=loader,
            other=model(), num_steps=100,
        )  # fmt: skip
        return [str(finding) for finding in report]

    expected = run()
    with torch.device("meta"):
        assert run() == expected


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*reduce_range will be deprecated.*")
def test_quantized_models():
    """Trained for quantization, where a BatchNorm lies inside of a convolution; and one that is quantized."""
    quantization = pytest.importorskip("torch.ao.quantization")
    some = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).train()
    fused = quantization.fuse_modules_qat(some, [["0", "1", "2"]])
    fused.qconfig = quantization.get_default_qat_qconfig("fbgemm")
    trained = quantization.prepare_qat(fused)
    assert audit(trained)["PBN203"][0].layers == ("0.bn",)
    assert audit(trained).at_least("warning") == []
    trained[0].bn.running_var[0] = float("nan")
    assert audit(trained)["PBN201"][0].layers == ("0.bn",)
    assert audit(nn.Sequential(torch.ao.nn.quantized.BatchNorm2d(4))).at_least("warning") == []


def test_a_model_without_layers_of_interest():
    assert audit(nn.Linear(2, 2), other=nn.ReLU(), num_steps=3).findings == ()
    assert audit(nn.Module()).findings == ()
    assert precisebn.audit is audit
