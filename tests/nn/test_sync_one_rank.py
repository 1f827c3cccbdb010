"""SyncBN's way over ranks, taken by a single one: over gloo, and where there is a GPU over nccl, by benchmarks/gpu.sh.

The layer itself does without it where there are no other ranks, so these call what lies below it.
"""

import shutil
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from processes import skip_without_gloo
from reference import DTYPES, LAYOUTS, assert_is, batch_normalized, sample, with_random_affine
from torch import Tensor, nn

from precisebn.functional.synchronized import sync_batch_norm
from precisebn.nn import SyncBN

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", params=["gloo", "nccl"])
def device(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where a process group of one rank works."""
    if request.param == "nccl" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    skip_without_gloo()
    store = f"file://{tmp_path_factory.mktemp('one rank')}/store"
    dist.init_process_group(request.param, init_method=store, rank=0, world_size=1)
    yield "cuda" if request.param == "nccl" else "cpu"
    dist.destroy_process_group()


class OverOneRank(nn.Module):
    """A SyncBN that goes the way over ranks all the same."""

    def __init__(self, dtype: torch.dtype, device: str) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.device = device
        self.bn = with_random_affine(SyncBN(3, dtype=dtype))
        self.weight, self.bias = self.bn.weight, self.bn.bias
        assert dist.group.WORLD is not None
        self.group: str = dist.group.WORLD.group_name

    def forward(self, x: Tensor) -> Tensor:
        parameters = self.weight.to(self.device), self.bias.to(self.device)
        y, _ = sync_batch_norm(x.to(self.device), *parameters, self.bn.eps, self.group)
        return y.to(x.device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "channels_last"), LAYOUTS)
def test_it_is_batch_normalization(device, shape, channels_last, dtype):
    bn = OverOneRank(torch.float64 if dtype == torch.float64 else torch.float32, device)
    assert_is(bn, bn, sample(shape, dtype, channels_last), batch_normalized)


def test_it_can_be_differentiated_twice(device):
    bn, x = OverOneRank(torch.float64, device), sample((4, 3, 2), torch.float64).requires_grad_()
    assert torch.autograd.gradgradcheck(bn, x)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.filterwarnings("ignore::FutureWarning:torch.*")  # of torch's own use of deprecated parts of itself
def test_one_graph(device, backend):
    if backend == "inductor" and not shutil.which("g++"):
        pytest.skip("inductor needs g++")
    torch._dynamo.reset()
    bn, x = OverOneRank(torch.float32, device), sample((4, 3, 2)).requires_grad_()
    compiled = torch.compile(bn, fullgraph=True, backend=backend)
    got, expected = ((y, *torch.autograd.grad((y**3).sum(), [x, bn.weight])) for y in (compiled(x), bn(x)))
    torch.testing.assert_close(got, expected)


def test_the_layer_itself_does_without(device):
    bn = SyncBN(3).to(device)
    x = sample((4, 3, 2)).to(device)
    torch.testing.assert_close(bn(x), nn.BatchNorm1d(3).to(device)(x))
    assert not [name for name in _operators_of(bn, x) if "all_reduce" in name]


def _operators_of(bn: nn.Module, x: Tensor) -> list[str]:
    with torch.profiler.profile(acc_events=True) as profile:  # torch 2.10 warns of the default
        bn(x)
    return [event.name for event in profile.events()]
