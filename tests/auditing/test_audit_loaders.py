"""Checks of loaders: what they show of mini-batches, and that nobody notices that they were looked at."""

import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, TensorDataset

from precisebn import freeze
from precisebn.auditing.finding import Finding
from precisebn.auditing.run import audit


def net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


def of(code: str, loader, model: nn.Module | None = None) -> list[Finding]:
    report = audit(net() if model is None else model, loader=loader)
    assert code not in report.not_run, report.not_run[code]
    return [finding for finding in report if finding.code == code]


def images(number: int, classes: int = 4, apart: float = 0.0) -> TensorDataset:
    """In the order of their classes, whose means are some standard deviations apart."""
    labels = torch.arange(number) * classes // number
    return TensorDataset(torch.randn(number, 3, 8, 8) + apart * labels.view(-1, 1, 1, 1), labels)


def test_a_last_mini_batch_of_one_sample():
    [finding] = of("PBN701", DataLoader(images(65), batch_size=8, shuffle=True))
    assert "drop_last=True" in finding.remedy
    assert of("PBN701", DataLoader(images(64), batch_size=8)) == []
    assert of("PBN701", DataLoader(images(66), batch_size=8)) == []
    assert of("PBN701", DataLoader(images(65), batch_size=8, drop_last=True)) == []
    assert of("PBN701", DataLoader(images(65), batch_size=8), freeze(net())) == []


def test_a_last_mini_batch_far_behind_those_that_are_looked_at():
    assert of("PBN701", DataLoader(images(1001), batch_size=2))


def test_a_list_of_mini_batches_that_ends_with_one_sample():
    assert of("PBN701", [torch.randn(4, 3, 8, 8), torch.randn(1, 3, 8, 8)])
    assert of("PBN701", [torch.randn(4, 3, 8, 8), torch.randn(2, 3, 8, 8)]) == []
    assert of("PBN701", [torch.randn(4, 3, 8, 8)] * 20 + [torch.randn(1, 3, 8, 8)])


def test_a_batch_sampler_of_the_users_own():
    data = images(33)
    sampler = BatchSampler(torch.utils.data.RandomSampler(data), batch_size=8, drop_last=False)
    assert of("PBN701", DataLoader(data, batch_sampler=sampler))


def test_a_loader_that_is_not_shuffled():
    [finding] = of("PBN703", DataLoader(images(400, classes=20), batch_size=4))
    assert finding.severity == "note"
    [finding] = of("PBN703", DataLoader(images(400, classes=2), batch_size=4))  # nothing but the first class is seen
    assert finding.severity == "warning"
    [finding] = of("PBN703", DataLoader(images(40, classes=1), batch_size=4))  # of few mini-batches, all are seen
    assert finding.severity == "note"
    assert of("PBN703", DataLoader(images(40), batch_size=40)) == []
    assert of("PBN703", DataLoader(images(400), batch_size=4, shuffle=True)) == []
    assert of("PBN703", [torch.randn(4, 3, 8, 8)] * 3) == []


