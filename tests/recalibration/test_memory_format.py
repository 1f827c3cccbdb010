"""``memory_format=``: mini-batches laid out anew before the model gets them, and nothing else changed."""

import copy
import re
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import state_of, values_of
from torch import Tensor, nn

from precisebn import InputError, adapt_bn_stats, get_bn_modules, update_bn_stats

pytestmark = pytest.mark.usefixtures("one_thread")

FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}
IMAGES, VIDEOS = torch.randn(4, 3, 6, 5), torch.randn(4, 3, 2, 6, 5)


class Recorder(nn.Module):
    """Remembers what it was called on, and normalizes the first of that."""

    def __init__(self, dim: int = 4) -> None:
        super().__init__()
        self.bn = {4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[dim](3)
        self.seen: list[Any] = []

    def forward(self, x: Tensor, *rest: Any, **named: Any) -> None:
        self.seen.append((x, *rest, named))
        self.bn(x)


def is_laid_out(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=FORMATS[x.dim()]) and x.stride(1) == 1


@pytest.mark.parametrize("x", [IMAGES, VIDEOS], ids=["images", "videos"])
@pytest.mark.parametrize("run", [update_bn_stats, adapt_bn_stats])
@pytest.mark.parametrize(
    ("batch_of", "forward"),
    [
        (lambda x: x, None),
        (lambda x: (x, torch.arange(4)), None),
        (lambda x: {"x": x, "mask": torch.ones(4, 2)}, None),
        (lambda x: {"views": [x, x]}, lambda model, batch: model(*batch["views"])),
        (lambda x: ([x], {"meta": "text"}), lambda model, batch: model(batch[0][0])),
    ],
    ids=["tensor", "tuple", "mapping", "mapping of list", "tuple of list"],
)
def test_tensors_of_as_many_dimensions_come_with_channels_last(
    x: Tensor, run: Callable[..., Any], batch_of: Callable[[Tensor], Any], forward: Callable[..., Any] | None
) -> None:
    model, strides = Recorder(x.dim()), x.stride()
    run(model, [batch_of(x)], num_iters=1, forward=forward, memory_format=FORMATS[x.dim()])
    tensors = [item for item in model.seen[0] if isinstance(item, Tensor)]
    assert tensors
    for seen in tensors:
        assert is_laid_out(seen)
        assert torch.equal(seen, x)
    assert x.stride() == strides  # the loader's own tensor


def test_tensors_of_other_dimensions_stay_as_they_are() -> None:
    model = Recorder()
    others = {"video": VIDEOS, "vector": torch.randn(4), "sparse": torch.zeros(4, 3, 2, 2).to_sparse(), "text": "a"}
    update_bn_stats(model, [{"x": IMAGES, **others}], 1, memory_format=torch.channels_last)
    assert all(model.seen[0][-1][name] is others[name] for name in others)


def test_images_of_one_channel_have_strides_that_convolutions_take_for_channels_last() -> None:
    """Which those of a contiguous tensor are as well, to ``is_contiguous``; and ``contiguous()`` leaves them."""
    conv, bn = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
    seen: list[Tensor] = []
    bn.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    update_bn_stats(nn.Sequential(conv, bn), [torch.randn(2, 1, 8, 8)], 1, memory_format=torch.channels_last)
    assert is_laid_out(seen[0])


def test_the_first_batch_of_a_lazy_model_too() -> None:
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d())
    seen: list[Tensor] = []
    model[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    update_bn_stats(model, [IMAGES] * 2, 2, memory_format=torch.channels_last)
    assert len(seen) >= 2
    assert all(is_laid_out(x) for x in seen)


# ---- Real networks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "efficientnet_b0", "densenet121"])
def test_statistics_agree_within_rounding_and_the_model_is_as_before(torchvision: ModuleType, name: str) -> None:
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(num_classes=2).eval()  # neither dropout nor stochastic depth
    batches = [torch.randn(8, 3, 64, 64) for _ in range(2)]

    def statistics(dtype: torch.dtype, **arguments: Any) -> Tensor:
        """Means and log variances of all channels of all layers, in units of their own."""
        copied = copy.deepcopy(model).to(dtype)
        before, values = layout_of(copied), parameters_of(copied)
        update_bn_stats(copied, [batch.to(dtype) for batch in batches], 2, modules="all", **arguments)
        assert layout_of(copied) == before
        assert parameters_of(copied) == values
        layers = get_bn_modules(copied.train())
        means = [bn.running_mean.double() / (bn.running_var.double() + bn.eps).sqrt() for bn in layers]
        return torch.cat([*means, *((bn.running_var.double() + bn.eps).log() for bn in layers)])

    exact = statistics(torch.float64)
    contiguous, last = statistics(torch.float32), statistics(torch.float32, memory_format=torch.channels_last)
    # Another order of summation has other rounding errors, of the same size.
    assert rms(last - exact) <= 4 * rms(contiguous - exact)
    assert not torch.equal(last, contiguous)  # or nothing was laid out anew


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def layout_of(model: nn.Module) -> dict[str, tuple[int, tuple[int, ...]]]:
    return {name: (value.data_ptr(), value.stride()) for name, value in model.state_dict().items()}


def parameters_of(model: nn.Module) -> dict[str, Any]:
    names = dict(model.named_parameters())
    return {name: value for name, value in values_of(model).items() if name in names}


# ---- What does not go -----------------------------------------------------------------------------------------------


class Viewing(nn.Module):
    """A network as many are written: a view between convolutions and classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.head = nn.Sequential(View(), nn.Linear(48, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


class View(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(len(x), -1)


def test_a_view_that_refuses_says_where_it_is_and_what_to_do() -> None:
    model = Viewing()
    before = state_of(model)
    message = r"channels_last: layer 'head.0' \(View\) asks for a view.*format.py: return x.view\(len\(x\), "
    with pytest.raises(InputError, match=message + r".*reshape.*leave memory_format out") as caught:
        update_bn_stats(model, [IMAGES], 1, memory_format=torch.channels_last)
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert state_of(model) == before
    update_bn_stats(model, [IMAGES], 1)


def test_a_view_outside_of_every_layer_names_the_model() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    with pytest.raises(InputError, match="the Sequential asks for a view"):
        update_bn_stats(
            model, [IMAGES], 1, memory_format=torch.channels_last, forward=lambda model, x: model(x).view(len(x), -1)
        )


def test_other_errors_and_views_of_the_loaders_own_layout_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="view size is not compatible") as caught:
        update_bn_stats(Viewing(), [IMAGES.to(memory_format=torch.channels_last)], 1)
    assert not isinstance(caught.value, InputError)
    with pytest.raises(RuntimeError, match="expected input"):
        update_bn_stats(Viewing(), [IMAGES[:, :2]], 1, memory_format=torch.channels_last)


@pytest.mark.parametrize("wrong", [torch.contiguous_format, torch.preserve_format, "channels_last", True])
def test_formats_that_are_none_are_refused(wrong: Any) -> None:
    message = re.escape(f"memory_format={wrong!r} must be torch.channels_last (for tensors of 4 dimensions) or torch.c")
    for run in (update_bn_stats, adapt_bn_stats):
        with pytest.raises(InputError, match=message):
            run(nn.BatchNorm2d(3), [IMAGES], num_iters=1, memory_format=wrong)
