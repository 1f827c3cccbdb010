"""The prior: layers normalize by what will be deployed, so that those behind them are measured under it."""

import copy
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import state_of
from torch import Tensor, nn

from precisebn import (
    BatchFormatError,
    InputError,
    InsufficientDataError,
    NonFiniteStatisticsError,
    adapt_bn_stats,
    update_bn_stats,
)
from precisebn.nn import BatchStatBN, CycleBatchNormList, DomainSpecificBN, GhostBN, use_domain


class ByHand(nn.BatchNorm2d):
    """A subclass with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps
        )


LAYERS: dict[str, Callable[[int], nn.Module]] = {
    "BatchNorm2d": nn.BatchNorm2d,
    "own forward": ByHand,
    "GhostBN": lambda c: GhostBN(c, 4),
    "CycleBatchNormList": lambda c: CycleBatchNormList(1, num_features=c),
    "DomainSpecificBN": lambda c: DomainSpecificBN(c, 2, affine="shared"),
}


def net(layer: str = "BatchNorm2d") -> nn.Sequential:
    """Three layers behind one another, in float64, with statistics of a source."""
    torch.manual_seed(0)
    parts: list[nn.Module] = [nn.Conv2d(3, 4, 1), LAYERS[layer](4), nn.ReLU()]
    parts += [nn.Conv2d(4, 4, 3), LAYERS[layer](4), nn.ReLU(), nn.Conv2d(4, 4, 3), LAYERS[layer](4)]
    model = nn.Sequential(*parts).double()
    for domain in (0, 1):
        with use_domain(domain):
            update_bn_stats(model, [images(64)], 1)
    return model.eval()


def images(n: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.rand(n, 3, 9, 9, generator=generator, dtype=torch.float64)


def domain_0(model: nn.Module, batch: Any) -> None:
    with use_domain(0):
        model(batch)


def statistics(model: nn.Module) -> dict[str, Tensor]:
    """Running statistics of the first population of every layer."""
    found = {}
    for name, value in model.state_dict().items():
        if name.endswith(("running_mean", "running_var")):
            found[name] = (value[0] if value.dim() == 2 else value).clone()
    return found


@torch.no_grad()
def by_the_paper(model: nn.Sequential, x: Tensor, prior: float) -> dict[str, Tensor]:
    """Schneider et al. 2020, section 3, one mini-batch: each layer mixes, and normalizes by the mixture."""
    source, found = statistics(model), {}
    weight = prior / (prior + len(x)) if math.isfinite(prior) else 1.0
    for index, part in enumerate(model):
        name = next((n for n in source if n.startswith(f"{index}.") and n.endswith("mean")), None)
        if name is None:
            x = part(x)
            continue
        var_name = name.replace("mean", "var")
        mean = weight * source[name] + (1 - weight) * x.mean((0, 2, 3))
        var = weight * source[var_name] + (1 - weight) * x.var((0, 2, 3), unbiased=False)
        found |= {name: mean, var_name: var}
        x = F.batch_norm(x, mean, var, part.weight, part.bias)
    return found


@pytest.mark.parametrize("prior", [1.0, 16.0, 1e6, math.inf])
@pytest.mark.parametrize("layer", LAYERS)
def test_of_one_mini_batch_every_layer_is_what_the_paper_says(layer, prior):
    model, x = net(layer), images(16, scale=0.3)
    expected = by_the_paper(model, x, prior)
    report = adapt_bn_stats(model, [x], prior, forward=domain_0)
    found = statistics(model)
    assert report.num_samples == 16
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12)


def test_deeper_layers_are_measured_under_what_is_deployed_and_not_under_the_target_alone():
    """What went wrong without: under a shift the mixture was that of two networks, neither of which was deployed."""
    model, x = net(), images(16, scale=0.3)
    alone = copy.deepcopy(model)
    update_bn_stats(alone, [x], 1, modules="all")
    source = statistics(model)
    adapt_bn_stats(model, [x], 16)
    found, target = statistics(model), statistics(alone)
    torch.testing.assert_close(found["1.running_mean"], (source["1.running_mean"] + target["1.running_mean"]) / 2)
    half_way = (source["7.running_mean"] + target["7.running_mean"]) / 2
    assert ((found["7.running_mean"] - half_way).abs() / found["7.running_var"].sqrt()).max() > 0.1


@pytest.mark.parametrize("layer", sorted(LAYERS.keys() - {"GhostBN"}))  # whose ghost batches are those of either cut
@pytest.mark.parametrize("prior", [4.0, 64.0])
def test_how_the_data_is_cut_hardly_matters(layer, prior):
    """No more than without a prior, where every mini-batch normalizes by its own statistics."""

    def distance(prior: float) -> float:
        found = []
        for size in (64, 16):
            model = net(layer)
            adapt_bn_stats(model, images(64, scale=0.3).split(size), prior, forward=domain_0)
            found.append(statistics(model))
        whole, parts = found
        return max(
            float(((whole[name] - parts[name]).abs() / whole[name.replace("mean", "var")].sqrt()).max())
            for name in whole
            if name.endswith("mean")
        )

    assert distance(prior) <= distance(0.0) + 1e-9
    assert distance(0.0) < 0.2


def test_the_smallest_prior_is_next_to_none():
    models = [net(), net()]
    for model, prior in zip(models, (0.0, 1e-9), strict=True):
        adapt_bn_stats(model, images(64, scale=0.3).split(16), prior)
    for a, b in zip(statistics(models[0]).values(), statistics(models[1]).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_batch_mean_mixes_the_unbiased_variances_that_it_deploys():
    model, x = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3)).double().eval(), images(4)
    adapt_bn_stats(model, [x], 4, estimator="batch-mean")
    var = (1 + x.var((0, 2, 3))) / 2
    torch.testing.assert_close(model[0].running_var, var)
    y = F.batch_norm(x, x.mean((0, 2, 3)) / 2, var)
    torch.testing.assert_close(model[1].running_mean, y.mean((0, 2, 3)) / 2)


def test_each_domain_weighs_against_its_own_part_of_the_samples():
    model = nn.Sequential(DomainSpecificBN(3, 2, affine=None), nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2)).double().eval()
    x, domain = images(8), torch.tensor([0] * 6 + [1] * 2)
    expected = [
        (4 * 0 + len(x[domain == k]) * x[domain == k].mean((0, 2, 3))) / (4 + (domain == k).sum()) for k in (0, 1)
    ]
    adapt_bn_stats(model, [x], 4, forward=lambda m, batch: use(m, batch, domain))
    torch.testing.assert_close(model[0].running_mean, torch.stack(expected))


def use(model: nn.Module, batch: Tensor, domain: Tensor) -> None:
    with use_domain(domain):
        model(batch)


def test_a_layer_that_normalizes_by_mini_batches_when_deployed_is_measured_so():
    model, x = nn.Sequential(BatchStatBN(3), nn.BatchNorm2d(3)).double().eval(), images(8)
    adapt_bn_stats(model, [x], 8)
    y = F.batch_norm(x, None, None, training=True)
    torch.testing.assert_close(model[1].running_mean, y.mean((0, 2, 3)) / 2)


class Counted:
    """A loader that says how often it was gone through."""

    def __init__(self, batches: list[Tensor]) -> None:
        self.batches, self.times = batches, 0

    def __iter__(self) -> Iterator[Tensor]:
        self.times += 1
        return iter(self.batches)


@pytest.mark.parametrize("num_iters", [None, 2])
def test_an_iterator_does_as_well_as_a_loader_which_is_gone_through_twice(num_iters):
    batches = list(images(48, scale=0.3).split(16))
    models = [net(), net()]
    loader = Counted(batches)
    adapt_bn_stats(models[0], loader, 8, num_iters)
    adapt_bn_stats(models[1], iter(batches), 8, num_iters)
    assert loader.times == 2
    assert all(map(torch.equal, statistics(models[0]).values(), statistics(models[1]).values()))
    other = net()
    adapt_bn_stats(other, loader, 0, num_iters)
    assert loader.times == 3


def test_with_a_tolerance_the_samples_so_far_count():
    model = net()
    report = adapt_bn_stats(model, images(256, scale=0.3).split(16), 4, tolerance=0.5)
    assert report.converged
    assert report.num_samples == 128


def test_nan_in_the_present_statistics_is_no_prior():
    model = net()
    model[4].running_var[0] = float("nan")
    before = state_of(model)
    with pytest.raises(
        NonFiniteStatisticsError, match=r"the present statistics of layer '4' hold NaN or Inf: no prior"
    ):
        adapt_bn_stats(model, [images(4)], 2)
    assert state_of(model) == before
    adapt_bn_stats(model, [images(4)], 0)
    assert model[4].running_var.isfinite().all()


@pytest.mark.parametrize("layer", LAYERS)
def test_what_fails_leaves_the_model_as_it_was(layer):
    model = net(layer)
    before = state_of(model)
    with use_domain(0), pytest.raises(BatchFormatError):
        adapt_bn_stats(model, [images(4), "no image"], 2)
    with pytest.raises(ZeroDivisionError):
        adapt_bn_stats(model, [images(4)], 2, forward=lambda model, batch: domain_0(model, batch) or 1 / 0)
    assert state_of(model) == before


# ---- What loaders do ----------------------------------------------------------------------------------------------


@dataclass
class Batch:
    x: Tensor


@pytest.mark.parametrize(
    "wrap",
    [Batch, lambda x: {"x": x, "mask": torch.ones(len(x), 1)}, lambda x: (x, {"sizes": torch.tensor([[9, 9]])})],
    ids=["dataclass", "mapping", "tuple"],
)
@pytest.mark.parametrize("tolerance", [None, 1e9])
def test_a_prior_weighs_the_same_in_whatever_form_the_data_comes(wrap, tolerance):
    model, reference = net(), net()
    batches = images(64, scale=0.3).split(8)

    def forward(model: nn.Module, batch: Any) -> None:
        model(batch.x if isinstance(batch, Batch) else batch["x"] if isinstance(batch, dict) else batch[0])

    report = adapt_bn_stats(model, [wrap(x) for x in batches], 64, forward=forward, tolerance=tolerance)
    adapt_bn_stats(reference, batches, 64, tolerance=tolerance)
    assert report.num_samples == 64
    assert all(map(torch.equal, statistics(model).values(), statistics(reference).values()))


@pytest.mark.parametrize("tolerance", [None, 1e9])
def test_a_prior_does_not_weigh_against_a_number_that_is_guessed(tolerance):
    """What was counted were the sizes of one image: 1 sample of 32."""
    model, x = net(), images(32)
    batch = {"sizes": torch.tensor([[9, 9]]), "x": x}
    before = state_of(model)
    with pytest.raises(BatchFormatError, match=r"prior=32 weighs samples.*first dimensions 1, 32.*yield pairs"):
        adapt_bn_stats(model, [batch], 32, forward=lambda m, b: m(b["x"]), tolerance=tolerance)
    assert state_of(model) == before
    adapt_bn_stats(model, [(x, batch)], 32, forward=lambda m, pair: m(pair[1]["x"]))  # as the message says
    reference = net()
    adapt_bn_stats(reference, [x], 32)
    assert all(map(torch.equal, statistics(model).values(), statistics(reference).values()))
    assert adapt_bn_stats(net(), [batch], forward=lambda m, b: m(b["x"])).num_samples == 32  # no weights, no matter


@pytest.mark.parametrize("how", ["copy_", "numpy"])
@pytest.mark.parametrize("num_buffers", [1, 2])
def test_a_loader_that_refills_its_memory_may_be_an_iterator(how, num_buffers):
    """As prefetchers do: of the mini-batches that were kept, each was the last one."""
    batches = images(48, scale=0.3).split(8)

    def refilled() -> Iterator[Tensor]:
        ring = [torch.empty_like(batches[0]) for _ in range(num_buffers)]
        for index, batch in enumerate(batches):
            buffer = ring[index % num_buffers]
            if how == "copy_":
                buffer.copy_(batch)
            else:  # which no version counter of torch tells
                buffer.numpy()[:] = batch.numpy()
            yield buffer

    model, reference = net(), net()
    adapt_bn_stats(model, refilled(), 8)
    adapt_bn_stats(reference, batches, 8)
    assert all(map(torch.equal, statistics(model).values(), statistics(reference).values()))


class Once:
    """A loader that is no iterator, and can be gone through once all the same."""

    def __init__(self, batches: Iterable[Tensor]) -> None:
        self.batches = list(batches)

    def __iter__(self) -> Iterator[Tensor]:
        while self.batches:
            yield self.batches.pop(0)


def test_a_loader_that_is_used_up_by_the_first_time_says_so():
    model = net()
    before = state_of(model)
    with pytest.raises(InsufficientDataError, match=r"gone through twice.* gave 3 mini-batches.* 0 .*iter\(loader\)"):
        adapt_bn_stats(model, Once(images(24).split(8)), 8)
    assert state_of(model) == before
    with pytest.raises(InsufficientDataError, match=r"gone through twice.* gave 2 mini-batches.* 1 .*iter\(loader\)"):
        adapt_bn_stats(model, Once(images(24).split(8)), 8, 2)
    assert adapt_bn_stats(model, iter(Once(images(24).split(8))), 8).num_iters == 3  # as the message says


def test_any_number_of_iterations_may_be_asked_for():
    with pytest.raises(InsufficientDataError, match="ended after 1 mini-batch;"):
        adapt_bn_stats(net(), [images(4)], 8, sys.maxsize + 1)


# ---- What cannot be a prior ---------------------------------------------------------------------------------------


def test_a_negative_present_variance_is_no_prior():
    """Another layer's input was blamed, behind the one that divided by its root."""
    model = net()
    model[1].running_var[2] = -1.0
    before = state_of(model)
    with pytest.raises(InputError, match="the present variance of layer '1' is negative"):
        adapt_bn_stats(model, [images(4)], 2)
    assert state_of(model) == before
    adapt_bn_stats(model, [images(4)])
    assert bool((model[1].running_var > 0).all())


