"""The five stories behind this project, replayed on digits: each goes wrong without the tool, and does not with it.

docs/stories.md tells them. Every test runs one story both ways, and asks the check that finds it.
"""

import copy
import random
import re
from pathlib import Path

import processes
import pytest
import torch
from processes import Outcome, Result
from torch import Tensor, nn
from torch.nn import functional as F

from precisebn import (
    audit,
    check_copy,
    check_determinism,
    check_ranks,
    diff_state,
    freeze,
    merge_rank_statistics,
    pause_tracking,
    snapshot,
    trainable_parameters,
    update_bn_stats,
    watch_state,
)

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.timeout(120)]

PAGE = Path(__file__).parents[1] / "docs" / "stories.md"


def digits() -> tuple[Tensor, Tensor]:
    """1,437 images, (1, 8, 8), values from 0 to 1, and their labels."""
    data = pytest.importorskip("sklearn.datasets").load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))[:1437]
    return torch.tensor(data.images[order], dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(data.target[order])


def block(channels: int, features: int, stride: int = 2) -> nn.Sequential:
    conv = nn.Conv2d(channels, features, 3, stride, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(features), nn.ReLU())


def network() -> nn.Sequential:
    """``encoder`` of two blocks, ``middle`` of one, ``head``: (N, 1, 8, 8) to logits (N, 10)."""
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("encoder", nn.Sequential(block(1, 12, 1), block(12, 24)))
    model.add_module("middle", block(24, 24))
    model.add_module("head", nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10)))
    return model


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor, epochs: int = 1, size: int = 100
) -> None:
    """As training loops do: into training mode first."""
    model.train()
    for epoch in range(epochs):
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(epoch))
        for batch in order.split(size)[: len(labels) // size]:
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()


def sgd(model: nn.Module, lr: float = 0.2) -> torch.optim.Optimizer:
    return torch.optim.SGD(trainable_parameters(model), lr, momentum=0.9, weight_decay=1e-4)


@torch.no_grad()
def error_percent(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    return 100 * float((model(images).argmax(1) != labels).double().mean())


def trained(epochs: int = 4) -> nn.Sequential:
    model = network()
    train(model, sgd(model), *digits(), epochs)
    return model


def cross_entropy(output: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(output, batch[1])


# ---- 1. The frozen encoder that moved --------------------------------------------------------------------------------


@pytest.mark.parametrize("tool", [False, True])
def test_a_frozen_encoder_serves_its_first_task_after_a_second_head_was_trained(tool: bool) -> None:
    images, labels = digits()
    model = trained()
    first_head, before = copy.deepcopy(model[1:]), error_percent(model, images, labels)

    if tool:
        freeze(model, "encoder")
    else:
        model.encoder.requires_grad_(False).eval()
    model.train()  # the first line of every training loop
    found = audit(model, only="PBN1*")
    with watch_state(model.encoder) as watch:
        train(model, sgd(model), 3 - 2 * images, labels, epochs=2)  # the second task: inverted, brighter

    after = error_percent(nn.Sequential(model.encoder, first_head), images, labels)
    if tool:
        assert watch.diff.is_empty
        assert after == before
        assert "PBN101" not in found
    else:
        assert {row.kind for row in watch.diff.changed} == {"statistic"}
        assert before < 5
        assert after > 50
        assert "PBN101" in found


# ---- 2. no_grad in the middle ----------------------------------------------------------------------------------------


class WithoutGradients(nn.Module):
    """What is written where a part of a network is not to be trained."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.part(x)


@pytest.mark.parametrize("tool", [False, True])
def test_layers_before_a_part_that_is_not_trained_go_on_learning(tool: bool) -> None:
    images, labels = digits()
    model = network()
    if tool:
        freeze(model, "middle")
    else:
        model.middle = WithoutGradients(model.middle)
    batch = (images[:100], labels[:100])
    found = audit(model, batch, loss=cross_entropy, optimizer=sgd(model), ignore="PBN2*")
    with watch_state(model, kinds="parameter") as watch:
        train(model, sgd(model), images, labels, epochs=2)

    moved = {row.name.split(".")[0] for row in watch.diff.changed}
    if tool:
        assert moved == {"encoder", "head"}
        assert "PBN351" not in found
    else:
        assert moved == {"head"}  # half of the network does not learn, and nobody says a word
        assert any("middle" in finding.what or "middle" in str(finding.layers) for finding in found["PBN351"])


# ---- 3. Copies -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tool", [False, True])
def test_a_copied_optimizer_trains_the_copied_model(tool: bool) -> None:
    images, labels = digits()
    model = network()
    optimizer = sgd(model)
    train(model, optimizer, images, labels)

    if tool:
        twin, its_optimizer = copy.deepcopy((model, optimizer))  # together
    else:
        twin, its_optimizer = copy.deepcopy(model), copy.deepcopy(optimizer)
    found = check_copy(model, twin, optimizer=optimizer, copy_optimizer=its_optimizer)
    with watch_state(twin, kinds="parameter") as watch, watch_state(model) as original:
        train(twin, its_optimizer, images, labels)

    assert original.diff.is_empty
    if tool:
        assert not found
        train(model, optimizer, images, labels)
        assert diff_state(model, twin).is_empty  # it learns as the original does, to the last bit
    else:
        assert watch.diff.is_empty  # the copy of the optimizer steps copies of parameters, which are nobody's
        assert "PBN301" in found


def test_an_optimizer_that_trains_the_original_is_found() -> None:
    model = network()
    twin, optimizer = copy.deepcopy(model), sgd(model)
    assert "PBN301" in audit(twin, optimizer=optimizer)
    assert "PBN301" not in audit(twin, optimizer=sgd(twin))


@pytest.mark.parametrize("tool", [False, True])
def test_a_look_at_the_training_loss_does_not_part_two_identical_models(tool: bool) -> None:
    images, labels = digits()
    model = network()
    twin = copy.deepcopy(model)
    optimizers = sgd(model), sgd(twin)
    for of in range(2):
        train((model, twin)[of], optimizers[of], images, labels)
        twin.train()
        if tool:
            with pause_tracking(twin), torch.no_grad():
                twin(images[:200])
        else:
            with torch.no_grad():  # which holds gradients back, and no buffers
                twin(images[:200])
    assert diff_state(model, twin).is_empty == tool
    if not tool:
        assert {row.kind for row in diff_state(model, twin).changed} == {"statistic"}


@pytest.mark.parametrize("tool", [False, True])
def test_a_step_that_draws_from_a_generator_of_its_own_is_found(tool: bool) -> None:
    images, labels = digits()
    model = network()
    optimizer, own = sgd(model), random.Random(0)

    def step() -> Tensor:
        batch = torch.tensor((random if tool else own).sample(range(len(labels)), 64))
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images[batch]), labels[batch])
        loss.backward()
        optimizer.step()
        return loss

    before = snapshot(model)
    assert check_determinism(step, model=model, optimizer=optimizer).deterministic == tool
    assert diff_state(before, model).is_empty
    assert check_determinism(step, model=model, optimizer=optimizer, restore=[own]).deterministic


def test_a_mini_batch_of_one_sample_is_found() -> None:
    images, labels = digits()
    one, many = ((images[:n], labels[:n]) for n in (1, 64))
    assert "PBN412" in audit(network(), one, loss=cross_entropy)
    assert "PBN412" not in audit(network(), many, loss=cross_entropy)


# ---- 4. Ranks --------------------------------------------------------------------------------------------------------


def ranks_save(rank: int, world: int) -> Result:
    """Each rank trains on its own digits, as without SyncBatchNorm, and looks at what it would save."""
    images, labels = digits()
    own = (labels < 5) if rank == 0 else (labels >= 5)
    model = nn.parallel.DistributedDataParallel(network())
    train(model, sgd(model), images[own][:700], labels[own][:700])
    result: Result = {"trained": check_ranks(model).equal}
    merge_rank_statistics(model)
    result["merged"] = check_ranks(model).equal
    result["error merged"] = error_percent(model, images, labels)
    update_bn_stats(model.train(), [images[own]], None)
    result["measured"] = check_ranks(model).equal
    result["statistics"] = model.module.encoder[0][1].running_mean.clone()
    return result


def test_ranks_save_the_same_statistics(tmp_path: Path) -> None:
    processes.skip_without_gloo()
    pytest.importorskip("sklearn.datasets")
    outcomes = Outcome([ranks_save], 2, tmp_path).of(ranks_save)
    assert [one["trained"] for one in outcomes] == [False, False]
    assert [one["merged"] for one in outcomes] == [True, True]
    assert [one["measured"] for one in outcomes] == [True, True]
    assert torch.equal(outcomes[0]["statistics"], outcomes[1]["statistics"])


# ---- 5. Train and eval disagree --------------------------------------------------------------------------------------


def test_train_and_eval_agree_once_the_statistics_are_those_of_the_weights() -> None:
    images, labels = digits()
    model = network()
    train(model, sgd(model, lr=0.5), images, labels, epochs=3)  # large steps, which moving averages cannot follow
    batch = images[:350], labels[:350]

    def errors() -> tuple[float, float]:
        with pause_tracking(model), torch.no_grad():
            training = 100 * float((model.train()(images).argmax(1) != labels).double().mean())
        return training, error_percent(model, images, labels)

    training, evaluation = errors()
    assert evaluation > training + 15
    assert "PBN252" in audit(model.train(), batch, loss=cross_entropy)

    update_bn_stats(model, images.split(100), None)
    training, evaluation = errors()
    assert abs(evaluation - training) < 3
    assert not {"PBN251", "PBN252"} & {one.code for one in audit(model.train(), batch, loss=cross_entropy)}


# ---- The page --------------------------------------------------------------------------------------------------------


def test_the_code_of_the_page_runs() -> None:
    torch.manual_seed(0)
    namespace: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert len(blocks) >= 5
    for code in blocks:
        exec(compile(code, "docs/stories.md", "exec"), namespace)
