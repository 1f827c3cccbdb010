"""PopulationNorm: populations, checkpoints, and the one place where running statistics are updated."""

from typing import Any

import pytest
import torch
from conftest import state_of
from hypothesis import given
from hypothesis import strategies as st
from reference import DTYPES, Running, assert_rounded, sample, with_random_population
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from precisebn import Moments
from precisebn._torch import in_backward
from precisebn.errors import InputError
from precisebn.functional._batch_norm import tracks_in_one_call
from precisebn.nn import BatchStatBN, ConcatSharedBN, CycleBatchNormList, DomainSpecificBN, GhostBN
from precisebn.nn.population import PopulationNorm, update_running_statistics

pytestmark = pytest.mark.usefixtures("one_thread")

CHANNELS = 3
BATCH_SIZES = st.lists(st.integers(2, 5), min_size=1, max_size=6)
MOMENTA = st.sampled_from([None, 0.0, 0.1, 0.7, 1.0])


class Tracking(PopulationNorm):
    """The smallest module: hands its input on, and tracks its Moments."""

    def __init__(
        self, num_features: int, *, num_populations: int | None = None, num_affines: int | None = None, **kwargs: Any
    ) -> None:
        super().__init__(num_features, **kwargs)
        self._repeat(populations=num_populations, affines=num_affines)

    def forward(self, x: Tensor, population: int | None = None) -> Tensor:
        self.track(Moments.of(self.check(x)), population)
        return x.clone()


# ---- Running statistics -------------------------------------------------------------------------------------------


@given(BATCH_SIZES, MOMENTA)
def test_running_statistics_are_those_of_the_definition_and_of_torch(sizes, momentum):
    ours = Tracking(CHANNELS, momentum=momentum, dtype=torch.float64)
    theirs = nn.BatchNorm1d(CHANNELS, momentum=momentum, dtype=torch.float64)
    defined = Running(CHANNELS, momentum)
    for n in sizes:
        x = sample((n, CHANNELS, 2), torch.float64)
        ours(x)
        theirs(x)
        defined.see(x).assert_in(ours)
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value)


@pytest.mark.parametrize("momentum", [None, 0.1, 1.0])
def test_without_a_number_of_mini_batches_the_statistics_move_as_torchs_do(momentum):
    """Some take the counter out, which is no floating-point tensor, of what they average or broadcast."""
    ours, theirs = (kind(CHANNELS, momentum=momentum, dtype=torch.float64) for kind in (Tracking, nn.BatchNorm1d))
    several = Tracking(CHANNELS, momentum=momentum, dtype=torch.float64, num_populations=2)
    for bn in (ours, theirs, several):
        bn.num_batches_tracked = None
        torch.manual_seed(0)
        for _ in range(2):
            x = torch.randn(5, CHANNELS, 2, dtype=torch.float64)
            bn(x, population=1) if bn is several else bn(x)
    for name in ("running_mean", "running_var"):
        expected = getattr(theirs, name)
        torch.testing.assert_close(getattr(ours, name), expected)
        torch.testing.assert_close(getattr(several, name)[1], expected)
        assert torch.equal(getattr(several, name)[0], getattr(Tracking(CHANNELS, dtype=torch.float64), name))
    assert ours.num_batches_tracked is None


@given(st.lists(st.lists(st.integers(0, 3), min_size=2, max_size=2), min_size=1, max_size=4), MOMENTA)
def test_groups_update_as_populations_one_by_one(counts, momentum):
    """A group of fewer than two values has no variance: its population, and its number of mini-batches, stay."""
    together = Tracking(CHANNELS, momentum=momentum, dtype=torch.float64, num_populations=2)
    apart = [Running(CHANNELS, momentum) for _ in range(2)]
    for of_each in counts:
        group = torch.tensor([k for k, n in enumerate(of_each) for _ in range(n)], dtype=torch.int64)
        x = sample((len(group), CHANNELS), torch.float64)
        together.track(Moments.of(x, group, num_groups=2))
        for k, n in enumerate(of_each):
            if n > 1:
                apart[k].see(x[group == k])
            apart[k].assert_in(together, population=k)


