"""Read raw tensors and settings from a path. Only tensors and plain containers are ever unpickled."""

from __future__ import annotations

import json
import stat
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from infvit.checkpoint import pickles
from infvit.errors import CheckpointError

TORCH_SUFFIXES = (".pt", ".pth", ".bin")
SAFETENSORS_SUFFIX = ".safetensors"
INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
# What Hugging Face's Trainer saves beside the weights.
_NOT_WEIGHTS = ("training_args.bin", "optimizer.*", "scheduler.*", "scaler.*", "rng_state*.pth")
MAX_JSON = 2**24
"""Bytes of a config or an index."""
_WRAPPERS = ("model", "state_dict", "model_state", "model_state_dict")
# DistributedDataParallel and torch.compile put these before every key.
_PREFIXES = ("module.", "_orig_mod.")


@dataclass(frozen=True)
class RawCheckpoint:
    """Contents of the files, before any interpretation.

    Attributes:
        tensors: as stored, names without the prefixes of DistributedDataParallel and torch.compile.
        config: the settings found in the file itself, if any.
        files: every file read.
        folder: where sidecar files are looked for.
    """

    tensors: dict[str, Tensor]
    config: dict[str, Any]
    files: tuple[Path, ...]
    folder: Path


def read_weights(path: Path) -> RawCheckpoint:
    """Read a weights file, or a folder with one (or one set of shards).

    Raises:
        CheckpointError: nothing there, several files to choose from, or a file that is no checkpoint.
    """
    with reading(path):
        is_folder = path.is_dir()
        if not is_folder and not path.is_file():
            raise CheckpointError(f"no checkpoint at {path}", "expected: a file or a folder")
        files = _weight_files(path) if is_folder else (path,)
    tensors: dict[str, Tensor] = {}
    config: dict[str, Any] = {}
    for file in files:
        if file.name in INDEX_FILES:
            continue
        shard, settings = _read_file(file)
        if twice := tensors.keys() & shard.keys():
            raise CheckpointError(f"tensor {min(twice)!r} is in several shards", f"received: {file}")
        tensors |= shard
        config |= settings
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors")
    return RawCheckpoint(_without_prefixes(tensors), config, files, path if is_folder else path.parent)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        CheckpointError: unreadable, too large, not JSON, or not an object.
    """
    with reading(path):
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_JSON:
            received = f"{status.st_size:,} bytes" if stat.S_ISREG(status.st_mode) else "no ordinary file"
            raise CheckpointError(f"cannot read {path}", f"received: {received}\nexpected: at most {MAX_JSON:,} bytes")
        text = path.read_bytes()
    return _json_object(text, str(path))


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals into a CheckpointError that names the file."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"cannot read {path}", error.strerror or str(error)) from error


def _weight_files(folder: Path) -> tuple[Path, ...]:
    names = sorted(item.name for item in folder.iterdir() if item.is_file())
    suffixes = (*TORCH_SUFFIXES, SAFETENSORS_SUFFIX)
    weights = [
        name
        for name in names
        if name.endswith(suffixes) and not any(fnmatchcase(name, pattern) for pattern in _NOT_WEIGHTS)
    ]
    for index in (index for index in INDEX_FILES if index in names):
        shards = _shards(folder / index)
        if missing := [name for name in shards if name not in names]:
            raise CheckpointError(f"{folder} lacks shards of {index}", f"missing: {', '.join(missing)}")
        if set(weights) == set(shards):
            return (folder / index, *(folder / name for name in shards))
    if not weights:
        raise CheckpointError(f"no weights in {folder}", f"expected: a file ending in {', '.join(suffixes)}")
    if len(weights) > 1:
        raise CheckpointError(
            f"several weight files in {folder}",
            f"received: {', '.join(weights)}",
            f"Give the file itself, such as {folder / weights[0]}; its config.json is read all the same.",
        )
    return (folder / weights[0],)


def _shards(index: Path) -> list[str]:
    """File names in a shard index; bare names only, so that an index cannot point elsewhere."""
    weight_map = read_json(index).get("weight_map")
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not names or not all(isinstance(name, str) and name == Path(name).name for name in names):
        raise CheckpointError(f"{index} is not a shard index", "expected: weight_map, of tensor to file name")
    return sorted(set(names))


def _read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and embedded config of one file."""
    if path.suffix == SAFETENSORS_SUFFIX:
        return _read_safetensors(path)
    if path.suffix in TORCH_SUFFIXES:
        return _unwrap(_torch_load(path), path)
    raise CheckpointError(
        f"{path} is not a checkpoint by its name",
        f"received: {path.suffix or 'no suffix'}\n"
        f"expected: {', '.join((*TORCH_SUFFIXES, SAFETENSORS_SUFFIX))}, or a folder",
    )


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with reading(path):
        path.open("rb").close()  # the library's own errors don't tell a missing permission from a bad file
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  not a mapping
            metadata = file.metadata() or {}
    except Exception as error:  # whatever a damaged file makes the library raise
        raise _damaged(path, "a safetensors file", error) from error
    config = metadata.get("config")
    return tensors, {} if config is None else _json_object(config, f"'config' in the metadata of {path}")


