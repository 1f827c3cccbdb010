"""What the emulation of a GPU shows beyond the cases of test_cuda.py: orders of blocks, streams, capture, failures.

And that it shows it: every defect in a list, put into a copy of the kernels, is found, as are the classes of defects
that no kernel has. See tests/cuda_emulation/README.md.
"""

import itertools
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import emulated_library
import pytest
import torch
from cuda_machine import ONLY_FLOAT32, ONLY_FLOAT32_AND_BFLOAT16
from emulated_library import Emulated, Launch, Mutation
from torch import Tensor

from precisebn.ops.grouping import per_sample
from precisebn.ops.registry import OPERATORS

if emulated_library.why_not():
    pytest.skip(emulated_library.why_not(), allow_module_level=True)

ROOT = Path(__file__).parents[2]
NEW_DEVICES = itertools.count(1)  # that keep nothing yet for any stream
moments_of = OPERATORS["moments"].fallback

# Whole channels for a block, slabs of one cluster and of several, one block of columns and several; planes, rows and
# columns.
SHAPES = [(64, 40, 7, 7), (5, 7, 3), (1, 1, 400, 400), (2, 3, 60, 60), (12, 3, 60, 60), (33, 300), (9000, 30)]
MANY_SLABS = (300, 40, 7, 7)
IN_CLUSTERS = [(3000, 12), (6, 1, 99, 99), (12, 3, 60, 60)]  # of blocks that have all values of their channels together


