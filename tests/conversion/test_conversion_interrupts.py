"""All or nothing: conversions that fail, and Ctrl-C at every line of them, by real signals."""

import functools
import itertools
import signal

import pytest
import torch
from conftest import import_torchvision, values_of
from interrupting import Lines, Nth
from model_zoo import CONVERSIONS, Picture, convnet, lived_in
from torch import nn

from precisebn.conversion.converters import (
    convert_frozen_batchnorm,
    convert_ghost,
    convert_to_batchnorm,
)
from precisebn.conversion.engine import replace_batchnorm
from precisebn.conversion.layers import origin_of
from precisebn.nn import (
    FrozenBatchNorm2d,
    GhostBN,
)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # torch.compile of 2.10 to 2.13, and torch.ao, warn of the use of deprecated parts of torch.
    pytest.mark.filterwarnings("ignore::FutureWarning:torch.*"),
]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("first", [lambda model: model, *CONVERSIONS.values()], ids=["BatchNorm", *CONVERSIONS])
def test_a_factory_that_fails_leaves_the_model_bit_identical(first, error):
    model = first(convnet())
    model[7].register_load_state_dict_pre_hook(lambda *args: None)
    with torch.no_grad():
        model[1].bias.add_(1.0)
    for parameter in model[1].parameters():
        parameter.requires_grad_(False)
    model[1].later = "mine"
    before = Picture(model)
    origins = [origin.layer for origin in map(origin_of, (model[1], model[7])) if origin is not None]
    origins_before = list(map(Picture, origins))

    def failing(bn: nn.Module) -> nn.Module:
        if isinstance(bn, nn.BatchNorm1d):
            raise error
        return GhostBN(bn.num_features, 2)

    with pytest.raises(error):
        replace_batchnorm(model, failing, include=["1", "7"])
    assert Picture(model) == before
    assert list(map(Picture, origins)) == origins_before
    model.load_state_dict(model.state_dict())


class Frozen:
    """A converted layer of timm's in two places, whose origin has other values, another dtype and a gradient."""

    def __init__(self, dtype: torch.dtype) -> None:
        import_torchvision()
        norm_act = pytest.importorskip("timm.layers.norm_act")
        self.layer = norm_act.BatchNormAct2d(3)
        self.layer.weight.grad = torch.ones(3)
        self.layer.register_load_state_dict_pre_hook(_nothing)
        self.model = convert_frozen_batchnorm(nn.Sequential(self.layer, self.layer))
        self.model[0].weight.add_(1.0)
        self.model.to(dtype)
        self.dtype = dtype
        self.before, self.layer_before = self.picture()

    def picture(self) -> tuple[Picture, tuple[object, ...]]:
        weight = self.layer.weight
        assert weight.grad is not None
        return Picture(self.model), (Picture(self.layer), weight.dtype, weight.grad.dtype, id(weight.grad))

    def check(self, converted_to: type[nn.Module]) -> bool:
        """Whether the model is converted, wholly; if it is not, it must be as before."""
        if isinstance(self.model[0], FrozenBatchNorm2d):
            assert self.picture() == (self.before, self.layer_before)
            return False
        assert type(self.model[0]) is type(self.model[1]) is converted_to
        assert self.model[0] is self.model[1]
        assert self.model[0].weight.tolist() == [2.0] * 3
        assert self.model[0].weight.dtype == self.dtype
        self.model.load_state_dict(self.model.state_dict())
        return True


