"""snapshot: values of a model, by name, that stay what they are."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

from precisebn import InputError, diff_state, snapshot
from precisebn.nn import FrozenBatchNorm2d

pytestmark = pytest.mark.usefixtures("one_thread")


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), FrozenBatchNorm2d(4))


def test_it_is_a_mapping_like_a_state_dict():
    model = network()
    found = snapshot(model)
    assert list(found) == list(model.state_dict())
    assert all(torch.equal(found[key], value) for key, value in model.state_dict().items())
    assert len(found) == len(dict(found)) == len(model.state_dict())
    model.load_state_dict(dict(found))
    assert found.nbytes == sum(value.nbytes for value in model.state_dict().values())
    assert repr(found).startswith("<StateSnapshot of 12 tensors")
    with pytest.raises(KeyError):
        found["nothing"]


def test_it_stays_what_it_is_and_lets_the_model_go():
    model = network()
    weight = model[0].weight.detach().clone()
    found = snapshot(model)
    with torch.no_grad():
        model[0].weight.zero_()
    assert torch.equal(found["0.weight"], weight)
    assert not found["0.weight"].requires_grad
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_it_can_be_saved_sent_and_copied(tmp_path):
    model = network()
    found = snapshot(model)
    torch.save(dict(found), tmp_path / "before.pt")
    model[1].running_mean += 1
    for before in (pickle.loads(pickle.dumps(found)), copy.deepcopy(found), tmp_path / "before.pt"):
        assert [row.name for row in diff_state(before, model).changed] == ["1.running_mean"]


@pytest.mark.parametrize(
    ("kinds", "names"),
    [
        ("statistic", {"1.running_mean", "1.running_var", "1.num_batches_tracked"}),
        (("parameter",), {"0.weight", "0.bias", "1.weight", "1.bias"}),
        (["buffer"], {"2.weight", "2.bias"}),
    ],
)
def test_of_some_kinds_alone(kinds, names):
    model = network()
    found = snapshot(model, kinds=kinds)
    shown = set(found)
    assert names <= shown
    assert {row.name for row in diff_state(found, model).rows} == shown
    assert {row.kind for row in diff_state(found, copy.deepcopy(model.state_dict())).rows} == {
        kinds if isinstance(kinds, str) else kinds[0]
    }
    assert found.nbytes < snapshot(model).nbytes


@pytest.mark.parametrize("kinds", ["statistics", [], ["parameter", "bn"]])
def test_kinds_that_are_none(kinds):
    with pytest.raises(InputError, match="'parameter', 'statistic', 'buffer', 'value'"):
        snapshot(network(), kinds=kinds)


def test_it_takes_a_module():
    with pytest.raises(InputError, match="not OrderedDict; diff_state takes state dicts and files"):
        snapshot(network().state_dict())


def test_shared_tensors_are_copied_once_and_views_as_far_as_they_go():
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False))
    model[1].weight = model[0].weight
    found = snapshot(model)
    assert found["0.weight"] is found["1.weight"]
    assert found.nbytes == 64 * 64 * 4

    part = nn.Module()
    part.register_buffer("part", torch.zeros(1 << 20)[:3])
    part.register_buffer("wide", torch.ones(2, 1).expand(2, 1 << 40))
    copied = snapshot(part)
    assert [copied[name].untyped_storage().nbytes() for name in copied] == [12, 8]
    assert copied["wide"].shape == (2, 1 << 40)


def test_the_device_of_copies():
    model = network().to("meta")
    model.register_buffer("here", torch.ones(2))
    found = snapshot(model, device="cpu")
    assert found["here"].device.type == "cpu"
    assert found["here"].data_ptr() != model.here.data_ptr()
    assert found["0.weight"].is_meta  # nothing to move


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e5m2, torch.complex64, torch.bool, torch.uint16])
def test_dtypes(dtype):
    module = nn.Module()
    module.register_buffer("x", torch.ones(3).to(dtype))
    before = snapshot(module)
    assert diff_state(before, module).is_empty
    module.x.view(torch.uint8)[0] ^= 1
    assert [row.num_changed for row in diff_state(before, module).changed] == [1]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_layouts_that_modules_hold():
    module = nn.Module()
    module.register_buffer("sparse", torch.eye(3).to_sparse())
    module.register_buffer("quantized", torch.quantize_per_tensor(torch.ones(2), 0.5, 0, torch.quint8))
    module.register_buffer("channels", torch.ones(1, 2, 3, 4).to(memory_format=torch.channels_last))
    before = snapshot(module)
    assert diff_state(before, module).is_empty
    module.sparse = module.sparse * 2
    module.channels.add_(1)
    assert [(row.name, row.max_abs) for row in diff_state(before, module).changed] == [("sparse", 1), ("channels", 1)]


def test_a_scripted_module():
    model = torch.jit.script(network()[:2])
    before = snapshot(model)
    assert list(before) == list(model.state_dict())
    model(torch.randn(2, 3, 8, 8))
    assert {row.kind for row in diff_state(before, model).changed} == {"statistic"}