def test_one_population_of_several_leaves_the_others_alone():
    bn = with_random_population(Tracking(CHANNELS, num_populations=3))
    before = {name: buffer.clone() for name, buffer in bn.named_buffers()}
    bn(sample((4, CHANNELS)), population=1)
    for name, buffer in bn.named_buffers():
        assert [torch.equal(buffer[k], before[name][k]) for k in range(3)] == [True, False, True]


@pytest.mark.parametrize("n", [0, 1])
def test_less_than_two_values_change_nothing(n):
    bn = with_random_population(Tracking(CHANNELS, momentum=None))
    before = state_of(bn)
    bn(sample((n, CHANNELS)))
    assert state_of(bn) == before


@pytest.mark.parametrize("dtype", DTYPES)
def test_buffers_are_written_in_place_in_their_own_dtype(dtype):
    bn = Tracking(CHANNELS, dtype=dtype)
    at = {name: buffer.data_ptr() for name, buffer in bn.named_buffers()}
    x = sample((4, CHANNELS), torch.float64 if dtype == torch.float64 else torch.float32)
    bn(x)
    assert {name: buffer.data_ptr() for name, buffer in bn.named_buffers()} == at
    assert bn.running_mean.dtype == bn.running_var.dtype == dtype
    # The momentum and the new value are both rounded to the dtype of the buffers, and so is the result.
    defined = Running(CHANNELS).see(x)
    assert_rounded(bn.running_mean, defined.mean, arithmetic=dtype, roundings=2)
    assert_rounded(bn.running_var, defined.var, arithmetic=dtype, roundings=2)


def test_infinity_in_one_channel_stays_there():
    bn = Tracking(2)
    bn(torch.tensor([[1.0, torch.inf], [3.0, 0.0]]))
    assert bn.running_mean[0].item() == pytest.approx(0.2)
    assert not bn.running_mean[1].isfinite()


def test_only_training_updates():
    bn = Tracking(CHANNELS).eval()
    before = state_of(bn)
    bn(sample((4, CHANNELS)))
    assert state_of(bn) == before


def test_without_running_statistics_there_is_nothing_to_update():
    bn = Tracking(CHANNELS, track_running_stats=False, num_populations=2)
    bn(sample((4, CHANNELS)))
    assert list(bn.buffers()) == []
    assert bn.populations() == ()
    assert bn.eval().uses_batch_statistics


def test_tracking_that_is_switched_off_pauses_as_torchs_does():
    """``bn.track_running_stats = False`` on a layer that has some: training leaves them, evaluation uses them."""
    bn = with_random_population(Tracking(CHANNELS))
    bn.track_running_stats = False
    before = state_of(bn)
    bn(sample((4, CHANNELS)))
    assert state_of(bn) == before
    assert bn.uses_batch_statistics
    assert not bn.eval().uses_batch_statistics


def test_a_mini_batch_is_not_counted_again_inside_a_backward():
    bn = Tracking(CHANNELS)
    x = sample((4, CHANNELS)).requires_grad_()
    seen = []

    def forward_again(grad: Tensor) -> None:
        seen.append(in_backward())
        bn(x)

    y = bn(x)
    y.register_hook(forward_again)
    assert not in_backward()
    y.sum().backward()
    assert seen == [True]
    assert not in_backward()
    assert int(bn.num_batches_tracked) == 1
    bn(x)
    assert int(bn.num_batches_tracked) == 2


def test_a_recorder_gets_the_moments_instead_in_any_mode():
    bn, got = Tracking(CHANNELS, num_populations=2), []
    before = state_of(bn)
    bn.start_recording(lambda moments, population: got.append((moments, population)))
    x = sample((4, CHANNELS))
    bn(x, population=1)
    bn.eval()(x)
    bn.stop_recording()
    bn.train()
    assert got == [(Moments.of(x), 1), (Moments.of(x), None)]
    assert state_of(bn) == before