def _torch_load(path: Path) -> Any:
    with reading(path):
        path.open("rb").close()
    try:
        pickles.check(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols and TorchScript: said better below
            return torch.load(path, weights_only=True, map_location="cpu")
    except pickles.Refused as refused:
        raise CheckpointError(
            f"{path} holds Python objects, which are never loaded",
            f"received: {str(refused)[:200]}\nexpected: tensors, and dicts, lists, numbers and strings around them",
            "Save it again where it was made, with tensors only: torch.save(model.state_dict(), ...).",
        ) from refused
    except Exception as error:  # a damaged file makes the unpickler raise almost anything
        # torch's own text advises weights_only=False; it must not reach the user.
        raise _damaged(path, "a PyTorch checkpoint of tensors", error) from error


def _damaged(path: Path, expected: str, error: Exception) -> CheckpointError:
    reason = str(error).split(". ", 1)[0].split("\n", 1)[0][:200]
    return CheckpointError(f"{path} cannot be read as {expected}", f"{type(error).__name__}: {reason}")


def _unwrap(content: Any, path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State dict and embedded config out of the usual training wrappers."""
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{path} holds no state dict", f"received: {type(content).__name__}\nexpected: a dict of tensors"
        )
    config: dict[str, Any] = {}
    wrapped = [key for key in _WRAPPERS if isinstance(content.get(key), Mapping)]
    if len(wrapped) > 1:
        raise CheckpointError(
            f"{path} holds several state dicts", f"received: {', '.join(wrapped)}", "Save the one to deploy."
        )
    if wrapped:
        if isinstance(content.get("config"), Mapping):
            config = _as_json(content["config"], path)
        content = content[wrapped[0]]
    strange = [
        key[:120] if isinstance(key, str) else type(key).__name__
        for key, value in content.items()
        if not (type(key) is str and torch.is_tensor(value))
    ]
    if strange:
        raise CheckpointError(
            f"{path} holds no state dict",
            f"received: entries that are no tensors, {', '.join(strange[:8])}\n"
            f"expected: a dict of tensors, alone or under one of {', '.join(_WRAPPERS)}",
        )
    return dict(content), config


def _as_json(config: Any, path: Path) -> dict[str, Any]:
    """An embedded config as it would come out of a JSON file: string keys, lists, nothing else to compare."""
    name = f"the config in {path}"
    try:
        if _written_out(config, {}) > MAX_JSON:
            raise CheckpointError(f"{name} is too large", f"expected: at most {MAX_JSON:,} bytes as JSON")
        return _json_object(json.dumps(config, default=repr, skipkeys=True), name)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read the config in {path}", str(error)[:200]) from error


def _written_out(value: Any, known: dict[int, int]) -> int:
    """Return the size of a value written out: shared parts count at every use, but each is visited once."""
    if id(value) not in known:
        known[id(value)] = 0  # stays 0 if the value contains itself, which JSON refuses
        inside: Iterable[Any] = ()
        if isinstance(value, Mapping):
            inside = [*value, *value.values()]
        elif isinstance(value, list | tuple):
            inside = value
        own = len(value) if isinstance(value, str | bytes) else 1
        known[id(value)] = own + sum(_written_out(item, known) for item in inside)
    return known[id(value)]


def _without_prefixes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    while prefix := next((p for p in _PREFIXES if all(key.startswith(p) for key in tensors)), None):
        tensors = {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
    return tensors


def _json_object(text: str | bytes, name: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: not JSON, or not UTF-8
        raise CheckpointError(f"{name} is not JSON", str(error)[:200]) from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{name} is not a JSON object", f"received: {type(values).__name__}")
    return values
