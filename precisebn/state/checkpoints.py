"""State dicts and checkpoint files as one side of a comparison: which part of them is the model, and lazy reading."""

import json
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from precisebn.errors import InputError
from precisebn.state.entries import Entry, State, entries_of, mark_statistics
from precisebn.state.mapped import releaser
from precisebn.state.snapshot import state_of_model

__all__ = ["CHOSEN", "state_of_file", "state_of_mapping"]

CHOSEN = ("state_dict", "model_state_dict", "model")
"""Keys under which training scripts keep the model in a checkpoint; the first that is there is taken."""


def state_of_mapping(values: Mapping[Any, Any], name: str, source: str = "") -> State:
    """A state dict, or the one inside a checkpoint; ``source`` is how a user gets at it, by default as ``name``.

    A mapping with a tensor among its own values is a state dict. Of others, the mapping or module under the first of
    :data:`CHOSEN` is the model; without one, everything counts, by path.
    """
    source = source or name
    if not any(isinstance(value, Tensor) for value in values.values()):
        key = next((key for key in CHOSEN if isinstance(values.get(key), Mapping | nn.Module)), None)
        if key is not None:
            inside = values[key]
            state = state_of_model(inside) if isinstance(inside, nn.Module) else State(entries_of(inside))
            others = [str(other) for other, value in values.items() if other != key and isinstance(value, Mapping)]
            also = f"; not looked at: {', '.join(map(repr, others))}" if others else ""
            state.source = f"{source}[{key!r}]" + (".state_dict()" if isinstance(inside, nn.Module) else "")
            state.notes.append(f"{name} is a checkpoint, whose {key!r} was compared{also}")
            return state
    inside = frozenset(str(key) for key, value in values.items() if isinstance(value, Mapping))
    return State(entries_of(values), source=source, inside=inside)


def state_of_file(path: Path, name: str) -> State:
    """A checkpoint file: of torch.save (read with ``weights_only=True``), of safetensors, or the index of several.

    Raises:
        InputError: no such file; a file of another kind; one that holds more than tensors.
    """
    if not path.is_file():
        raise InputError(_missing(path, name))
    if path.name.endswith(".index.json"):
        return _of_index(path, name)
    with path.open("rb") as file:
        start = file.read(10)
    if path.suffix == ".safetensors" or (start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 1 << 30):
        return _of_safetensors(path, name)
    return _of_torch(path, name)


_ENDINGS = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".index.json")


def _missing(path: Path, name: str) -> str:
    if path.is_dir():
        found = sorted(p.name for p in path.iterdir() if p.name.endswith(_ENDINGS))
        return f"{name}={str(path)!r} is a folder; name a file in it" + (f": {', '.join(found[:6])}" if found else "")
    near = get_close_matches(path.name, [p.name for p in path.parent.iterdir()]) if path.parent.is_dir() else []
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
    return f"{name}: there is no file {str(path)!r}{hint}"


# ---- torch.save ------------------------------------------------------------------------------------------------------


def _of_torch(path: Path, name: str) -> State:
    mapped = zipfile.is_zipfile(path)  # what torch before 1.6 wrote is none, and can only be read wholly
    shown = f"{name}={str(path)!r}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old formats: what they ask for is nothing that a reader can do
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # of what it reads in a damaged file torch makes nearly any
        if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error):
            raise InputError(_refused(shown, error)) from error
        if "TorchScript" in str(error):
            raise InputError(f"{shown} is a TorchScript archive: compare torch.jit.load({str(path)!r})") from error
        why = _first_sentence(error)
        raise InputError(f"{shown} is no checkpoint of torch.save or safetensors, or is damaged: {why}") from error
    if isinstance(found, Tensor):
        found = {"": found}
    if not isinstance(found, Mapping):
        found = dict(enumerate(found)) if isinstance(found, list | tuple) else {"": found}
    state = state_of_mapping(found, name, f"torch.load({name}, weights_only=True)")
    state.release = releaser(path) if mapped else None
    return state


def _first_sentence(error: Exception) -> str:
    """What torch says, without its advice; what pickle says of bytes that are none is of no use."""
    said = isinstance(error, RuntimeError | OSError | EOFError | ValueError)
    text = str(error).strip().partition(". ")[0] if said else ""
    return text or "it is no pickle of tensors"


def _refused(shown: str, error: Exception) -> str:
    what = re.search(r"GLOBAL ([\w.]+)", str(error))
    holds = f"{what[1]}, " if what else ""
    return (
        f"{shown} holds more than tensors ({holds}which could run code when it is loaded), so torch.load with "
        f"weights_only=True refuses it. If you trust the file, load it yourself and pass what you get: "
        f"torch.load(path, weights_only=False); or allow the class: torch.serialization.add_safe_globals"
    )


# ---- safetensors -----------------------------------------------------------------------------------------------------


def _of_safetensors(path: Path, name: str) -> State:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError(
            f"{name}={str(path)!r} takes safetensors to read: pip install safetensors, or install precisebn with the "
            "extra that brings it, precisebn[state]"
        ) from error
    try:
        file: Any = safe_open(path, framework="pt")
        names = list(file.keys())
    except SafetensorError as error:
        raise InputError(f"{name}={str(path)!r} is no file of safetensors, or is damaged: {error}") from error
    entries = {key: Entry(_InFile(file, key), _kind_in(file, key), names=[key]) for key in names}
    mark_statistics(entries)
    state = State(entries, source=f"safetensors.torch.load_file({name})")
    if names:
        file.get_tensor(names[0])  # the file is mapped when the first tensor is asked for
        state.release = releaser(path)
    return state


class _InFile:
    """Gives a tensor of an open file."""

    def __init__(self, file: Any, key: str) -> None:
        self.file, self.key = file, key

    def __call__(self) -> Tensor:
        tensor: Tensor = self.file.get_tensor(self.key)
        return tensor


def _kind_in(file: Any, key: str) -> str:
    return "parameter" if file.get_slice(key).get_dtype().startswith(("F", "BF", "C")) else "buffer"


# ---- Several files ---------------------------------------------------------------------------------------------------


def _of_index(path: Path, name: str) -> State:
    """The files that an index lists, as transformers writes it: ``{"weight_map": {name: file}}``."""
    try:
        files = sorted({os.fspath(file) for file in json.loads(path.read_text())["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{name}={str(path)!r} is no index of checkpoint files: it has no 'weight_map' of names to files"
        ) from error
    if nested := [file for file in files if file.endswith(".index.json")]:
        raise InputError(f"{name}={str(path)!r} leads to another index, {nested[0]!r}, and not to checkpoint files")
    parts = [state_of_file(path.parent / file, name) for file in files]
    entries = {key: entry for part in parts for key, entry in part.entries.items()}
    mark_statistics(entries)  # a layer may lie in two files
    releases = [part.release for part in parts if part.release is not None]

    def release(piece: Tensor) -> None:
        for of_one in releases:
            of_one(piece)

    return State(entries, notes=[note for part in parts for note in part.notes], release=release)