def test_update_is_outside_autograd():
    x = sample((4, CHANNELS)).requires_grad_()
    mean, var, tracked = torch.zeros(CHANNELS), torch.ones(CHANNELS), torch.tensor(0)
    update_running_statistics("a layer", Moments.of(x), mean, var, tracked, 0.1)
    assert not mean.requires_grad
    assert not var.requires_grad


# ---- Checkpoints --------------------------------------------------------------------------------------------------


def test_state_dict_is_that_of_torch_and_loads_both_ways():
    ours, theirs = with_random_population(Tracking(CHANNELS)), with_random_population(nn.BatchNorm1d(CHANNELS))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    mean = theirs.running_mean.clone()
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours.running_mean, mean)
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(theirs.running_mean, mean)


@pytest.mark.parametrize("assign", [False, True])
def test_a_plain_checkpoint_fills_every_population_and_is_left_as_it_was(assign):
    plain = with_random_population(nn.BatchNorm1d(CHANNELS))
    plain(sample((4, CHANNELS)))
    checkpoint = plain.state_dict()
    copy = {key: value.clone() for key, value in checkpoint.items()}
    bn = Tracking(CHANNELS, num_populations=2, num_affines=4)
    bn.load_state_dict(checkpoint, assign=assign)
    for name, times in (("weight", 4), ("bias", 4), ("running_mean", 2), ("running_var", 2)):
        assert torch.equal(getattr(bn, name), copy[name].expand(times, CHANNELS))
    assert bn.num_batches_tracked.tolist() == [1, 1]
    bn(sample((4, CHANNELS)), population=0)  # populations do not share memory with each other, nor with the checkpoint
    assert not torch.equal(bn.running_mean[0], bn.running_mean[1])
    assert bn.num_batches_tracked.tolist() == [2, 1]
    assert all(torch.equal(checkpoint[key], value) for key, value in copy.items())


def test_an_old_checkpoint_without_num_batches_tracked_loads():
    old = {key: value for key, value in nn.BatchNorm1d(CHANNELS).state_dict().items() if "tracked" not in key}
    for populations in (None, 2):
        Tracking(CHANNELS, num_populations=populations).load_state_dict(dict(old))


@pytest.mark.parametrize("populations", [None, 2])
@pytest.mark.parametrize("name", ["running_mean", "weight"])
@pytest.mark.parametrize("shape", [(), (1,), (CHANNELS + 1,), (3, CHANNELS)])
def test_a_checkpoint_of_another_size_is_refused(populations, name, shape):
    """A single number, too: torch's BatchNorm does not take it for all channels either."""
    checkpoint = nn.BatchNorm1d(CHANNELS).state_dict() | {name: torch.ones(shape)}
    with pytest.raises(RuntimeError, match=f"size mismatch for {name}"):
        Tracking(CHANNELS, num_populations=populations, num_affines=populations).load_state_dict(checkpoint)


def test_several_populations_do_not_load_into_a_single_one():
    with pytest.raises(RuntimeError, match="size mismatch for running_mean"):
        nn.BatchNorm1d(CHANNELS).load_state_dict(Tracking(CHANNELS, num_populations=2).state_dict())


# ---- What it is ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("populations", [None, 1, 3])
def test_shapes_of_populations(populations):
    bn = Tracking(CHANNELS, num_populations=populations, num_affines=populations)
    leading = () if populations is None else (populations,)
    assert bn.running_mean.shape == bn.running_var.shape == bn.weight.shape == bn.bias.shape == (*leading, CHANNELS)
    assert bn.num_batches_tracked.shape == leading
    assert all(parameter.is_leaf and parameter.requires_grad for parameter in bn.parameters())
    with torch.no_grad():
        bn.weight.fill_(2.0)
    bn.running_var.fill_(2.0)
    bn.reset_parameters()  # as after to_empty()
    assert bn.weight.unique().tolist() == bn.running_var.unique().tolist() == [1.0]


