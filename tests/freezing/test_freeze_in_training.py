"""freeze and pause_tracking in training runs of others: models of torchvision, timm and transformers, Lightning's loop.

Every run is made without the tool too, and there moves what the tool holds: so each of these tests can fail.
"""

import io
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import import_torchvision
from torch import Tensor, nn

from precisebn import accumulate_statistics, freeze, pause_tracking, trainable_parameters, update_bn_stats

pytestmark = pytest.mark.usefixtures("one_thread")

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def images(number: int = 4) -> Tensor:
    return 2 + 3 * torch.randn(number, 3, 32, 32)


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def moved(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


def inside(names: set[str], parts: tuple[str, ...]) -> set[str]:
    return {name for name in names if name.startswith(tuple(f"{part}." for part in parts))}


# ---- Models of others, in a loop by hand -----------------------------------------------------------------------------


def torchvision_resnet() -> nn.Module:
    return import_torchvision().models.resnet18(num_classes=4)


def torchvision_mobilenet() -> nn.Module:
    return import_torchvision().models.mobilenet_v3_small(num_classes=4)


def timm_efficientnet() -> nn.Module:
    """Of BatchNormAct2d."""
    import_torchvision()
    timm = pytest.importorskip("timm", reason="timm is not installed")
    return timm.create_model("efficientnet_lite0", num_classes=4)


def transformers_resnet() -> nn.Module:
    import_torchvision()
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=4
    )
    return transformers.ResNetForImageClassification(config)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "torchvision resnet18": (torchvision_resnet, ("conv1", "bn1", "layer1", "layer2")),
    "torchvision mobilenet_v3_small": (torchvision_mobilenet, ("features.0", "features.1")),
    "timm efficientnet_lite0": (timm_efficientnet, ("conv_stem", "bn1", "blocks.0", "blocks.1")),
    "transformers ResNet": (transformers_resnet, ("resnet.embedder", "resnet.encoder.stages.0")),
}


def logits(output: Any) -> Tensor:
    result: Tensor = output if isinstance(output, Tensor) else output.logits
    return result


def train(model: nn.Module, *, amp: bool = False, steps: int = 3) -> None:
    """As training loops do: modes change every epoch, the optimizer has all parameters, momentum and weight decay."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=0.1)
    scaler = torch.amp.GradScaler("cpu", enabled=amp)
    for _ in range(steps):
        model.train()
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=amp):
            loss = nn.functional.cross_entropy(logits(model(images())).float(), torch.arange(4))
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        model.eval()
        with torch.no_grad():
            model(images())


@pytest.mark.parametrize("amp", [False, True], ids=["float32", "autocast and GradScaler"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_frozen_parts_keep_their_bits_while_the_rest_trains(name, amp):
    build, parts = MODELS[name]
    torch.manual_seed(0)
    model = build()
    before = values(model)
    train(model, amp=amp)
    without = moved(model, before)
    assert {key for key in inside(set(before), parts) if key.endswith((*STATISTICS, "weight"))} <= without

    model.load_state_dict(before)
    freeze(model, *parts)
    train(model, amp=amp)
    assert moved(model, before) == without - inside(without, parts)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_gradients_off_and_eval_mode_alone_let_the_statistics_of_such_a_part_move(name):
    """The story behind, in the same runs; and what freezes statistics alone holds just these."""
    build, parts = MODELS[name]
    model = build()
    for key, module in model.named_modules():
        if inside({f"{key}."}, parts):
            module.requires_grad_(False).eval()
    before = values(model)
    train(model, steps=1)
    statistics = {key for key in inside(set(before), parts) if key.endswith(STATISTICS)}
    assert statistics <= inside(moved(model, before), parts)

    model.requires_grad_(True)
    freeze(model, *parts, affine=True)
    before = values(model)
    train(model, steps=1)
    after = moved(model, before)
    assert not after & statistics
    assert inside(after, parts)


@pytest.mark.parametrize("name", ["torchvision resnet18", "timm efficientnet_lite0", "transformers ResNet"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_run_that_goes_on_from_a_checkpoint_finds_frozen_parts_as_they_were(name):
    build, parts = MODELS[name]
    first = freeze(build(), *parts)
    begun = values(first)
    optimizer = torch.optim.AdamW(trainable_parameters(first, weight_decay=0.1), lr=0.01)
    logits(first.train()(images())).square().sum().backward()
    optimizer.step()
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)

    second = freeze(build(), *parts)
    again = torch.optim.AdamW(trainable_parameters(second, weight_decay=0.1), lr=0.01)
    checkpoint = torch.load(file, weights_only=True)
    second.load_state_dict(checkpoint["model"])
    again.load_state_dict(checkpoint["optimizer"])
    logits(second.train()(images())).square().sum().backward()
    again.step()
    assert not inside(moved(second, begun), parts)
    assert moved(second, checkpoint["model"])


# ---- Lightning -------------------------------------------------------------------------------------------------------


@pytest.fixture
def lightning() -> Iterator[ModuleType]:
    """Lightning, and its remarks on how fast a run is, which a test of a second is not after."""
    import_torchvision()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what it warns of while it is imported is its own affair
        module = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*GPU available but not used.*")
        warnings.filterwarnings("ignore", message=".*is smaller than the logging interval.*")
        warnings.filterwarnings("ignore", message=r".*module\(s\) in eval mode at the start of training.*")
        warnings.filterwarnings("ignore", category=DeprecationWarning, module="lightning.*")
        warnings.filterwarnings("ignore", category=FutureWarning, module="lightning.*")
        yield module


def fit(
    lightning: ModuleType,
    prepare: Callable[[nn.Module], object] = lambda net: None,
    second: Callable[[nn.Module, Tensor], object] = lambda net, x: None,
    **arguments: Any,
) -> tuple[nn.Module, dict[str, Tensor]]:
    """Two epochs of Lightning's loop, with validation between; the network, and what it was before."""

    class Classifier(lightning.LightningModule):  # type: ignore[name-defined]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            backbone = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
            head = nn.Sequential(nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
            self.net = nn.Sequential(backbone, head)
            prepare(self.net)

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
            second(self.net, batch[0])
            return loss

        def validation_step(self, batch: list[Tensor], index: int) -> None:
            assert not self.net[1][1].training
            self.net(batch[0])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(trainable_parameters(self), lr=0.1, momentum=0.9, weight_decay=0.1)

    module = Classifier()
    before = values(module.net)
    data = torch.utils.data.TensorDataset(images(16), torch.arange(16) % 4)
    loader = torch.utils.data.DataLoader(data, batch_size=4)
    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", enable_checkpointing=False, logger=False, enable_progress_bar=False,
        enable_model_summary=False, **arguments,
    )  # fmt: skip
    trainer.fit(module, loader, loader)
    return module.net, before