@pytest.mark.parametrize("arguments", [{"prior": 10**400}, {"tolerance": 10**400}], ids=["prior", "tolerance"])
def test_numbers_that_no_float_holds(arguments):
    with pytest.raises(InputError, match=f"{next(iter(arguments))}= is larger than any float"):
        adapt_bn_stats(net(), [images(4)], **arguments)


# ---- In the midst of torch.func -----------------------------------------------------------------------------------


@pytest.mark.parametrize("prior", [0.0, 16.0])
@pytest.mark.parametrize("transform", ["grad", "jvp"])
@pytest.mark.parametrize("layer", sorted(LAYERS.keys() - {"own forward"}))  # into whose buffers torch lets none write
def test_a_forward_may_be_differentiated_by_torch_func(layer, transform, prior):
    def forward(model: nn.Module, batch: Tensor) -> None:
        with use_domain(0):
            if transform == "grad":
                torch.func.grad(lambda x: model(x).sum())(batch)
            else:
                torch.func.jvp(model, (batch,), (torch.ones_like(batch),))

    model, reference, x = net(layer), net(layer), images(16, scale=0.3)
    adapt_bn_stats(model, [x], prior, forward=forward)
    adapt_bn_stats(reference, [x], prior, forward=domain_0)
    for found, expected in zip(statistics(model).values(), statistics(reference).values(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("layer", LAYERS)
def test_a_forward_in_vmap_is_refused_by_name(layer):
    model = net(layer)
    before = state_of(model)
    with use_domain(0), pytest.raises(InputError, match=r"layer '1.*runs inside torch\.vmap.*forward="):
        adapt_bn_stats(model, [images(4)], forward=lambda m, x: torch.vmap(m)(x[None]))
    assert state_of(model) == before
