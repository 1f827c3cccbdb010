"""What a data loader may yield: how it is passed on, moved and counted."""

import re
import sys
import traceback
from collections import OrderedDict, UserDict, namedtuple
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

from precisebn import BatchFormatError, InputError, adapt_bn_stats, update_bn_stats
from precisebn.errors import add_note
from precisebn.models.batches import call_model, common_device, copied, move_to

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
    message = (
        rf"^the mini-batch, {described}, was passed to Sequential .*forward=lambda model, batch: .*raised TypeError: "
    )
    with pytest.raises(BatchFormatError, match=message) as caught:
        update_bn_stats(model, [batch], 1)
    assert isinstance(caught.value, TypeError)
    assert isinstance(caught.value.__cause__, TypeError)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_what_a_model_says_to_a_nested_tensor_comes_through():
    """Its shape, which torch refuses to tell, is part of no message."""
    model = nn.Sequential(nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4))
    batch = torch.nested.nested_tensor([torch.zeros(3, 4), torch.zeros(3, 5)])
    with pytest.raises(NotImplementedError, match="aten::convolution") as caught:
        update_bn_stats(model, [batch], None)
    assert "Tensor(nested)" in explanation(caught.value)


def explanation(error: BaseException) -> str:
    """What an exception of a first mini-batch says of the guess, however this Python shows it."""
    if isinstance(error, BatchFormatError):
        return str(error)
    return "\n".join(getattr(error, "__notes__", []))


def encoder() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


class Detector(nn.Module):
    """Wants targets in training, as torchvision's detectors do, and complains as they do."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    def forward(self, images: list[Tensor], targets: Any = None) -> Tensor:
        assert targets is not None, "targets should not be none when in training mode"
        return self.bn(torch.stack(images))


ELSE = "; if that is wrong, pass forward=lambda model, batch: "
FIRST_MINI_BATCHES = {
    "float targets": (
        encoder, (IMAGE, FLOAT_TARGET), TypeError,
        "as a whole, model(batch), because item 1 is floating point, too" + ELSE + "model(batch[0])",
    ),
    "float targets in a mapping": (
        encoder, (IMAGE, {"boxes": FLOAT_TARGET}), TypeError, "because item 1 holds floating point, too",
    ),
    "detection, float boxes": (
        Detector, ([IMAGE[0]] * 2, [{"boxes": FLOAT_TARGET}] * 2), AssertionError,
        "as a whole, model(batch), because item 0 is not a tensor (list)" + ELSE + "model(*batch)",
    ),
    "two arguments wanted": (
        Detector, (IMAGE, LABELS), AssertionError,
        "as its item 0, model(batch[0]), because no other item is floating point" + ELSE + "model(*batch)",
    ),
    "pixels": (
        encoder, (IMAGE * 255).to(torch.uint8), RuntimeError,
        "Tensor(4, 3, 8, 8) of uint8, was passed to Sequential (whose parameters are float32) as it is, model(batch)"
        + ELSE + "model(batch.to(torch.float32))",
    ),
    "pixels and labels": (
        encoder, [(IMAGE * 255).to(torch.uint8), LABELS], TypeError,
        "as a whole, model(batch), because item 0 is not floating point but uint8" + ELSE + "model(batch[0].float())",
    ),
    "double precision": (
        encoder, (IMAGE.double(), LABELS), RuntimeError,
        "(whose parameters are float32) as its item 0, model(batch[0]), because no other item is floating point"
        + ELSE + "model(batch[0].to(torch.float32))",
    ),
    "channels last": (encoder, IMAGE.permute(0, 2, 3, 1), RuntimeError, "Tensor(4, 8, 8, 3), was passed to Sequential"),
    "mapping": (
        encoder, {"label": LABELS, "image": IMAGE}, TypeError,
        "as keyword arguments, model(**batch)" + ELSE + "model(batch['image'])",
    ),
    "NumPy": (
        encoder, [np.zeros((4, 3, 8, 8)), LABELS], TypeError, "because item 0 is not a tensor (ndarray)",
    ),
    "too few channels for BatchNorm": (
        lambda: nn.Sequential(nn.BatchNorm2d(5)), (IMAGE, LABELS), InputError, "as its item 0, model(batch[0])",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FIRST_MINI_BATCHES)
def test_whatever_the_first_mini_batch_raises_says_what_was_guessed(name):
    """The exception keeps its type, but for TypeErrors; and says what to pass instead, which then runs."""
    build, batch, kind, said = FIRST_MINI_BATCHES[name]
    with pytest.raises(kind) as caught:
        update_bn_stats(build(), [batch] * 3, 3)
    assert said in explanation(caught.value)
    if kind is TypeError:
        assert type(caught.value) is BatchFormatError
        assert explanation(caught.value).startswith("the mini-batch, ")
        assert len(explanation(caught.value)) < 600  # a convolution's complaint alone has 1,000 characters
        assert type(caught.value.__cause__) is TypeError  # and is not lost
    else:
        assert type(caught.value) is kind
        assert explanation(caught.value).startswith("precisebn: the mini-batch, ")


@pytest.mark.parametrize("name", ["float targets", "two arguments wanted", "pixels", "pixels and labels",
                                  "double precision", "mapping", "detection, float boxes"])  # fmt: skip
def test_what_the_error_of_a_first_mini_batch_advises_runs(name):
    build, batch, kind, _ = FIRST_MINI_BATCHES[name]
    with pytest.raises(kind) as caught:
        update_bn_stats(build(), [batch] * 3, 3)
    advice = re.search(
        r"pass forward=(lambda model, batch: model\(.*?\))(?: or |\. It raised|$)", explanation(caught.value)
    )[1]
    if name == "two arguments wanted":
        batch = (list(IMAGE), LABELS)
    assert update_bn_stats(build(), [batch] * 3, 3, forward=eval(advice, {"torch": torch})).num_iters == 3


def test_torchvisions_detectors_want_targets(torchvision):
    detection = torchvision.models.detection
    model = detection.fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None)
    targets = [{"boxes": torch.tensor([[0.0, 0.0, 4.0, 4.0]]), "labels": torch.ones(1).long()}] * 2
    with pytest.raises(AssertionError, match="targets should not be none") as caught:
        update_bn_stats(model, [([torch.rand(3, 64, 64)] * 2, targets)], 1, modules="all")
    said = "as a whole, model(batch), because item 0 is not a tensor (list)" + ELSE + "model(*batch)"
    assert said in explanation(caught.value)


def test_only_the_first_mini_batch_is_a_guess():
    with pytest.raises(RuntimeError) as caught:
        update_bn_stats(encoder(), [IMAGE, IMAGE[:, :2]], 2)
    assert explanation(caught.value) == ""


def test_running_out_of_memory_is_no_matter_of_form():
    class Hungry(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(torch.OutOfMemoryError) as caught:
        update_bn_stats(nn.Sequential(Hungry(3)), [IMAGE], 1)
    assert explanation(caught.value) == ""


def test_the_guess_is_explained_for_lazy_models_too():
    with pytest.raises(RuntimeError) as caught:
        update_bn_stats(nn.Sequential(nn.Conv2d(5, 4, 3), nn.LazyBatchNorm2d()), [IMAGE], 1)
    assert "was passed to Sequential as it is" in explanation(caught.value)


@pytest.mark.parametrize("version", [(3, 10), (3, 11)])
def test_a_note_shows_in_the_traceback_of_every_python(version, monkeypatch):
    """Python 3.10 shows no notes: there it is the cause, and one that an exception has already is not replaced."""
    monkeypatch.setattr(sys, "version_info", (*version, 0))
    if version == (3, 11) and not hasattr(Exception, "add_note"):
        pytest.skip("this Python has no notes")
    error, cause = KeyError("mine"), ValueError("why")
    add_note(error, "precisebn: a note")
    shown = "".join(traceback.format_exception(error))
    assert "precisebn: a note" in shown
    assert "KeyError: 'mine'" in shown
    with_cause = RuntimeError("mine")
    with_cause.__cause__ = cause
    add_note(with_cause, "precisebn: a note")
    assert with_cause.__cause__ is cause
    assert with_cause.__notes__ == error.__notes__ == ["precisebn: a note"]


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


# ---- Packed sequences, and copies ---------------------------------------------------------------------------------

PACKED = pack_sequence([torch.randn(n, 3) for n in (9, 7, 5, 2)])


def test_a_packed_sequence_is_passed_whole_though_it_is_a_tuple():
    model = Receiver()
    call_model(model, PACKED)
    assert model.received[0][0] is PACKED


class Recurrent(nn.Module):
    """An LSTM, which packed sequences are for, and the normalization of its output."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.bn = nn.LSTM(3, 5), nn.BatchNorm1d(5)

    def forward(self, x: Any) -> torch.Tensor:
        return self.bn(self.lstm(x)[0].data)