def test_lightning_trains_around_what_is_frozen(lightning):
    net, before = fit(lightning)
    assert moved(net, before) == set(before)
    net, before = fit(lightning, lambda net: freeze(net, "0"))
    assert moved(net, before) == {name for name in before if name.startswith("1.")}
    net, before = fit(lightning, lambda net: freeze(net, "0", affine=True), precision="bf16-mixed")
    assert set(before) - moved(net, before) == {f"0.1.{name}" for name in STATISTICS}


def by_hand(net: nn.Module) -> None:
    net[0].requires_grad_(False).eval()


def test_lightning_keeps_modes_over_its_validation_but_a_train_of_the_users_code_ends_eval_mode(lightning):
    """So in its loop gradients off and eval mode hold until something calls ``train()``; freeze holds then, too."""
    net, before = fit(lightning, by_hand)
    assert not inside(moved(net, before), ("0",))
    net, before = fit(lightning, by_hand, lambda net, x: net.train())
    assert inside(moved(net, before), ("0",)) == {f"0.1.{name}" for name in STATISTICS}
    net, before = fit(lightning, lambda net: freeze(net, "0"), lambda net, x: net.train())
    assert not inside(moved(net, before), ("0",))


def test_in_lightnings_loop_a_second_forward_is_paused(lightning):
    def paused(net: nn.Module, x: Tensor) -> None:
        with pause_tracking(net):
            net(x + 1)

    net, _ = fit(lightning, second=lambda net, x: net(x + 1))
    assert int(net[0][1].num_batches_tracked) == 16
    net, _ = fit(lightning, second=paused)
    alone, _ = fit(lightning)
    assert int(net[0][1].num_batches_tracked) == 8
    assert all(torch.equal(value, alone.state_dict()[name]) for name, value in net.state_dict().items())


# ---- All of it together ----------------------------------------------------------------------------------------------


def test_what_is_frozen_stays_so_through_accumulation_pauses_and_recalibration():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    freeze(model, "0", "1")
    before = values(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        with accumulate_statistics(model.train()):
            for _ in range(2):
                model(images()).square().mean().backward()
                with pause_tracking(model):
                    model(images())
        optimizer.step()
        update_bn_stats(model, [images()] * 2, None)
    assert moved(model, before) == {name for name in before if name.startswith(("2.", "3."))}
