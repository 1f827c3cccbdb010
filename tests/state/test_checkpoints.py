"""Checkpoints as sides of a comparison: which part is the model, what formats are read, how much memory that takes."""

import argparse
import contextlib
import copy
import json
import subprocess
import sys
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from precisebn import InputError, diff_state, snapshot
from precisebn.state import mapped

pytestmark = pytest.mark.usefixtures("one_thread")


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())


def save(state: Any, path: Path) -> Path:
    if path.suffix == ".safetensors":
        pytest.importorskip("safetensors.torch").save_file(state, path)
    elif path.suffix == ".pth":  # the format of torch before 1.6
        torch.save(state, path, _use_new_zipfile_serialization=False)
    else:
        torch.save(state, path)
    return path


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors", ".bin"])
@pytest.mark.parametrize("as_text", [False, True])
def test_every_format_against_a_model_and_against_itself(suffix, as_text, tmp_path):
    model = network()
    path = save(model.state_dict(), tmp_path / f"before{suffix}")
    model(torch.randn(2, 3, 8, 8))
    later = save(model.state_dict(), tmp_path / f"after{suffix}")
    first, second = (str(path), str(later)) if as_text else (path, later)
    for after in (model, second):
        diff = diff_state(first, after)
        assert diff.counts() == {"parameter": {"unchanged": 4}, "statistic": {"changed": 3}}
        units = {row.name.rpartition("_")[2]: row.unit for row in diff.changed}
        assert units == {"mean": "std", "var": "log", "tracked": ""}
    assert diff_state(second, model).is_empty


def test_safetensors_and_torch_files_meet(tmp_path):
    state = network().state_dict()
    assert diff_state(save(state, tmp_path / "a.pt"), save(state, tmp_path / "a.safetensors")).is_empty


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model"])
def test_the_model_inside_of_a_checkpoint(key, tmp_path):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    checkpoint = {"epoch": 3, key: copy.deepcopy(model.state_dict()), "optimizer": optimizer.state_dict()}
    for side in (checkpoint, save(checkpoint, tmp_path / "last.ckpt")):
        diff = diff_state(side, model)
        assert diff.is_empty
        assert diff.notes == (f"before is a checkpoint, whose {key!r} was compared; not looked at: 'optimizer'",)


def test_which_part_is_taken_where_there_are_several():
    model, average = network(), network()
    checkpoint = {"model": copy.deepcopy(average.state_dict()), "state_dict": copy.deepcopy(model.state_dict())}
    assert diff_state(checkpoint, model).is_empty
    assert diff_state(checkpoint["model"], average).is_empty
    whole = {"model": model, "epoch": 1}  # a module, as torch.save(model) leaves it
    assert diff_state(whole, snapshot(model)).is_empty


def test_a_state_dict_whose_first_component_is_called_model_is_a_state_dict():
    model = nn.ModuleDict({"model": nn.Linear(2, 2)})
    assert diff_state(copy.deepcopy(model.state_dict()), model).is_empty


def test_shared_and_expanded_tensors_of_a_file(tmp_path):
    weight = torch.randn(4, 2)
    path = save({"a": weight, "b": weight, "c": torch.ones(1).expand(6)}, tmp_path / "shared.pt")
    diff = diff_state(path, {"a": weight, "b": weight, "c": torch.ones(6)})
    assert diff.is_empty
    assert diff.rows[0].shared_with == ("b",)