def test_mini_batches_of_one_label():
    [finding] = of("PBN711", DataLoader(images(64, classes=8), batch_size=8))
    assert finding.severity == "warning"
    left_over = TensorDataset(torch.randn(65, 3, 8, 8), torch.arange(65) // 8)
    assert of("PBN711", DataLoader(left_over, batch_size=8))  # though the last mini-batch has one sample
    assert of("PBN711", DataLoader(images(64, classes=8), batch_size=8, shuffle=True)) == []
    assert of("PBN711", DataLoader(images(64, classes=1), batch_size=8)) == []


def test_labels_in_a_mapping():
    batches = [{"x": torch.randn(4, 3, 8, 8), "labels": torch.full((4,), label)} for label in range(4)]
    report = audit(net(), loader=batches, forward=lambda model, batch: model(batch["x"]))
    assert "PBN711" in [finding.code for finding in report]


def test_few_labels_in_every_mini_batch():
    """Four samples of each of four classes, of twenty, as metric learning draws them."""
    order = torch.cat([torch.randperm(20)[:4].repeat_interleave(4) for _ in range(12)])
    labelled = TensorDataset(torch.randn(len(order), 3, 8, 8), order)
    [finding] = of("PBN711", DataLoader(labelled, batch_size=16))
    assert finding.severity == "note"
    assert "hold 4.0 different labels" in finding.what
    assert of("PBN711", DataLoader(labelled, batch_size=16, shuffle=True)) == []


def test_samples_that_are_alike():
    clips = torch.randn(10, 1, 3, 1, 1) + 0.3 * torch.randn(10, 8, 3, 8, 8)  # 8 frames each
    frames = TensorDataset(clips.flatten(0, 1))
    [finding] = of("PBN712", DataLoader(frames, batch_size=8))
    assert finding.severity == "warning"
    assert of("PBN712", DataLoader(frames, batch_size=8, shuffle=True)) == []


def test_independent_samples_are_not_alike():
    for seed in range(20):
        torch.manual_seed(seed)
        assert of("PBN712", [torch.randn(4, 3, 4, 4) for _ in range(4)]) == []


# ---- The loader as it was --------------------------------------------------------------------------------------------


def drawn(loader) -> list[list[float]]:
    return [batch[0].flatten().tolist() for batch in loader]


@pytest.mark.parametrize("generator", [None, 5], ids=["global generator", "a generator of its own"])
def test_the_next_epoch_draws_what_it_would_have_drawn(generator):
    def make():
        torch.manual_seed(7)
        own = None if generator is None else torch.Generator().manual_seed(generator)
        return DataLoader(images(40), batch_size=4, shuffle=True, generator=own)

    model = net()
    expected = drawn(make())
    loader = make()
    audit(model, loader=loader)
    assert drawn(loader) == expected


class Augmented(Dataset):
    """Draws from a generator of its own, and counts."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(3)
        self.read = 0

    def __len__(self):
        return 12

    def __getitem__(self, index):
        self.read += 1
        return torch.randn(3, 8, 8, generator=self.generator)


def test_what_a_data_set_draws_and_counts():
    data = Augmented()
    before = data.generator.get_state()
    audit(net(), loader=DataLoader(data, batch_size=4))
    assert data.read == 0
    assert torch.equal(data.generator.get_state(), before)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(torch.randn(10, 3, 8, 8))


def test_a_stream_has_no_order_to_tell():
    report = audit(net(), loader=DataLoader(Stream(), batch_size=4))
    assert {"PBN701", "PBN703"}.isdisjoint(report.not_run)
    assert "PBN703" not in [finding.code for finding in report]


def test_an_iterator_is_not_used_up():
    batches = iter([torch.randn(4, 3, 8, 8)] * 3)
    report = audit(net(), loader=batches)
    assert "is an iterator" in report.not_run["PBN701"]
    assert "is an iterator" in report.not_run["PBN401"]  # nor taken for a mini-batch
    assert len(list(batches)) == 3


def test_workers_that_are_at_work_are_left_at_it():
    loader = DataLoader(images(16), batch_size=2, num_workers=1, persistent_workers=True)
    epoch = iter(loader)
    first = next(epoch)
    audit(net(), loader=loader)
    assert loader._iterator is epoch
    assert len(list(epoch)) == 7
    del first, epoch, loader


def test_a_loader_that_fails():
    class Broken(Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            raise OSError("no such file")

    report = audit(net(), loader=DataLoader(Broken()))
    assert "no such file" in report.not_run["PBN701"]
    assert "no mini-batch" in audit(net(), loader=[]).not_run["PBN701"]


@pytest.mark.parametrize("kept", [lambda: iter([torch.randn(3, 4, 4)] * 200), lambda: (torch.randn(3) for _ in "ab")])
def test_a_data_set_that_draws_from_an_iterator_which_it_keeps_is_left_alone(kept):
    class Stream(IterableDataset):
        def __init__(self):
            self.left = kept()

        def __iter__(self):
            return self.left

    stream = Stream()
    report = audit(nn.Sequential(nn.BatchNorm2d(3)), loader=DataLoader(stream, 4))
    assert "an audit would use up" in report.not_run["PBN701"]
    assert len(list(stream.left)) == len(list(kept()))