def _nothing(*args: object) -> None:
    """A hook that the layer must keep; of a module's own, so that it can be copied."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_interrupted_at_any_line_a_conversion_is_done_or_not_begun(dtype):
    """Also in the middle of putting layers in place, of undoing, and on the way from one layer to another."""
    outcomes = []
    for number in itertools.count():
        frozen = Frozen(dtype)
        convert = functools.partial(convert_ghost, frozen.model, 2, include="0")
        lines = Lines(lambda n, where, number=number: n == number).run(convert)
        done = frozen.check(GhostBN)
        if number >= len(lines.ran):
            break
        assert lines.interrupted
        outcomes.append(done)
    assert done  # what no signal interrupts
    assert outcomes.count(False) > 500


@pytest.mark.parametrize("direction", ["there", "back"])
@pytest.mark.parametrize("name", CONVERSIONS)
def test_interrupted_from_any_line_on_again_and_again(name, direction):
    """Ctrl-C held down: also while what the first one began is undone."""

    def build() -> nn.Module:
        model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm1d(2))
        return CONVERSIONS[name](model) if direction == "back" else model

    convert = convert_to_batchnorm if direction == "back" else CONVERSIONS[name]
    convert(build())  # what is remembered of classes is then remembered
    for line in dict.fromkeys(Lines(_nowhere).run(functools.partial(convert, build())).ran):
        model = build()
        before = Picture(model)
        assert Lines(_From(line)).run(functools.partial(convert, model)).interrupted
        kept = [layer in dict(before.modules).values() for layer in model]
        assert all(kept) or not any(kept)
        if all(kept):
            assert Picture(model) == before


def _nowhere(number: int, where: tuple[str, int]) -> bool:
    return False


class _From:
    """At all lines from the first time on that one is run."""

    def __init__(self, line: tuple[str, int]) -> None:
        self.line = line
        self.begun = False

    def __call__(self, number: int, where: tuple[str, int]) -> bool:
        self.begun = self.begun or where == self.line
        return self.begun


class _Interrupting:
    """A factory that is interrupted; and wants to be so again, a number of lines later."""

    def __init__(self, again_after: int) -> None:
        self.again_after = again_after
        self.again_at = -1
        self.lines = Lines(lambda number, where: number == self.again_at)

    def __call__(self, bn: nn.Module) -> nn.Module:
        if isinstance(bn, nn.BatchNorm1d):
            self.again_at = len(self.lines.ran) + self.again_after
            signal.raise_signal(signal.SIGINT)
            raise AssertionError("the interrupt comes at once")
        return GhostBN(bn.num_features, 2)


def test_a_factory_can_be_interrupted_and_the_clean_up_behind_it_cannot():
    for again_after in itertools.count():
        model = convert_frozen_batchnorm(convnet())
        model[1].register_load_state_dict_pre_hook(_nothing)
        model[1].weight.add_(1.0)  # which the origin, not in the model, is given on the way
        everything = nn.ModuleList([model, *(origin_of(model[k]).layer for k in (1, 7))])
        before, factory = Picture(everything), _Interrupting(again_after)
        factory.lines.run(functools.partial(replace_batchnorm, model, factory, include=["1", "7"]))
        assert factory.lines.interrupted
        assert Picture(everything) == before
        if len(factory.lines.ran) <= factory.again_at:
            break
    assert again_after > 50


def test_an_interrupt_that_is_held_back_is_delivered_once_all_is_as_before():
    model, calls = nn.Sequential(nn.BatchNorm2d(3)), []
    before, outer = Picture(model), signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, lambda *args: calls.append(Picture(model) == before))
    try:
        Lines(lambda n, where: where[0].endswith("handover.py")).run(lambda: convert_ghost(model, 2))
        assert callable(signal.getsignal(signal.SIGINT))
    finally:
        signal.signal(signal.SIGINT, outer)
    assert len(calls) == 1  # a handler that does not raise lets the program go on
    assert isinstance(model[0], GhostBN)


@pytest.mark.parametrize("name", CONVERSIONS)
def test_loading_that_is_interrupted_can_be_done_again(name):
    """Torch copies tensor by tensor; what there is to load into, and the checkpoint, stay as they were."""
    checkpoint = lived_in(nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3))).state_dict()
    keys, values = list(checkpoint), [value.clone() for value in checkpoint.values()]
    loaded = CONVERSIONS[name](nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3)))
    loaded.load_state_dict(checkpoint)
    for number in itertools.count():
        model = CONVERSIONS[name](nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3)))
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        lines = Lines(Nth(".py", number)).run(functools.partial(model.load_state_dict, checkpoint))
        assert all(tensors[key] is now for key, now in (*model.named_parameters(), *model.named_buffers()))
        assert list(checkpoint) == keys
        assert all(map(torch.equal, checkpoint.values(), values))
        model.load_state_dict(checkpoint)
        assert values_of(model) == values_of(loaded)
        if not lines.interrupted:
            break
    assert number > 5 or name == "sync"  # which is torch's
