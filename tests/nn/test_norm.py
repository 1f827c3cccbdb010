"""Norm: constructors, representation and parameters are torch's, in every module and on every torch."""

import inspect

import pytest
import torch
from conftest import values_of
from reference import sample, with_random_affine, with_random_population
from torch import Tensor, nn

from precisebn.functional import batch_norm, frozen_batch_norm
from precisebn.nn import (
    BatchStatBN,
    ConcatSharedBN,
    CycleBatchNormList,
    DomainSpecificBN,
    FrozenBatchNorm1d,
    FrozenBatchNorm2d,
    FrozenBatchNorm3d,
    GhostBN,
)

pytestmark = pytest.mark.usefixtures("one_thread")

FROZEN = {"trainable_affine"}
OWN = {
    FrozenBatchNorm1d: FROZEN,
    FrozenBatchNorm2d: FROZEN,
    FrozenBatchNorm3d: FROZEN,
    DomainSpecificBN: {"num_domains", "normalize", "population"},
    ConcatSharedBN: set(),
    GhostBN: {"ghost_size"},
    BatchStatBN: set(),
}
"""The arguments that torch's constructor does not have."""


@pytest.mark.parametrize(("cls", "own"), OWN.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_constructors_are_torchs_with_a_few_more_arguments(cls, own):
    theirs = dict(inspect.signature(nn.BatchNorm2d).parameters)
    # torch has it from 2.13 on.
    theirs.setdefault("bias", inspect.Parameter("bias", inspect.Parameter.KEYWORD_ONLY, default=True))
    ours = dict(inspect.signature(cls).parameters)
    assert set(ours) - set(theirs) == own
    keywords = inspect.Parameter.KEYWORD_ONLY
    assert [name for name in ours if name in theirs and name != "bias"] == [name for name in theirs if name != "bias"]
    for name, parameter in theirs.items():
        if (cls, name) != (DomainSpecificBN, "affine"):  # which says whose it is
            assert (ours[name].default, ours[name].kind) == (parameter.default, parameter.kind)
    required = {name for name in own if ours[name].default is inspect.Parameter.empty}
    assert {name for name in own if ours[name].kind is not keywords} == required


def build(cls: type[nn.Module], **kwargs: object) -> nn.Module:
    first = {DomainSpecificBN: (3, 2), GhostBN: (3, 2), CycleBatchNormList: (2,)}.get(cls, (3,))
    return cls(*first, **({"num_features": 3} if cls is CycleBatchNormList else {}), **kwargs)


EVERY = [*OWN, CycleBatchNormList]
every_class = pytest.mark.parametrize("cls", EVERY, ids=lambda cls: cls.__name__)


def call(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x, domain=1) if isinstance(layer, DomainSpecificBN) else layer(x)


@every_class
def test_bias_false_leaves_a_weight_alone(cls):
    """As torch's of 2.13; also where the affine is held in buffers, by a domain, or by a cycle."""
    torch.manual_seed(0)
    layer = build(cls, bias=False)
    assert layer.bias is None
    assert "bias" not in layer.state_dict()
    assert "weight" in layer.state_dict()
    nn.init.uniform_(layer.weight, 0.5, 1.5)
    shape = {FrozenBatchNorm1d: (4, 3, 5), FrozenBatchNorm3d: (4, 3, 2, 2, 2)}.get(cls, (4, 3, 2, 2))
    x = sample(shape)
    frozen = cls.__name__.startswith("Frozen")
    with torch.no_grad():
        if frozen:
            with_random_population(layer)
            expected = frozen_batch_norm(x, layer.running_mean, layer.running_var, layer.weight)
        else:
            weight = layer.weight[1] if layer.weight.dim() == 2 else layer.weight
            ghosts = x.split(2) if cls is GhostBN else [x]
            expected = torch.cat([batch_norm(ghost, weight)[0] for ghost in ghosts])
        torch.testing.assert_close(call(layer, x), expected)
    other = build(cls, bias=False)
    other.load_state_dict(layer.state_dict())
    assert values_of(other) == values_of(layer)
    layer.reset_parameters()
    assert layer.weight.min() == layer.weight.max() == 1
    if not isinstance(layer, CycleBatchNormList):
        assert "bias=False" in repr(layer)
        assert "bias=False" not in repr(build(cls))


@every_class
def test_without_an_affine_there_is_no_bias_either(cls):
    layer = build(cls, affine=None if cls is DomainSpecificBN else False)
    assert layer.weight is None
    assert layer.bias is None


@every_class
def test_what_is_a_buffer_stays_one_when_a_checkpoint_of_parameters_is_assigned(cls):
    """``state_dict(keep_vars=True)`` holds the parameters of nn.BatchNorm themselves."""
    layer = build(cls)
    parameters, buffers = dict(layer.named_parameters()), dict(layer.named_buffers())
    plain = with_random_population(with_random_affine(nn.BatchNorm2d(3)))
    layer.load_state_dict(plain.state_dict(keep_vars=True), assign=True)
    assert dict(layer.named_parameters()).keys() == parameters.keys()
    assert dict(layer.named_buffers()).keys() == buffers.keys()
    assert not any(buffer.requires_grad for buffer in layer.buffers())
    assert torch.equal(torch.atleast_2d(layer.weight)[-1], plain.weight)
    if cls is FrozenBatchNorm2d:
        assert layer.weight.data_ptr() == plain.weight.data_ptr()  # it was assigned, not copied
        twin = build(cls)
        twin.load_state_dict(layer.state_dict(keep_vars=True), assign=True)
        assert not list(twin.parameters())
