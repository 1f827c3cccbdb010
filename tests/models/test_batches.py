"""What a data loader may yield: how it is passed on, moved and counted."""

from collections import OrderedDict, UserDict, namedtuple
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

from precisebn import BatchFormatError, InputError, adapt_bn_stats, update_bn_stats
from precisebn.models.batches import call_model, common_device, move_to, num_samples

IMAGE, LABELS, FLOAT_TARGET, MASK = torch.randn(4, 3, 8, 8), torch.arange(4), torch.randn(4, 1), torch.ones(4).bool()
Pair = namedtuple("Pair", ["image", "label"])


class Receiver(nn.Module):
    """Takes anything, and remembers what."""

    def forward(self, *args: Any, **kwargs: Any) -> None:
        self.received = args, kwargs


INPUT_ONLY = {
    "tensor and labels": (IMAGE, LABELS),
    "list of tensor and labels": [IMAGE, LABELS],
    "strings": [IMAGE, LABELS, ["a.png", "b.png", "c.png", "d.png"]],
    "mask, numbers, None": (IMAGE, MASK, 3, 0.5, None),
    "metadata": (IMAGE, {"id": LABELS, "name": "x"}),
    "nested labels": (IMAGE, (LABELS, [LABELS])),
    "NumPy array": (IMAGE, np.arange(4.0)),
    "one tensor": [IMAGE],
    "named tuple": Pair(IMAGE, LABELS),
}
AS_IT_IS = {
    "tensor": IMAGE,
    "integer tensor": LABELS,
    "two float tensors": (IMAGE, IMAGE),
    "float target": (IMAGE, FLOAT_TARGET),
    "nested float target": [IMAGE, {"boxes": FLOAT_TARGET}],
    "deeper float target": (IMAGE, [LABELS, (FLOAT_TARGET,)]),
    "labels first": (LABELS, IMAGE),
    "list of dicts, as detectron2's": [{"image": IMAGE[0], "height": 8}, {"image": IMAGE[1], "height": 8}],
    "nested views": ([IMAGE, IMAGE], LABELS),
    "empty list": [],
    "string": "text",
    "None": None,
}
KEYWORDS = {
    "dict": {"pixel_values": IMAGE, "labels": LABELS},
    "OrderedDict": OrderedDict(x=IMAGE),
    "UserDict, as transformers' BatchEncoding": UserDict(x=IMAGE),
    "read-only mapping": MappingProxyType({"x": IMAGE}),
}


@pytest.mark.parametrize("form", INPUT_ONLY)
def test_a_float_tensor_and_no_other_stands_for_itself(form):
    model = Receiver()
    call_model(model, INPUT_ONLY[form])
    (received,), kwargs = model.received
    assert received is IMAGE
    assert kwargs == {}


@pytest.mark.parametrize("form", AS_IT_IS)
def test_anything_else_is_passed_as_it_is(form):
    model = Receiver()
    call_model(model, AS_IT_IS[form])
    (received,), kwargs = model.received
    assert received is AS_IT_IS[form]
    assert kwargs == {}


@pytest.mark.parametrize("form", KEYWORDS)
def test_a_mapping_becomes_keyword_arguments(form):
    model = Receiver()
    call_model(model, KEYWORDS[form])
    args, kwargs = model.received
    assert args == ()
    assert list(kwargs) == list(KEYWORDS[form])
    assert all(kwargs[key] is KEYWORDS[form][key] for key in kwargs)


@pytest.mark.parametrize(
    ("batch", "described"),
    [
        ({"pixels": IMAGE}, r"dict\('pixels': Tensor\(4, 3, 8, 8\)\)"),
        ((IMAGE, FLOAT_TARGET), r"tuple\(Tensor\(4, 3, 8, 8\), Tensor\(4, 1\)\)"),
        ([{"image": IMAGE}], r"list\(dict\('image': Tensor\(4, 3, 8, 8\)\)\)"),
        ("text", "str"),
    ],
)
def test_a_wrong_guess_shows_the_batch_and_names_forward(batch, described):
    model = nn.Sequential(nn.BatchNorm2d(3))
    message = rf"Sequential on a batch of the form {described} raised TypeError: .*forward=lambda model, batch"
    with pytest.raises(BatchFormatError, match=message) as caught:
        update_bn_stats(model, [batch], 1)
    assert isinstance(caught.value, TypeError)
    assert isinstance(caught.value.__cause__, TypeError)


def test_a_type_error_of_the_users_own_forward_stays_as_it_is():
    def forward(model: nn.Module, batch: Tensor) -> None:
        raise TypeError("mine")

    with pytest.raises(TypeError, match=r"^mine$") as caught:
        update_bn_stats(nn.BatchNorm2d(3), [IMAGE], 1, forward=forward)
    assert not isinstance(caught.value, BatchFormatError)