def test_what_treats_batchnorms_alike_leaves_it_alone():
    model = nn.Sequential(Tracking(CHANNELS))
    assert not isinstance(model[0], _BatchNorm)
    assert nn.SyncBatchNorm.convert_sync_batchnorm(model)[0] is model[0]


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (3.0, r"Tracking\(3\) takes tensors \(N, 3, \*\), got float"),
        (None, r"Tracking\(3\) takes tensors \(N, 3, \*\), got NoneType"),
        (torch.ones(3), r"got shape \(3,\); build it with num_features="),
        (torch.ones(2, 4, 4), r"got shape \(2, 4, 4\); build it with num_features= .*channels second"),
    ],
)
def test_wrong_inputs_say_what_is_wrong(x, message):
    with pytest.raises(InputError, match=message):
        Tracking(CHANNELS)(x)


def test_an_averaged_number_of_mini_batches_counts_on():
    """Averages of state dicts, entry by entry, make it a floating-point number."""
    layer = GhostBN(3, 2)
    averaged = {key: value.float() + 0.5 for key, value in layer.state_dict().items()}
    layer.load_state_dict(averaged, assign=True)
    layer(torch.randn(4, 3))
    assert layer.num_batches_tracked.item() == 1.5


def test_every_buffer_that_training_writes_says_so():
    """Whoever keeps buffers (a recalibration of other layers, autograd) looks at their version."""
    layer = GhostBN(3, 2)
    before = [buffer._version for buffer in layer.buffers()]
    layer(torch.randn(4, 3))
    assert all(buffer._version > version for buffer, version in zip(layer.buffers(), before, strict=True))


# ---- vmap ---------------------------------------------------------------------------------------------------------


TRACKING = {
    "GhostBN": (lambda: GhostBN(CHANNELS, 2), lambda bn, x: bn(x)),
    "BatchStatBN": (lambda: BatchStatBN(CHANNELS), lambda bn, x: bn(x)),
    "ConcatSharedBN": (lambda: ConcatSharedBN(CHANNELS), lambda bn, x: bn([x, x])[0]),
    "DomainSpecificBN": (lambda: DomainSpecificBN(CHANNELS, 2), lambda bn, x: bn(x, domain=1)),
    "CycleBatchNormList": (lambda: CycleBatchNormList(2, nn.BatchNorm1d, num_features=CHANNELS), lambda bn, x: bn(x)),
}


@pytest.mark.parametrize("name", TRACKING)
def test_vmap_cannot_move_running_statistics_and_says_what_to_do(name):
    build, call = TRACKING[name]
    message = rf"{name}\([23]\): vmap gives every sample .* eval\(\) before, or build .* track_running_stats=False"
    for transformed in (call, lambda bn, x: torch.func.grad(lambda x: call(bn, x).sum())(x)):
        bn = build()
        before = state_of(bn)
        with pytest.raises(InputError, match=message):
            torch.func.vmap(lambda x, bn=bn, run=transformed: run(bn, x))(sample((5, 4, CHANNELS)))
        assert state_of(bn) == before


@pytest.mark.parametrize("layer", [GhostBN(CHANNELS, 2), GhostBN(CHANNELS, 2, track_running_stats=False)])
def test_vmap_works_where_the_message_says_it_does(layer):
    x = sample((5, 4, CHANNELS))
    if layer.track_running_stats:
        layer.eval()
    torch.testing.assert_close(torch.func.vmap(layer)(x), torch.stack([layer(sample) for sample in x]))