def test_an_optimizer_file_and_a_single_tensor_and_a_list(tmp_path):
    model = network()
    optimizer = torch.optim.AdamW(model.parameters())
    path = save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    assert diff_state(path, optimizer.state_dict()).is_empty
    one = save(torch.ones(3), tmp_path / "one.pt")
    assert diff_state(one, one).is_empty
    several = save([torch.ones(3), torch.zeros(2)], tmp_path / "several.pt")
    assert [row.name for row in diff_state(several, several).rows] == ["0", "1"]


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_the_index_of_several_files(suffix, tmp_path):
    model = network()
    state = model.state_dict()
    parts = {f"part-1{suffix}": list(state)[:4], f"part-2{suffix}": list(state)[4:]}
    for name, keys in parts.items():
        save({key: state[key] for key in keys}, tmp_path / name)
    index = tmp_path / f"model{suffix}.index.json"
    index.write_text(json.dumps({"weight_map": {key: name for name, keys in parts.items() for key in keys}}))
    assert diff_state(index, model).is_empty
    model[1].running_mean += 1
    [row] = diff_state(index, model).changed
    assert (row.kind, row.unit) == ("statistic", "std")
    (tmp_path / "bad.index.json").write_text("{}")
    with pytest.raises(InputError, match="no index of checkpoint files: it has no 'weight_map'"):
        diff_state(tmp_path / "bad.index.json", model)


@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.bool, torch.float8_e4m3fn, torch.complex64],
)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_dtypes_of_files(dtype, suffix, tmp_path):
    state = {"odd": torch.ones(3, dtype=torch.uint8), "x": (torch.arange(7) % 2).to(dtype)}
    other = {
        **state,
        "x": (torch.arange(7) % 2 + torch.tensor([0] * 6 + [1])).to(torch.bool if dtype is torch.bool else dtype),
    }
    first, second = save(state, tmp_path / f"a{suffix}"), save(other, tmp_path / f"b{suffix}")
    assert diff_state(first, state).is_empty
    [row] = diff_state(first, second).changed
    assert (row.name, row.num_changed, row.max_abs) == ("x", 1, 1.0)
    assert row.dtype_before == row.dtype_after == str(dtype).removeprefix("torch.")


# ---- Errors ----------------------------------------------------------------------------------------------------------


def test_files_that_are_not_there(tmp_path):
    save({"a": torch.ones(1)}, tmp_path / "model_best.pt")
    with pytest.raises(InputError, match=r"after: there is no file .*model_bset\.pt'; did you mean 'model_best\.pt'\?"):
        diff_state({}, tmp_path / "model_bset.pt")
    with pytest.raises(InputError, match=r"there is no file '/nowhere/at/all\.pt'$"):
        diff_state("/nowhere/at/all.pt", {})
    with pytest.raises(InputError, match=r"is a folder; name a file in it: model_best\.pt"):
        diff_state(tmp_path, {})


@pytest.mark.parametrize("content", [b"", b"hello world, this is text", b"\x80\x02garbage", b"PK\x03\x04broken"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_files_that_are_no_checkpoints(content, suffix, tmp_path):
    path = tmp_path / f"notes{suffix}"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"before='.*notes.*' is no (checkpoint|file) of .*, or is damaged: "):
        diff_state(path, {})


def test_a_file_that_was_cut_short(tmp_path):
    for suffix in (".pt", ".pth", ".safetensors"):
        path = save({"a": torch.randn(1000)}, tmp_path / f"cut{suffix}")
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(InputError, match="damaged"):
            diff_state(path, {})


def test_a_file_that_would_run_code_is_refused_with_a_remedy(tmp_path):
    path = save({"state_dict": network().state_dict(), "args": argparse.Namespace(lr=1)}, tmp_path / "old.pt")
    with pytest.raises(InputError, match=r"holds more than tensors \(argparse\.Namespace, .*weights_only=False\)"):
        diff_state(path, {})
    checkpoint = torch.load(path, weights_only=False)  # the remedy
    assert diff_state(checkpoint, copy.deepcopy(checkpoint["state_dict"])).is_empty


def test_torchscript_archives_are_pointed_to_torch_jit(tmp_path):
    path = tmp_path / "scripted.pt"
    torch.jit.script(nn.Linear(2, 2)).save(path)
    with pytest.raises(InputError, match=r"TorchScript archive: compare torch\.jit\.load"):
        diff_state(path, {})
    loaded = torch.jit.load(path)
    assert diff_state(loaded, copy.deepcopy(loaded.state_dict())).is_empty


def test_without_safetensors_the_extra_is_named(tmp_path, monkeypatch):
    path = save({"a": torch.ones(1)}, tmp_path / "a.safetensors")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"precisebn\[state\]"):
        diff_state(path, {})