class Movable:
    """Stands for BatchEncoding, PyG's Data, detectron2's Instances: they move themselves."""

    def to(self, device: torch.device | str) -> tuple[str, str]:
        return "moved to", str(device)


def test_every_tensor_in_nested_containers_moves():
    batch = {
        "list": [IMAGE, (LABELS, "text")],
        "named": Pair(IMAGE, {"deep": MASK}),
        "object": Movable(),
        "packed": pack_sequence([torch.ones(3), torch.ones(2)]),
        "rest": (1, None, "string", np.zeros(2)),
    }
    moved = move_to(batch, "meta")
    assert moved["list"][0].is_meta
    assert moved["list"][1][0].is_meta
    assert moved["list"][1][1] == "text"
    assert isinstance(moved["named"], Pair)
    assert moved["named"].image.is_meta
    assert moved["named"].label["deep"].is_meta
    assert moved["object"] == ("moved to", "meta")
    assert moved["packed"].data.is_meta
    assert moved["rest"][3] is batch["rest"][3]
    assert not IMAGE.is_meta
    assert isinstance(moved["list"], list)
    assert isinstance(moved["rest"], tuple)


@pytest.mark.parametrize("form", {**AS_IT_IS, **INPUT_ONLY, **KEYWORDS})
def test_moving_to_where_a_batch_already_is_keeps_its_form(form):
    batch = {**AS_IT_IS, **INPUT_ONLY, **KEYWORDS}[form]
    model, moved = Receiver(), Receiver()
    call_model(model, batch)
    call_model(moved, move_to(batch, "cpu"))
    assert str(model.received) == str(moved.received)


def test_common_device():
    two = nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1, device="meta")])
    assert common_device(nn.Linear(1, 1)) == torch.device("cpu")
    assert common_device(two) is None
    assert common_device(nn.BatchNorm1d(2, affine=False)) == torch.device("cpu")  # buffers alone
    assert common_device(nn.ReLU()) is None


@pytest.mark.parametrize(
    ("batch", "samples"),
    [
        (IMAGE, 4),
        ((IMAGE, LABELS), 4),
        ({"n": 3, "x": IMAGE}, 4),
        ({"inputs": {"x": IMAGE}}, 4),
        ({"image": [IMAGE, IMAGE]}, 4),
        ([{"image": IMAGE[0]}] * 3, 3),
        (["a", "b"], 2),
        (([IMAGE, IMAGE], LABELS), 4),
        (torch.tensor(1.0), 1),
        (object(), 1),
        ([], 1),
        ({"n": 3}, 1),
    ],
)
def test_samples_in_a_batch(batch, samples):
    assert num_samples(batch) == samples


def test_samples_are_counted_in_the_report_whatever_the_form():
    bn = nn.BatchNorm2d(3)
    report = adapt_bn_stats(
        bn, [{"view": (IMAGE, LABELS)}] * 3, prior=12.0, forward=lambda model, batch: model(batch["view"][0])
    )
    assert report.num_samples == 12
    torch.testing.assert_close(bn.running_mean, IMAGE.mean((0, 2, 3)) / 2)


class AttributeDict(dict):
    """A mapping that answers to any attribute, as configuration libraries have."""

    __getattr__ = dict.__getitem__


def test_a_container_in_which_nothing_moves_is_handed_on_as_it_is():
    batch = [AttributeDict(x=torch.zeros(2)), (torch.ones(1), "label")]
    assert move_to(batch, "cpu") is batch


def test_a_container_keeps_its_type_where_something_moves():
    moved = move_to(AttributeDict(x=torch.zeros(2), y="label"), "meta")
    assert type(moved) is AttributeDict
    assert moved.x.device.type == "meta"
    assert moved.y == "label"


def test_a_container_that_cannot_be_rebuilt_says_so():
    class Images(list):
        def __init__(self, images, sizes):
            super().__init__(images)

    with pytest.raises(InputError, match=r"Images.*cannot be rebuilt"):
        move_to(Images([torch.zeros(2)], [1]), "meta")


@pytest.mark.parametrize(
    ("batch", "samples"),
    [
        (([torch.rand(3, 8, 8)] * 5, [{}] * 5), 5),  # torchvision's detection: images of any size, targets
        ({"step": torch.tensor(3), "x": torch.rand(5, 3)}, 5),
        ([torch.rand(5, 3, 8, 8), torch.zeros(5).long()], 5),
        ((torch.rand(5, 3), torch.rand(5, 3)), 5),
    ],
)
def test_samples_are_counted_in_any_form_of_batch(batch, samples):
    assert num_samples(batch) == samples
