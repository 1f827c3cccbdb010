"""Wrong calls of conversions: what they say, and that they change nothing."""

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from model_zoo import CONVERSIONS, Picture, convnet
from pretended import APEX
from torch import nn
from torch.nn.utils import parametrize, prune

from precisebn import InputError
from precisebn.conversion.converters import (
    convert_batch_stat,
    convert_concat_shared,
    convert_cycle,
    convert_domain_specific,
    convert_frozen_batchnorm,
    convert_ghost,
    convert_sync_batchnorm,
    convert_to_batchnorm,
)
from precisebn.conversion.engine import replace_batchnorm
from precisebn.nn import (
    CycleBatchNormList,
    GhostBN,
)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # torch.compile of 2.10 to 2.13, and torch.ao, warn of the use of deprecated parts of torch.
    pytest.mark.filterwarnings("ignore::FutureWarning:torch.*"),
]


def _parametrized() -> nn.Module:
    model = convnet()
    parametrize.register_parametrization(model[7], "weight", nn.ReLU())
    return model


def _parametrized_bias() -> nn.Module:
    model = nn.Sequential(nn.BatchNorm2d(3))
    parametrize.register_parametrization(model[0], "bias", nn.Tanh())
    return model


def _pruned() -> nn.Module:
    model = nn.Sequential(nn.BatchNorm2d(3))
    prune.l1_unstructured(model[0], "weight", 1)
    return model


def _patched() -> nn.Module:
    model = convnet()
    model[7].forward = lambda x: x
    return model


def _qat_layer() -> nn.Module:
    qat = pytest.importorskip("torch.ao.nn.intrinsic.qat")
    quantization = pytest.importorskip("torch.ao.quantization")
    return nn.Sequential(nn.Identity(), qat.ConvBn2d(3, 6, 3, qconfig=quantization.get_default_qat_qconfig("fbgemm")))


def _fused() -> nn.Module:
    intrinsic = pytest.importorskip("torch.ao.nn.intrinsic")
    return nn.Sequential(intrinsic.ConvBn2d(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)))


def _observed() -> nn.Module:
    quantization = pytest.importorskip("torch.ao.quantization")
    net = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1))
    net.qconfig = quantization.get_default_qat_qconfig("fbgemm")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return quantization.prepare_qat(net)


def _with_forward(layer: nn.Module) -> nn.Module:
    layer.forward = lambda x: x
    return layer


def _same_for_all(model: nn.Module) -> nn.Module:
    one = nn.Identity()
    return replace_batchnorm(model, lambda bn: one)