# ---- Memory ----------------------------------------------------------------------------------------------------------

MEASURE = """
import sys, torch
from precisebn import diff_state

def kib(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field))

small, *paths = sys.argv[1:]
diff_state(small, small)  # what is loaded once
before = kib("VmRSS")
diff = diff_state(*paths)
print(kib("VmHWM") - before, len(diff.changed), diff.rows[0].max_abs)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux how much memory the process has")
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_memory_does_not_grow_with_the_files(suffix, tmp_path):
    """Two files of 128 MiB, of which every value differs, in less than 96 MiB: pieces of 16 MiB, float64 of 1 MiB."""
    small = save({"a": torch.ones(9)}, tmp_path / f"small{suffix}")
    state = {f"{i}.weight": torch.ones(1 << 24) for i in range(2)}
    first = save(state, tmp_path / f"a{suffix}")
    second = save({key: value.mul_(1.5) for key, value in state.items()}, tmp_path / f"b{suffix}")
    script = [sys.executable, "-c", MEASURE, str(small), str(first), str(second)]
    done = subprocess.run(script, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    kib, changed, largest = done.stdout.split()
    assert (changed, largest) == ("2", "0.5")
    assert int(kib) < 96 << 10


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere nothing is given back")
def test_pages_are_given_back_of_the_file_alone(tmp_path):
    """What is released is read from the file again; memory that is no part of it is left alone."""
    values = torch.arange(1 << 16, dtype=torch.float32)
    path = save({"a": values}, tmp_path / "a.pt")
    loaded = torch.load(path, mmap=True, weights_only=True)["a"]
    release = mapped.releaser(path)
    assert release is not None
    for tensor in (loaded, loaded[3:7], values, loaded[::2], loaded[:0]):
        release(tensor)
    assert torch.equal(values, torch.arange(1 << 16, dtype=torch.float32))
    assert torch.equal(loaded, values)
    assert mapped.releaser(tmp_path / "not mapped.pt") is None


def test_a_users_own_mapped_and_changed_tensors_keep_their_changes(tmp_path):
    path = save({"a": torch.zeros(1 << 14)}, tmp_path / "a.pt")
    loaded: dict[str, Tensor] = torch.load(path, mmap=True, weights_only=True)
    loaded["a"].add_(1)  # in this process's copy of the page
    [row] = diff_state(path, loaded).changed
    assert row.max_abs == 1
    assert loaded["a"].min() == 1


@pytest.mark.parametrize("content", ['{"weight_map": {"a": 3}}', '{"weight_map": {"a": "x.index.json"}}'])
def test_an_index_that_leads_nowhere(content, tmp_path):
    (tmp_path / "x.index.json").write_text(content)
    with pytest.raises(InputError, match="index"):
        diff_state(tmp_path / "x.index.json", {})


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"hello world this is",
        b"\x89PNG\r\n\x1a\n0000",
        b"\x1f\x8b\x08\x00",
        b"root:x:0:0:root",
        b"(R\xf4GKKJ",
        b"JX",
    ],
)
def test_a_file_of_another_kind_is_refused_without_advice_on_torch_load(content, tmp_path):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(InputError, match="or is damaged") as refused:
        diff_state(tmp_path / "x.pt", {})
    assert "documentation" not in str(refused.value)
    assert str(refused.value)[-1].isalpha()
    assert "index out of range" not in str(refused.value)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_damaged_file_is_compared_or_refused(zipped, tmp_path):
    """Whatever torch makes of a byte that has changed."""
    path, random = tmp_path / "a.pt", Random(0)
    values = {"weight": torch.randn(4), "running_mean": torch.zeros(2), "count": torch.tensor(3)}
    torch.save(values, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    for _ in range(150):
        damaged = bytearray(whole)
        damaged[random.randrange(min(len(whole), 900))] = random.randrange(256)
        path.write_bytes(damaged)
        with contextlib.suppress(InputError):
            diff_state(path, values)