@pytest.mark.parametrize("device", [None, "cpu"])
def test_a_recurrent_network_is_recalibrated_on_packed_sequences(device):
    model = Recurrent()
    expected = model.lstm(PACKED)[0].data.mean(0)
    report = update_bn_stats(model, [PACKED], 1, device=device)
    torch.testing.assert_close(model.bn.running_mean, expected)
    assert report.num_samples == 4
    adapt_bn_stats(model, iter([PACKED]), prior=4)  # kept, and so copied
    torch.testing.assert_close(model.bn.running_mean, expected)


class Holder:
    """An object with tensors in it."""

    def __init__(self, x: torch.Tensor) -> None:
        self.x, self.same, self.me = x, {"x": x}, self


def test_a_copy_has_the_form_of_the_batch_and_memory_of_its_own():
    whole = torch.randn(1000, 3)
    batch = {"pair": Pair(whole[:4], "a"), "packed": PACKED, "object": Holder(whole[4:8]), "array": np.arange(3)}
    result = copied(batch, "no remedy")
    assert isinstance(result["pair"], Pair)
    assert isinstance(result["packed"], type(PACKED))
    assert result["object"].me is result["object"]
    assert result["object"].same["x"] is result["object"].x
    assert (
        result["pair"].image.untyped_storage().nbytes() == 4 * 3 * 4
    )  # and not that of the whole, of which it was a view
    expected = [whole[:4].clone(), PACKED.data.clone(), whole[4:8].clone()]
    for tensor in (whole, PACKED.data):
        tensor.add_(1)
    batch["array"] += 1
    found = [result["pair"].image, result["packed"].data, result["object"].x]
    assert all(map(torch.equal, found, expected))
    assert result["array"].tolist() == [0, 1, 2]


def test_what_cannot_be_copied_says_so():
    with pytest.raises(BatchFormatError, match=r"list\(generator\), cannot be copied: .*; pass a list"):
        copied([(x for x in range(3))], "pass a list")