SIZE = r"must be a whole number"
WRONG_CALLS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], object], str]] = {
    "no such name": (convnet, lambda m: convert_ghost(m, 2, include="x"), r"include='x' .* Sequential; it has 2: '1'"),
    "no such pattern": (convnet, lambda m: convert_ghost(m, 2, exclude=["*x*"]), r"exclude='\*x\*' matches no"),
    "a name that holds none": (convnet, lambda m: convert_ghost(m, 2, include="0"), "matches no BatchNorm layer"),
    "another's layer": (
        convnet,
        lambda m: convert_ghost(m, 2, include=nn.BatchNorm2d(2)),
        "include=the BatchNorm2d given matches no",
    ),
    "nothing to choose from": (lambda: nn.Sequential(nn.ReLU()), lambda m: convert_cycle(m, 2, include="0"), "none"),
    "a number": (convnet, lambda m: convert_ghost(m, 2, include=1), r"include=1 must be modules, names and patterns"),
    "numbers": (convnet, lambda m: convert_ghost(m, 2, exclude=[1]), r"exclude= takes modules, .* not int: 1"),
    "an empty list": (convnet, lambda m: convert_ghost(m, 2, include=[]), r"include= is empty"),
    "an inner part": (
        lambda: nn.Sequential(CycleBatchNormList(2, num_features=3)),
        lambda m: convert_ghost(m, 2, include="0.1"),
        "matches no",
    ),
    "ghost_size": (convnet, lambda m: convert_ghost(m, 0), rf"ghost_size=0 {SIZE}"),
    "implementation": (
        convnet,
        lambda m: convert_sync_batchnorm(m, implementation="apex"),
        "implementation='apex' must be 'torch' or 'precisebn'",
    ),
    "num_domains": (convnet, lambda m: convert_domain_specific(m, 1.5), rf"num_domains=1.5 {SIZE}"),
    "normalize": (convnet, lambda m: convert_domain_specific(m, 2, normalize="all"), "normalize='all' must be"),
    "population": (convnet, lambda m: convert_domain_specific(m, 2, population=None), "population=None must be"),
    "affine": (convnet, lambda m: convert_domain_specific(m, 2, affine=None), "affine=None must be .* stay without"),
    "length": (convnet, lambda m: convert_cycle(m, True), rf"length=True {SIZE}"),
    "domain": (convnet, lambda m: convert_to_batchnorm(m, domain=-1), "domain=-1 must be the number of a domain"),
    "domain, a bool": (convnet, lambda m: convert_to_batchnorm(m, domain=True), "domain=True must be"),
    "bn_class": (convnet, lambda m: convert_to_batchnorm(m, bn_class=nn.ReLU), "bn_class=.* must be a BatchNorm class"),
    "frozen bn_class": (
        convnet,
        lambda m: convert_frozen_batchnorm(m, bn_class=nn.SyncBatchNorm),
        "bn_class=.* must be nn.BatchNorm1d, ",
    ),
    "no statistics": (
        lambda: nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3, track_running_stats=False)),
        convert_frozen_batchnorm,
        r"layer '1' \(BatchNorm2d\) has no running statistics to freeze .*exclude=",
    ),
    "no values yet": (
        lambda: nn.Sequential(nn.BatchNorm2d(3), nn.LazyBatchNorm2d()),
        convert_frozen_batchnorm,
        r"layer '1' \(LazyBatchNorm2d\) has no values yet; run one forward",
    ),
    "no values yet, own factory": (
        lambda: nn.Sequential(nn.BatchNorm2d(3), nn.LazyBatchNorm2d()),
        lambda m: replace_batchnorm(m, lambda bn: nn.Identity()),
        "layer '1' .* has no values yet",
    ),
    "parametrized": (_parametrized, convert_frozen_batchnorm, r"layer '7' .* computed .*remove_parametrizations"),
    "parametrized bias": (_parametrized_bias, convert_batch_stat, "layer '0' .* computed"),
    "pruned": (_pruned, convert_sync_batchnorm, "layer '0' .* computed"),
    "patched": (_patched, convert_concat_shared, r"layer '7' \(BatchNorm1d\) .* put on the instance"),
    "a patched layer of ours": (
        lambda: _with_forward(GhostBN(3, 2)),
        convert_to_batchnorm,
        r"the GhostBN given has a forward of its own, put on the instance",
    ),
    "fused relu": (
        lambda: nn.Sequential(APEX.SyncBatchNorm(3, fuse_relu=True)),
        convert_batch_stat,
        r"layer '0' \(SyncBatchNorm\) has a forward of its own, apex.parallel",
    ),
    "quantization-aware": (_qat_layer, convert_frozen_batchnorm, r"layer '1.bn' .* quantization.* then prepare it"),
    "fused": (_fused, convert_frozen_batchnorm, r"layer '0.1' .* quantization"),
    "observed": (_observed, convert_frozen_batchnorm, r"layer '0' .* quantization"),
    "a list": (lambda: nn.Identity(), lambda m: convert_ghost([m], 2), "model must be a module, not list"),
    "factory, a module": (convnet, lambda m: replace_batchnorm(m, nn.Identity()), "factory=Identity.* a function"),
    "factory that returns None": (
        lambda: nn.BatchNorm2d(3),
        lambda m: replace_batchnorm(m, lambda bn: None),
        "the factory returned None for the BatchNorm2d given; it must return a module",
    ),
    "factory, the same": (
        lambda: nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3)),
        _same_for_all,
        "the factory returned for layer '1' .* in use already",
    ),
    "factory, one of the model": (
        convnet,
        lambda m: replace_batchnorm(m, lambda bn: m[2]),
        "the factory returned for layer '1' .* in use already",
    ),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("call", WRONG_CALLS)
def test_wrong_calls_say_what_is_wrong_and_change_nothing(call):
    build, convert, message = WRONG_CALLS[call]
    model = build()
    before = list(model.modules()) if call.startswith("no values") else Picture(model)  # there is nothing to picture
    with pytest.raises(InputError, match=message):
        convert(model)
    assert before == (list(model.modules()) if call.startswith("no values") else Picture(model))


def test_nothing_to_convert_warns_and_says_why():
    model = nn.Sequential(nn.ReLU())
    for convert in (*CONVERSIONS.values(), convert_to_batchnorm, lambda m: replace_batchnorm(m, nn.Identity)):
        with pytest.warns(UserWarning, match="Sequential has no BatchNorm layer, so nothing is converted") as caught:
            assert convert(model) is model
        assert len(caught) == 1
        assert Path(caught[0].filename).parent == Path(__file__).parent  # the line of the caller
    model = convnet()
    with pytest.warns(UserWarning, match="none is left by include= and exclude="):
        convert_frozen_batchnorm(model, include="1", exclude="1")
    before = Picture(model)
    convert_to_batchnorm(model)  # all is BatchNorm already: nothing to say
    assert Picture(model) == before


def test_a_domain_to_keep_where_there_are_none_warns():
    model = convnet()
    with pytest.warns(UserWarning, match=r"domain=1 chooses nothing: no layer of Sequential .* several domains"):
        convert_to_batchnorm(model, domain=1)
    convert_ghost(model, 2)
    with pytest.warns(UserWarning, match="domain=0 chooses nothing") as caught:
        convert_to_batchnorm(model, domain=0)
    assert Path(caught[0].filename) == Path(__file__)
    assert type(model[1]) is nn.BatchNorm2d
    for mixed in (convert_cycle, convert_domain_specific):
        convert_ghost(mixed(model, 2, include="1"), 2, include="7")
        convert_to_batchnorm(model, domain=1)  # some have domains: nothing to say
    convert_to_batchnorm(convert_domain_specific(model, 2, population="shared"), domain=1)