def test_an_ensemble_under_vmap_moves_the_statistics_of_each_member():
    """As torch.func.stack_module_state has it: the statistics are batched as well."""
    members = [GhostBN(CHANNELS, 2) for _ in range(3)]
    parameters, buffers = torch.func.stack_module_state(members)
    x = sample((3, 4, CHANNELS))

    def call(parameters: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(members[0], (parameters, buffers), (x,))

    ys = torch.func.vmap(call)(parameters, buffers, x)
    for k, member in enumerate(members):
        torch.testing.assert_close(ys[k], member(x[k]))
        torch.testing.assert_close({name: value[k] for name, value in buffers.items()}, dict(member.named_buffers()))


IN_ONE_CALL = [
    lambda **kwargs: BatchStatBN(CHANNELS, **kwargs),
    lambda **kwargs: GhostBN(CHANNELS, 8, **kwargs),
    lambda **kwargs: DomainSpecificBN(CHANNELS, 2, **kwargs),
    lambda **kwargs: DomainSpecificBN(CHANNELS, 2, population="shared", affine="shared", **kwargs),
]


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("build", IN_ONE_CALL)
def test_in_one_call_is_as_in_several(build, momentum, monkeypatch):
    """The operator that moves running statistics too, in the place of two operators."""
    one, several = (with_random_population(build(momentum=momentum)) for _ in range(2))
    several.load_state_dict(one.state_dict())
    versions = {name: buffer._version for name, buffer in one.named_buffers()}
    domain, values = {"domain": 1} if isinstance(one, DomainSpecificBN) else {}, sample((6, CHANNELS, 4))
    for bn, at_once in ((one, True), (several, False)):
        monkeypatch.setattr("precisebn.nn.population.tracks_in_one_call", lambda at_once=at_once: at_once)
        x = values.clone().requires_grad_()
        with torch.no_grad():
            bn(x, **domain)  # without a gradient
        y = bn(x, **domain)
        y.backward(y.detach() ** 2)
        bn.results = [y, x.grad, bn.weight.grad, bn.bias.grad]
        with pytest.raises(InputError, match=r"(one|single) value per channel"):
            bn(x[:1, :, :1], **domain)
    for a, b in zip([*one.results, *one.buffers()], [*several.results, *several.buffers()], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert all(buffer._version > versions[name] for name, buffer in one.named_buffers())


@pytest.mark.parametrize("build", IN_ONE_CALL)
def test_one_call_leaves_alone_what_does_not_track(build):
    x = sample((6, CHANNELS, 4))
    bn = build()
    domain = {"domain": 1} if isinstance(bn, DomainSpecificBN) else {}
    before, found = state_of(bn), []
    bn.start_recording(lambda moments, population: found.append(moments))
    bn(x, **domain)
    bn.stop_recording()
    bn.eval()(x, **domain)
    assert state_of(bn.train()) == before
    assert len(found) == 1
    build(track_running_stats=False)(x, **domain)


def test_who_overrides_track_gets_the_moments():
    found = []

    class Watching(BatchStatBN):
        def track(self, moments: Moments, population: int | None = None) -> None:
            found.append(moments)

    Watching(CHANNELS)(sample((6, CHANNELS, 4)))
    assert len(found) == 1


def test_an_averaged_number_of_mini_batches_takes_several_calls():
    bn = BatchStatBN(CHANNELS, momentum=None)
    bn.num_batches_tracked = torch.tensor(1.5)
    bn(sample((6, CHANNELS, 4)))
    assert bn.num_batches_tracked == 2.5


def test_one_call_is_for_eager_tensors():
    x = torch.ones(2, 3)
    assert tracks_in_one_call()
    with torch.autograd.forward_ad.dual_level():
        assert not tracks_in_one_call()
    seen = []

    def look(x: torch.Tensor) -> torch.Tensor:
        seen.append(tracks_in_one_call())
        return x

    torch.vmap(look)(x)
    torch.jit.trace(look, x, check_trace=False)
    assert seen
    assert not any(seen)