def assert_moments(actual: tuple[Tensor, ...], x: Tensor, group: Tensor | None = None, num_groups: int = 1) -> None:
    count, mean, m2 = moments_of(x, group, num_groups)
    torch.testing.assert_close(actual[0].reshape(count.shape), count, rtol=0, atol=0)
    torch.testing.assert_close(actual[1].reshape(mean.shape), mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(actual[2].reshape(m2.shape), m2, rtol=1e-5, atol=1e-30)


def misaligned(x: Tensor) -> Tensor:
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def accumulators(channels: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.zeros(1).double(), torch.zeros(channels).double(), torch.zeros(channels).double()


# ---- What the kernels must do, one function for each part of it -----------------------------------------------------


def reduce(device: Emulated) -> None:
    for shape in SHAPES:
        x = torch.randn(shape) + 3
        for _ in range(2):  # the second finds the tickets as the first has left them
            assert_moments(device.kernels.moments(x), x)


def reduce_odd_planes(device: Emulated) -> None:
    for shape in [(7, 3, 17, 17), (2, 2, 199, 199)]:
        x = torch.randn(shape) + 3 * torch.arange(shape[1])[:, None, None]
        group = torch.arange(len(x)) % 2
        assert_moments(device.kernels.moments(x), x)
        assert_moments(device.kernels.moments(x, group, 2), x, group, 2)


def reduce_groups(device: Emulated) -> None:
    for shape in [(64, 40, 7, 7), (129, 6), (20, 3, 60, 60)]:
        x = torch.randn(shape) + 3
        group = torch.randint(3, shape[:1])
        assert_moments(device.kernels.moments(x, group, 3), x, group, 3)


def accumulate(device: Emulated) -> None:
    for shape in [(64, 40, 7, 7), (33, 300), (2, 3, 200, 300)]:
        batches = [torch.randn(shape) + 3 for _ in range(2)]
        total = accumulators(shape[1])
        for x in batches:
            device.kernels.accumulate(x, *total)
        assert_moments(total, torch.cat(batches))


def track(device: Emulated) -> None:
    mean, m2 = torch.randn(2, 700).double(), torch.rand(2, 700).double()
    count, batches = torch.tensor([9.0, 4.0]).double(), torch.tensor([1, 3])
    running = torch.zeros(2, 700), torch.ones(2, 700)
    device.kernels.track(count, mean, m2, *running, batches, None)
    torch.testing.assert_close(running[0], (mean / torch.tensor([[2.0], [4.0]])).float())
    assert batches.tolist() == [2, 4]


def backward_coefficients(device: Emulated) -> None:
    """Over groups that share weight and bias: fewer than a channel has threads, and more."""
    for groups in (1, 5, 70):
        sums = [torch.rand(groups, 40).double() for _ in range(4)]
        arguments = (torch.full((groups,), 9.0).double(), *sums, torch.rand(40).double(), 1e-3, True)
        expected = OPERATORS["backward_coefficients"].fallback(*arguments)
        for one, other in zip(device.kernels.backward_coefficients(*arguments), expected, strict=True):
            torch.testing.assert_close(one, other)


def normalize(device: Emulated) -> None:
    for x in (torch.randn(9, 16, 7, 7), torch.randn(5, 33), misaligned(torch.randn(6, 8, 4, 4))):
        scale, group = torch.rand(2, x.shape[1]), torch.arange(len(x)) % 2
        y = device.kernels.normalize(x, None, scale, None, group)
        torch.testing.assert_close(y, x * per_sample(scale, x, group))


def forward_and_backward_at_once(device: Emulated) -> None:
    for shape in [(2, 24, 8, 8), (9, 5, 3, 3), (40, 30), (3, 2, 17, 17), *IN_CLUSTERS[:2]]:
        x, dy = torch.randn(shape) + 3, torch.randn(shape)
        for group, k in ((None, 1), (torch.arange(len(x)) * 2 % 5 - 1, 3)):  # some samples of no group
            rows = () if group is None else (k,)
            seen, *running = torch.zeros(rows).long(), torch.zeros(*rows, shape[1]), torch.ones(*rows, shape[1])
            weight = torch.rand(*rows, shape[1])
            y, *statistics = device.kernels.normalize_and_track(x, weight, None, 1e-3, *running, seen, 0.25, group, k)
            dx, *_ = device.kernels.backward_batch(dy, x, *statistics, weight, 1e-3, group)
            expected = torch.zeros(rows).long(), torch.zeros(*rows, shape[1]), torch.ones(*rows, shape[1])
            plain = per_group(x, dy, weight, 1e-3, group, k, expected)
            for one, other in zip((y, dx, seen, *running), (*plain, *expected), strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, equal_nan=True)


def per_group(
    x: Tensor, dy: Tensor, weight: Tensor, eps: float, group: Tensor | None, k: int, running: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """Y and dx by torch's own batch norm of each group alone, which moves the running statistics."""
    y, dx = torch.full_like(x, math.nan), torch.full_like(x, math.nan)
    for g in range(k):
        chosen = torch.ones(len(x)).bool() if group is None else group == g
        own = [t if group is None else t[g] for t in (weight, *running)]
        part = x[chosen].requires_grad_()
        if part.numel() <= x.shape[1]:
            continue
        own[1] += 1
        result = torch.nn.functional.batch_norm(part, own[2], own[3], own[0], None, True, 0.25, eps)
        y[chosen], dx[chosen] = result.detach(), torch.autograd.grad(result, part, dy[chosen])[0]
    return y, dx


def normalize_few_samples(device: Emulated) -> None:
    for x in (torch.randn(1, 16, 60, 60), torch.randn(2, 9, 60, 60)):  # several vectors for a thread
        scale = torch.rand(1, x.shape[1])
        device.set(seed=int(torch.randint(1000, ())), multiprocessors=1)
        torch.testing.assert_close(device.kernels.normalize(x, None, scale, None), x * scale[0, :, None, None])


def reduce_misaligned(device: Emulated) -> None:
    x = misaligned(torch.randn(8, 16, 8, 8))
    assert_moments(device.kernels.moments(x), x)


def reduce_on_two_streams(device: Emulated) -> None:
    """Into memory that is there before: what an allocator hands out is ordered by the allocator."""
    x, totals = torch.randn(MANY_SLABS), [accumulators(40) for _ in range(2)]
    seed = int(torch.randint(1000, ()))
    for stream, total in enumerate(totals):
        device.set(seed=seed, stream=stream)
        device.kernels.accumulate(x, *total)
    device.set(seed=seed)
    device.synchronize()
    for total in totals:
        assert_moments(total, x)


def reduce_while_capturing(device: Emulated) -> None:
    with torch_fills_memory():
        device.set(seed=int(torch.randint(1000, ())), capturing=True)
        reduce(device)


def reduce_beside_a_capture(device: Emulated) -> None:
    """What is launched while another stream is captured allocates memory, and leaves the capture alone."""
    before = device.statistics()
    device.set(capturing="elsewhere", device=next(NEW_DEVICES))
    for _ in range(2):
        reduce(device)
    after = device.statistics()
    assert after.allocated == before.allocated + 1
    assert after.invalidated == before.invalidated


def reduce_on_many_streams(device: Emulated) -> None:
    """A program may make a new stream for every step: what is kept for streams has an end."""
    x, number = torch.randn(16, 8, 7, 7), next(NEW_DEVICES)
    before = device.statistics()
    for stream in range(100):
        device.set(seed=stream, multiprocessors=16, stream=stream, device=number)
        assert_moments(device.kernels.moments(x), x)
        device.synchronize()  # torch's memory goes from one stream to the next, which its allocator would put in order
    device.set()
    assert device.statistics().allocated - before.allocated == 16


class torch_fills_memory:
    """torch's fresh memory is NaN, or -1."""

    def __enter__(self) -> None:
        torch.use_deterministic_algorithms(True)

    def __exit__(self, *_: object) -> None:
        torch.use_deterministic_algorithms(False)


EXERCISES = {
    f.__name__: f
    for f in (
        reduce,
        reduce_odd_planes,
        reduce_groups,
        accumulate,
        track,
        backward_coefficients,
        normalize,
        forward_and_backward_at_once,
        normalize_few_samples,
        reduce_misaligned,
        reduce_on_two_streams,
        reduce_while_capturing,
        reduce_beside_a_capture,
        reduce_on_many_streams,
    )
}

# ---- Defects --------------------------------------------------------------------------------------------------------

BARRIER = "__syncthreads();"
REDUCE = "cuda/reduce.h"
CLUSTER_BARRIER = "cluster_barrier();"
AT_ONCE = "forward_and_backward_at_once"
WHOLE, TRACK = "cuda/whole.h", "cuda/normalize_at_once.cu"
CAPTURE = ") STD_CUDA_CHECK(cudaMemsetAsync"
WORKSPACE = "cuda/workspace.cu"
RELAXED = "cudaStreamCaptureModeRelaxed"
DRAW = """asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;"
               : "=r"(drawn)
               : "l"(__cvta_generic_to_global(ticket)), "r"(most)
               : "memory");"""

# By the exercise that finds them.
DEFECTS = [
    ("reduce", Mutation("no barrier before the ticket", REDUCE, "  __shared__ bool last;\n  ", BARRIER, ";")),
    ("reduce", Mutation("no barrier behind the ticket", REDUCE, "  ", BARRIER, ";", "\n  return last;")),
    ("reduce", Mutation("the ticket releases nothing", REDUCE, "drawn;\n  ", DRAW, DRAW.replace("acq_rel", "acquire"))),
    ("reduce", Mutation("the ticket acquires nothing", REDUCE, "else { ", DRAW, DRAW.replace("acq_rel", "release"))),
    ("reduce", Mutation("the ticket is not reset", REDUCE, "draw(ticket, ", "most", "0xffffffff", ") == ")),
    ("reduce", Mutation("one block too few is waited for", REDUCE, ") == ", "most", "(most - 1)", ";\n")),
    (
        "accumulate",
        Mutation("the count comes too early", REDUCE, "now = ", "op.count_comes_last()", "false", " ? is_"),
    ),
    ("reduce", Mutation("entries are merged too early", REDUCE, "    }\n  }\n  ", BARRIER, ";", "\n\n  const int w")),
    (
        "reduce_groups",
        Mutation("groups are read too early", REDUCE, "groups[first_sample + i];\n    ", BARRIER, ";"),
    ),
    ("reduce_groups", Mutation("pieces are counted too early", REDUCE, "Groups::kNone;\n    }\n    ", BARRIER, ";")),
    ("reduce_groups", Mutation("the piece is read too early", REDUCE, "own_before);\n    }\n    ", BARRIER, ";")),
    (
        "reduce_groups",
        Mutation("a block too few for pieces", "cuda/partition.h", "", "std::min(num_groups, whole)", "0 * whole"),
    ),
    ("reduce_groups", Mutation("pieces are merged too early", REDUCE, "parts[warp] = merged;\n  ", BARRIER, ";")),
    (
        "reduce_while_capturing",
        Mutation("tickets are left", WORKSPACE, "if (", "num_tickets > 0", "false", CAPTURE),
    ),
    (
        "reduce_on_two_streams",
        Mutation(
            "streams share tickets", WORKSPACE, "", "cudaStreamGetId(stream, &id)", "(id = 0, cudaSuccess)", " != "
        ),
    ),
    (
        "reduce_beside_a_capture",
        Mutation("captures are not allowed for", WORKSPACE, "mode_ = ", RELAXED, "cudaStreamCaptureModeGlobal"),
    ),
    (
        "reduce_on_many_streams",
        Mutation("every stream keeps memory", WORKSPACE, "buffers.size() >= ", "kMostBuffers", "1000u"),
    ),
    ("track", Mutation("the number of batches is written too early", "cuda/track.cu", "", BARRIER, ";")),
    (
        "backward_coefficients",
        Mutation("sums are added too early", "cuda/backward_coefficients.cu", "", BARRIER, ";", "  // the next round"),
    ),
    (
        "reduce_odd_planes",
        Mutation("vectors begin anywhere", REDUCE, "return ", "offset & -static_cast<int64_t>(size)", "offset", ";"),
    ),
    ("reduce_odd_planes", Mutation("edges are left out", REDUCE, "    if (", "plan.edge > 0", "false", ") {")),
    (
        "reduce_odd_planes",
        Mutation("edges are not counted", "cuda/partition.h", "values_of_part + ", "(part > 0 ? edge : 0)", "0", ";"),
    ),
    (
        "reduce_odd_planes",
        Mutation("pieces lack edges", REDUCE, "at.inner + ", "plan.edges_of(slab, samples)", "0", "};"),
    ),
    (
        "normalize_few_samples",
        Mutation(
            "the next plane is not noticed", "cuda/map.h", "changed = ", "changed || left < kSize", "changed", ";"
        ),
    ),
    (
        AT_ONCE,
        Mutation("own samples are sought too early", WHOLE, "= groups[i];\n    ", BARRIER, ";"),
    ),
    (
        AT_ONCE,
        Mutation("own samples are read too early", WHOLE, "", BARRIER, ";", "\n    return all"),
    ),
    (
        AT_ONCE,
        Mutation("coefficients are read too early", WHOLE, "", BARRIER, ";", "\n  }\n  map_slab"),
    ),
    (AT_ONCE, Mutation("clusters merge too early", WHOLE, "", CLUSTER_BARRIER, ";", "  // results")),
    (AT_ONCE, Mutation("clusters apply too early", WHOLE, "", CLUSTER_BARRIER, ";", "  // coefficients")),
    (
        AT_ONCE,
        Mutation("blocks of a cluster leave early", WHOLE, "else { ", CLUSTER_BARRIER, BARRIER, " }  // coefficients"),
    ),
    (
        AT_ONCE,
        Mutation("a block reads its own results", WHOLE, "of_block(results + channel, ", "i", "slab_index", ");"),
    ),
    (AT_ONCE, Mutation("every block of a cluster writes", WHOLE, "merged, ", "slab_index == 0", "true", ");")),
    (
        AT_ONCE,
        Mutation("samples of no group are left", WHOLE, "1 : ", "groups.count + 1", "groups.count", ");\n  STD"),
    ),
    (
        AT_ONCE,
        Mutation("edges stay as they are", WHOLE, "if (", "plan.edge == 0", "true", ") return;"),
    ),
    (
        AT_ONCE,
        Mutation("every channel counts the mini-batch", TRACK, "if (", "channel == 0", "true", ") ++num"),
    ),
    (
        AT_ONCE,
        Mutation("groups of one value move", TRACK, "", "!(batch.count > 1)", "false", ") return;"),
    ),
    ("reduce_misaligned", Mutation("alignment is not looked at", "cuda/tensors.h", "(p) % ", "16", "1", " == 0")),
]


@pytest.fixture(scope="module")
def mutants() -> Emulated:
    """All defects in one library, of which one at a time is active."""
    patches = tuple(mutation.patch(number) for number, (_, mutation) in enumerate(DEFECTS))
    sources = (
        *("moments", "accumulate", "track", "coefficients", "normalize"),
        *("normalize_batch", "normalize_and_track", "normalize_at_once"),
        *("backward_reduce", "backward_coefficients", "backward_apply", "backward_batch", "backward_at_once"),
        *("workspace", "defects"),
    )
    return emulated_library.load(patches=(*ONLY_FLOAT32, *patches), sources=sources)


@pytest.mark.parametrize("exercise", EXERCISES)
def test_without_a_defect_every_exercise_succeeds(exercise, mutants):
    for seed in range(3):
        with mutants.during(seed=seed, multiprocessors=(1, 16, 132)[seed]):
            EXERCISES[exercise](mutants)


@pytest.mark.parametrize("number", range(len(DEFECTS)), ids=[mutation.name for _, mutation in DEFECTS])
def test_every_defect_is_found(number, mutants):
    exercise, _ = DEFECTS[number]
    mutants.mutate(number)
    try:
        with pytest.raises((RuntimeError, AssertionError)) as found:
            run_many_times(EXERCISES[exercise], mutants)
    finally:
        mutants.mutate(-1)
        mutants.reset()
    print(str(found.value).strip().splitlines()[0])


def run_many_times(exercise: Callable[[Emulated], None], device: Emulated) -> None:
    for seed in range(20):
        device.set(seed=seed)
        exercise(device)


# ---- The emulation itself -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("missing_barrier", "race: thread .* of block 0 has"),
        ("no_value", "NaN"),
        ("missing_fence", "race: thread .* of block . has"),
        ("missing_cluster_barrier", "race: thread .* of block . has|has left"),
        ("left_before_a_cluster_barrier", "threads have left before a barrier of their cluster"),
        ("written_constant", "__ldg"),
        ("left_before_a_barrier", "threads have left before a barrier"),
        ("shuffle_and_barrier", "deadlock"),
        ("misaligned_load", "misaligned: __ldg"),
        ("misaligned_store", "misaligned: a store of a uint4"),
    ],
)
def test_classes_of_defects_are_told_apart(kernel, message, mutants):
    for seed in range(5):
        with mutants.during(seed=seed):
            assert re.search(message, mutants.defect(f"defect_{kernel}"))


def test_every_access_is_seen_and_blocks_take_turns(mutants):
    before = mutants.statistics()
    reduce(mutants)
    after = mutants.statistics()
    done = emulated_library.Statistics(*(b - a for a, b in zip(before, after, strict=True)))
    assert done.accesses > sum(torch.Size(shape).numel() for shape in SHAPES)
    assert min(done.blocks, done.barriers, done.shuffles) > 2 * done.launches
    assert min(done.fences, done.atomics) > done.launches
    assert done.switches > 100 * done.blocks


# ---- Plans ----------------------------------------------------------------------------------------------------------


def test_plans_hold_every_value_once_and_count_it(tmp_path):
    source, program = ROOT / "tests" / "cuda_emulation" / "plans" / "plans.cpp", tmp_path / "plans"
    command = ["-std=c++20", "-O2", "-Wall", f"-I{ROOT / 'csrc'}", str(source), "-o", str(program)]
    emulated_library.run([str(emulated_library.compiler()), *command])
    done = subprocess.run([str(program)], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert int(done.stderr.split()[0]) > 5000


# ---- What kernels cost, as far as it can be counted -----------------------------------------------------------------


def cost(device: Emulated, kernel: str, call: Callable[[], object], multiprocessors: int = 132) -> Launch:
    """What the launch of a kernel does. csrc/cuda/README.md says what that was once, and what to expect of a GPU."""
    with device.during(multiprocessors=multiprocessors):
        (found,) = (launch for launch in device.launches(call) if launch.kernel == kernel)
    print(found)
    return found


def test_long_planes_are_read_by_vectors(mutants):
    for length, planes in ((17, 64), (35, 16), (55, 8), (147, 4)):
        x = torch.randn(planes // 2, 2, length, length)
        launch = cost(mutants, "reduce", lambda x=x: mutants.kernels.moments(x))
        edges = length**2 - (length**2 - 3) // 4 * 4  # of a plane, in no vector
        assert launch.narrow_loads == 4 * edges * planes  # one a thread: as the first, for the mean, and twice for m2
        of_partials = 1 + 2 * launch.blocks  # by each of 32 threads at most
        assert 0 <= launch.wide_loads - (x.numel() - edges * planes) // 4 <= 32 * of_partials


def test_pieces_of_groups_are_merged_by_many_threads(mutants):
    x = torch.randn(8, 64, 56, 56).contiguous(memory_format=torch.channels_last)
    launch = cost(mutants, "merge_pieces", lambda: mutants.kernels.moments(x, torch.arange(8) % 2, 2))
    pieces = 8 * 25  # slabs of one sample each
    warps = 2  # for a channel: more than 128 pieces
    assert launch.blocks == 2 * 64 * warps // 8
    assert launch.longest <= 2 * math.ceil(pieces / (32 * warps))  # who it is of, and where it is of the group, itself


@pytest.mark.parametrize("planes", [(40, 7, 7), (64, 3, 3)])
def test_groups_take_no_block_longer_however_many_there_are(planes, mutants):
    x = torch.randn(64, *planes)
    alone = cost(mutants, "reduce", lambda: mutants.kernels.moments(x, torch.zeros(64).long(), 1))
    for groups in (2, 8, 32, 64):
        group = torch.arange(64) % groups
        launch = cost(mutants, "reduce", lambda group=group, g=groups: mutants.kernels.moments(x, group, g))
        assert launch.barriers == alone.barriers == 4  # three to find its samples, one to merge what threads have
        assert launch.longest <= alone.longest
        assert launch.wide_loads == x.numel() // 4
        assert launch.blocks <= alone.blocks * (1 + groups)


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_small_layer_takes_one_launch(channels_last, mutants):
    """That reads x twice, the second time from L1, and allocates nothing but results, also while it is captured."""
    x, weight, eps = torch.randn(2, 64, 8, 8), torch.rand(64), 1e-5
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    running = torch.zeros(64), torch.ones(64), torch.tensor(0)
    kernels, before = mutants.kernels, mutants.statistics()
    _, *statistics = kernels.normalize_batch(x, weight, None, eps)
    calls = {
        "normalize_batch": lambda: kernels.normalize_batch(x, weight, None, eps),
        "normalize_and_track": lambda: kernels.normalize_and_track(x, weight, None, eps, *running, 0.1),
        "backward_batch": lambda: kernels.backward_batch(x, x, *statistics, weight, eps),
    }
    for capturing in (False, True):
        for name, call in calls.items():
            with mutants.during(capturing=capturing):
                (launch,) = mutants.launches(call)
            print(name, launch)
            assert launch.kernel == "reduce_and_map"
            assert launch.wide_loads == 2 * x.numel() // 4 * (2 if name == "backward_batch" else 1)
            assert launch.barriers == 2
            assert launch.fences == 0
            assert launch.blocks >= (4 if channels_last else 64)
    cumulative = mutants.launches(lambda: kernels.normalize_and_track(x, weight, None, eps, *running, None))
    assert [launch.kernel for launch in cumulative] == ["reduce_and_map", "track_rows"]
    assert mutants.statistics().allocated == before.allocated


@pytest.mark.parametrize("multiprocessors", [1, 16, 132])
@pytest.mark.parametrize("shape", [(2, 64, 8, 8), (30, 12, 7, 7), (64, 30), (2, 3, 40, 41)])
def test_one_launch_has_the_bits_of_three(shape, multiprocessors, mutants):
    x, dy, kernels = torch.randn(shape) + 3, torch.randn(shape), mutants.kernels
    for group, k in ((None, 1), (torch.arange(len(x)) % 3, 4)):
        weight = torch.rand(k, shape[1])
        with mutants.during(multiprocessors=multiprocessors):
            (launch,) = mutants.launches(lambda w=weight, g=group, k=k: kernels.normalize_batch(x, w, None, 1e-3, g, k))
            assert launch.kernel == "reduce_and_map"
            y, count, mean, m2 = kernels.normalize_batch(x, weight, None, 1e-3, group, k)
            dx, *_ = kernels.backward_batch(dy, x, count, mean, m2, weight, 1e-3, group)
            moments = kernels.moments(x, group, k)
            var = moments[2] / moments[0].clamp(min=1)[:, None]
            apart = kernels.normalize(x, *kernels.coefficients(moments[1], var, weight, None, 1e-3, False), group)
            sums = kernels.backward_reduce(dy, x, moments[1], group, k)
            *coefficients, _, _ = kernels.backward_coefficients(moments[0], moments[1], var, *sums, weight, 1e-3, False)
        assert torch.equal(y, apart)
        assert torch.equal(dx, kernels.backward_apply(dy, x, *coefficients, group))
        assert all(torch.equal(a.reshape(b.shape), b) for a, b in zip((count, mean, m2), moments, strict=True))


@pytest.mark.parametrize("multiprocessors", [1, 132])
@pytest.mark.parametrize("shape", IN_CLUSTERS)
def test_a_cluster_has_the_bits_of_three_launches(shape, multiprocessors, mutants):
    x, dy, weight, kernels = torch.randn(shape) + 3, torch.randn(shape), torch.rand(shape[1]), mutants.kernels
    running = [[torch.zeros(shape[1]), torch.ones(shape[1]), torch.tensor(0)] for _ in range(2)]
    results, launched = [], []
    for has_clusters in (True, False):
        with mutants.during(multiprocessors=multiprocessors, clusters=has_clusters, seed=multiprocessors):
            forward = kernels.normalize_and_track(x, weight, None, 1e-3, *running[has_clusters], 0.1)
            backward = kernels.backward_batch(dy, x, *forward[1:], weight, 1e-3)
            launched.append(mutants.launches(lambda f=forward: kernels.backward_batch(dy, x, *f[1:], weight, 1e-3)))
        results.append([*forward, *backward, *running[has_clusters]])
    assert [launch.kernel for launch in launched[0]] == ["reduce_and_map"]
    assert [launch.kernel for launch in launched[1]] == ["reduce", "write_coefficients", "map"]
    assert launched[0][0].barriers == 3  # one of the block, two of the cluster
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_partial_results_are_read_several_at_a_time(mutants):
    x = torch.randn(16, 256, 14, 14).contiguous(memory_format=torch.channels_last)
    launch = cost(mutants, "reduce", lambda: mutants.kernels.moments(x))
    assert launch.blocks == 2 * 49
    clusters = slabs_of_cluster = 7
    lanes = 256 // 128  # of a channel
    once = math.ceil(clusters / lanes) + math.ceil(slabs_of_cluster / lanes)  # at most 8 of each at once
    assert launch.longest_merge <= 2 * once + 2  # for the mean, for m2, and the first of all as their origin


def test_a_ticket_takes_one_fence(mutants):
    x = torch.randn(MANY_SLABS)
    before = mutants.statistics()
    launch = cost(mutants, "reduce", lambda: mutants.kernels.moments(x))
    assert launch.fences == mutants.statistics().atomics - before.atomics > launch.blocks - 1


def test_maps_of_one_sample_take_few_blocks(mutants):
    x = torch.randn(1, 16, 100, 100)
    scale = torch.ones(1, 16)
    launch = cost(mutants, "map", lambda: mutants.kernels.normalize(x, None, scale, None), multiprocessors=1)
    vectors = x.numel() // 4
    assert launch.blocks <= 16 < vectors / 256
    assert launch.wide_loads == vectors
    assert launch.narrow_loads < vectors  # of coefficients: again only where a thread comes to a new plane


# ---- The kernels, as a host sees them -------------------------------------------------------------------------------


def test_the_same_bits_in_every_order_of_threads(mutants):
    kernels = mutants.kernels
    for multiprocessors in (1, 16, 132):
        torch.manual_seed(0)
        inputs = [torch.randn(shape) + 3 for shape in [(64, 40, 7, 7), (1, 1, 400, 400), (70, 300)]]
        groups = [torch.randint(3, (len(x),)) for x in inputs]
        results = []
        for seed in range(6):
            with mutants.during(seed=seed, multiprocessors=multiprocessors, capturing=seed == 3):
                results.append([t for x, g in zip(inputs, groups, strict=True) for t in kernels.moments(x, g, 3)])
                results[-1] += [t for x in inputs for t in kernels.moments(x)]
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_failed_allocation_is_done_without_and_tried_again(mutants):
    x = torch.randn(64, 40, 7, 7)
    for stream, failing in enumerate(({"allocations": 1}, {"memsets": 1}), start=100):  # that have no memory yet
        mutants.synchronize()
        with mutants.during(stream=stream):
            before = mutants.statistics()
            mutants.fail(**failing)
            assert_moments(mutants.kernels.moments(x), x)
            failed = mutants.statistics()
            assert failed.allocated - before.allocated == failed.freed - before.freed
            for _ in range(2):
                assert_moments(mutants.kernels.moments(x), x)
        after = mutants.statistics()
        assert after.allocated - failed.allocated == 1
        assert after.freed == failed.freed
    mutants.synchronize()


# ---- Under AddressSanitizer and UndefinedBehaviorSanitizer ----------------------------------------------------------


def sanitized(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Python, in a process of its own: the sanitizers must be loaded first, and end it where they find something."""
    environment = {**emulated_library.sanitized_environment(), "PRECISEBN_EMULATE": "sanitizers"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250)


@pytest.fixture(scope="module")
def sanitized_library() -> Path:
    return emulated_library.build(emulated_library.SANITIZERS, ONLY_FLOAT32_AND_BFLOAT16)


def test_kernels_under_sanitizers(sanitized_library):
    done = sanitized("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/ops/test_cuda.py", "-k", "sanitizer")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "30 passed" in done.stdout


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("outside", "heap-buffer-overflow|use-after-poison"),
        ("outside_of_shared_memory", "heap-buffer-overflow|use-after-poison"),
        ("shift_by_too_much", "shift exponent 32 is too large"),
    ],
)
def test_sanitizers_find_what_kernels_must_not_do(kernel, message, sanitized_library):
    done = sanitized("-c", f"import ctypes, torch; ctypes.CDLL({str(sanitized_library)!r}).defect_{kernel}()")
    assert done.returncode != 0
    assert re.search(message, done.stderr), done.stderr
