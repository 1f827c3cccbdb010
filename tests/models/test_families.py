"""What is known of layers by the forward that they run: one table, and what follows from it."""

import copy
import warnings

import pytest
import torch
from conftest import import_torchvision, values_of
from pretended import APEX, DETECTRON2, pretend
from torch import Tensor, nn

from precisebn import audit, update_bn_stats
from precisebn.models import families
from precisebn.models.families import Family, family_of, is_batch_norm, normalizes_its_input
from precisebn.nn import (
    BatchStatBN,
    ConcatSharedBN,
    CycleBatchNormList,
    DomainSpecificBN,
    FrozenBatchNorm1d,
    FrozenBatchNorm2d,
    FrozenBatchNorm3d,
    GhostBN,
    SyncBN,
)

pytestmark = pytest.mark.usefixtures("one_thread")

ACT = ("drop", "act")


def timm_layer(name: str) -> nn.Module:
    import_torchvision()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layers = pytest.importorskip("timm.layers", reason="timm is not installed")
    return vars(layers)[name](3)


def torchvision_frozen() -> nn.Module:
    return import_torchvision().ops.FrozenBatchNorm2d(3)


def transformers_frozen() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        detr = pytest.importorskip("transformers.models.detr.modeling_detr", reason="transformers is not installed")
    return detr.DetrFrozenBatchNorm2d(3)


KNOWN = {
    "BatchNorm1d": (lambda: nn.BatchNorm1d(3), Family()),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(3), Family()),
    "BatchNorm3d": (lambda: nn.BatchNorm3d(3), Family()),
    "LazyBatchNorm2d": (nn.LazyBatchNorm2d, Family()),
    "SyncBatchNorm": (lambda: nn.SyncBatchNorm(3), Family(synchronized=True)),
    "FrozenBatchNorm1d": (lambda: FrozenBatchNorm1d(3), Family(frozen=True)),
    "FrozenBatchNorm2d": (lambda: FrozenBatchNorm2d(3), Family(frozen=True)),
    "FrozenBatchNorm3d": (lambda: FrozenBatchNorm3d(3), Family(frozen=True)),
    "BatchStatBN": (lambda: BatchStatBN(3), Family(normalizes_input=False)),
    "ConcatSharedBN": (lambda: ConcatSharedBN(3), Family(normalizes_input=False)),
    "CycleBatchNormList": (lambda: CycleBatchNormList(2, num_features=3), Family(normalizes_input=False)),
    "DomainSpecificBN": (lambda: DomainSpecificBN(3, 2), Family(normalizes_input=False)),
    "GhostBN": (lambda: GhostBN(3, 2), Family(normalizes_input=False)),
    "SyncBN": (lambda: SyncBN(3), Family(normalizes_input=False, synchronized=True)),
    "torchvision frozen": (torchvision_frozen, Family(frozen=True)),
    "transformers frozen": (transformers_frozen, Family(frozen=True)),
    "timm": (lambda: timm_layer("BatchNormAct2d"), Family(tail=ACT)),
    "timm sync": (lambda: timm_layer("SyncBatchNormAct"), Family(synchronized=True, tail=ACT)),
    "timm frozen": (lambda: timm_layer("FrozenBatchNormAct2d"), Family(frozen=True, tail=ACT)),
    "detectron2 sync": (lambda: DETECTRON2.NaiveSyncBatchNorm(3), Family(synchronized=True)),
    "detectron2 frozen": (lambda: DETECTRON2.FrozenBatchNorm2d(3), Family(frozen=True)),
    "apex": (lambda: APEX.SyncBatchNorm(3), Family(synchronized=True)),
}


@pytest.mark.parametrize("name", KNOWN)
def test_every_known_class(name):
    build, family = KNOWN[name]
    layer = build()
    assert family_of(layer) == family
    ours_or_torchs = isinstance(layer, nn.modules.batchnorm._NormBase)
    assert is_batch_norm(layer) == ours_or_torchs
    subclass = type("Subclass", (type(layer),), {})
    assert families.class_family(subclass.__new__(subclass)) == family


@pytest.mark.parametrize("module", ["timm.layers.norm_act", "timm.models.layers.norm_act"])
def test_timms_layer_is_known_wherever_a_version_keeps_it(module):
    """Recordings and conversions had lists of their own, which said so of one of the two places each."""
    older = pretend(
        module,
        """
class BatchNormAct2d(nn.BatchNorm2d):
    def __init__(self, num_features):
        super().__init__(num_features)
        self.drop, self.act = nn.Identity(), nn.ReLU()

    def forward(self, x):
        return self.act(self.drop(F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.eps)))
""",
    )
    assert family_of(older.BatchNormAct2d(3)) == Family(tail=ACT)
    assert normalizes_its_input(older.BatchNormAct2d(3))


class OwnForward(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input[:1])


def patched() -> nn.Module:
    layer = nn.BatchNorm2d(3)
    layer.forward = lambda x: x
    return layer


UNKNOWN = {
    "a forward of its own": lambda: OwnForward(3),
    "a forward put on the instance": patched,
    "timm split": lambda: timm_layer("SplitBatchNorm2d"),
    "apex with an activation": lambda: APEX.SyncBatchNorm(3, fuse_relu=True),
    "apex with channels last": lambda: APEX.SyncBatchNorm(3, channel_last=True),
    "no normalization at all": lambda: nn.ReLU(),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_of_what_runs_another_forward_nothing_is_known(name):
    layer = UNKNOWN[name]()
    assert family_of(layer) is None
    assert not normalizes_its_input(layer)


@pytest.mark.parametrize("build", [lambda: DETECTRON2.NaiveSyncBatchNorm(3), lambda: APEX.SyncBatchNorm(3)])
def test_layers_of_other_libraries_are_recorded_from_their_input(build):
    """Conversions knew them; recordings did not, and read their statistics back in float32."""
    torch.manual_seed(0)
    batches = [torch.randn(4, 3, 5, 5, dtype=torch.float64) * 3 + 1 for _ in range(3)]
    layer, plain = build().double(), nn.BatchNorm2d(3).double()
    plain.load_state_dict(layer.state_dict())
    update_bn_stats(nn.Sequential(layer), batches, 3)
    update_bn_stats(nn.Sequential(plain), batches, 3)
    assert values_of(layer) == values_of(plain)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")
def test_quantized_layers_keep_their_statistics_and_are_no_batch_norm():
    """They are of nn.BatchNorm's class, and in training mode, as every module that is new."""
    quantized = pytest.importorskip("torch.ao.nn.quantized")
    layer = quantized.BatchNorm2d(3)
    assert isinstance(layer, nn.modules.batchnorm._BatchNorm)
    assert layer.training
    assert not families.is_batch_norm(layer)
    assert not families.is_norm_with_statistics(layer)
    assert list(audit(nn.Sequential(layer).eval().append(quantized.BatchNorm2d(3)))) == []
    with pytest.warns(UserWarning, match="has no BatchNorm layer, so nothing was recalibrated; .* quantized"):
        update_bn_stats(nn.Sequential(layer), [], None)


def test_the_table_knows_no_instance():
    """What is said of a class is not changed by what has been put on one of its layers."""
    layer = copy.deepcopy(patched())
    assert families.class_family(layer) == Family()
    assert family_of(nn.BatchNorm2d(3)) == Family()
