"""What all tests share: a fixed seed, the peers where they are installed, and a picture of a model to compare."""

import signal
import sys
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from emulated_share import pytest_collection_modifyitems
from hypothesis import settings
from torch import Tensor, nn

from precisebn.models.snapshot import Snapshot

__all__ = ["pytest_collection_modifyitems"]  # pytest finds its hooks here

# A machine shared with other work is slow at times: an example that takes long is no failure.
settings.register_profile("precisebn", deadline=None, derandomize=True)
settings.load_profile("precisebn")

# A shell lets what it starts in the background ignore Ctrl-C, and Python then installs no handler of its own.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Many small tensors: a second thread only waits for the first, for long where others use the machine too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def pythons_own_handler() -> Iterator[None]:
    """Of SIGINT, which raises KeyboardInterrupt, whatever pytest's runner has put in its place."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.fixture
def torchvision() -> ModuleType:
    return import_torchvision()


@pytest.fixture
def timm() -> ModuleType:
    import_torchvision()
    return _import_peer("timm")


@pytest.fixture
def fvcore_bn() -> ModuleType:
    return _import_peer("fvcore.nn.precise_bn")


def import_torchvision() -> ModuleType:
    """torchvision, also one that was built for another torch than the one installed.

    The kernels of such a torchvision do not load, and its import then stops at two operators that nobody has defined.
    Its models need no operator, so declaring the two is enough.
    """
    try:
        return _import_peer("torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    for operator in ("nms", "qnms"):
        torch.library.define(f"torchvision::{operator}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return _import_peer("torchvision")


def _import_peer(name: str) -> ModuleType:
    """Import a package or skip the test; what it warns of while importing is its own affair."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module: ModuleType = pytest.importorskip(name, reason=f"{name} is not installed")
    return module


class Refusing(Tensor):
    """A tensor that nothing can be copied into."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.copy_ and type(args[0]) is cls:
            raise RuntimeError("refused")
        return super().__torch_function__(func, types, args, kwargs or {})


def state_of(model: nn.Module) -> Snapshot:
    """Everything that a recalibration could leave behind in a model, comparable with ``==``."""
    return Snapshot(model)


def values_of(model: nn.Module) -> dict[str, Any]:
    """The bits of the state dict: to compare two models, where :func:`state_of` compares one with itself."""
    return {key: (value.dtype, _bits(value)) for key, value in model.state_dict().items()}


def _bits(tensor: Tensor) -> bytes:
    raw: bytes = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return raw
