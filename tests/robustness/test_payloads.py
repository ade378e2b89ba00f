"""Code is planted wherever a file could carry it; none of it runs."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from support import GOLDEN

from infexport.bundle import seal
from infexport.bundle.manifest import read_manifest
from infexport.inference.streaming.driver import Position
from infexport.inference.streaming.resume import STATE, Identity, Scratch
from infexport.system.progress import SILENT

CHECKPOINT, CONFIG = GOLDEN / "reference_linear.safetensors", GOLDEN / "reference_linear.json"
CONVERT = ("--config", CONFIG, "-o")


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> Any:
        return open, (self.marker, "w")


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """The file; that the payload would make it is tried."""
    file = tmp_path / "ran"
    pickle.loads(pickle.dumps(Payload(file))).close()
    assert file.exists()
    file.unlink()
    return file


@pytest.fixture
def state() -> dict[str, Any]:
    return load_file(CHECKPOINT)


class Key(str):
    """A name that is more than one."""

    __slots__ = ()

    def __reduce__(self) -> Any:
        return open, (str(self), "w")


CONTENTS: dict[str, Callable[[dict[str, Any], Path], Any]] = {
    "a tensor": lambda state, marker: state | {"head.bias": Payload(marker)},
    "one more": lambda state, marker: state | {"x": Payload(marker)},
    "all": lambda state, marker: Payload(marker),
    "a name": lambda state, marker: state | {Key(marker): torch.zeros(1)},
    "the config": lambda state, marker: {"model": state, "config": Payload(marker)},
    "in the config": lambda state, marker: {"model": state, "config": {"a": [{"b": (Payload(marker),)}]}},
    "beside the model": lambda state, marker: {"model": state, "optimizer": Payload(marker)},
    "a list": lambda state, marker: [state, Payload(marker)],
}


@pytest.mark.parametrize("name", ["model.pth", "model.pt", "model.bin", "legacy.pth", "model.safetensors"])
@pytest.mark.parametrize("where", CONTENTS)
def test_in_a_checkpoint(where, name, state, marker, tmp_path, infexport):
    content = CONTENTS[where](state, marker)
    torch.save(content, tmp_path / name, _use_new_zipfile_serialization="legacy" not in name)
    told = infexport("convert", "checkpoint", tmp_path / name, *CONVERT, tmp_path / "b", exit_code=2).stderr
    assert not marker.exists()
    assert ("never loaded" in told) == (name != "model.safetensors"), told


def folder_of(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(CHECKPOINT, folder / "model.safetensors")
    shutil.copy(CONFIG, folder / "config.json")
    return folder


@pytest.mark.parametrize(
    "name", ["training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "x.pkl", "__init__.py"]
)
def test_beside_the_weights_it_is_not_even_read(name, marker, tmp_path):
    from infexport.conversion.convert import ConvertOptions, read_checkpoint

    folder = folder_of(tmp_path)
    (folder / name).write_bytes(pickle.dumps(Payload(marker)))
    read_checkpoint(folder, ConvertOptions())
    assert not marker.exists()


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "model.safetensors.index.json"])
def test_in_place_of_text(name, marker, tmp_path, infexport):
    folder = folder_of(tmp_path)
    (folder / name).write_bytes(pickle.dumps(Payload(marker)))
    infexport("convert", "checkpoint", folder, "-o", tmp_path / "b", exit_code=2)
    assert not marker.exists()


def test_in_one_of_several_files(state, marker, tmp_path, infexport):
    folder = folder_of(tmp_path)
    (folder / "model.safetensors").unlink()
    names = {key: f"pytorch_model-{index}.bin" for key, index in zip(state, [1, 2] * len(state), strict=False)}
    for file in set(names.values()):
        torch.save({key: state[key] for key in state if names[key] == file}, folder / file)
    torch.save({"x": Payload(marker)}, folder / "pytorch_model-2.bin")
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))
    told = infexport("convert", "checkpoint", folder, "-o", tmp_path / "b", exit_code=2).stderr
    assert "never loaded" in told
    assert not marker.exists()


def test_as_labels(marker, tmp_path, infexport):
    (tmp_path / "labels").write_bytes(pickle.dumps(Payload(marker)))
    options = (*CONVERT, tmp_path / "b", "--labels", tmp_path / "labels")
    infexport("convert", "checkpoint", CHECKPOINT, *options, exit_code=2)
    assert not marker.exists()


@pytest.mark.parametrize(
    "name", ["infexport.json", "labels.json", "model.onnx", "model.onnx.data", "stream-00-start.onnx"]
)
@pytest.mark.parametrize("consistent", [False, True], ids=["changed", "made anew"])
def test_in_a_bundle(name, consistent, zoo_bundle, marker, tmp_path, cli_result):
    bundle = shutil.copytree(zoo_bundle("digits-linear"), tmp_path / "b")
    manifest = read_manifest(bundle / "infexport.json")
    (bundle / name).write_bytes(pickle.dumps(Payload(marker)))
    if consistent and name != "infexport.json":
        (bundle / "infexport.json").unlink()
        seal(bundle, manifest)
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    for options in ((), ("--size", "native", "--execution", "stream")):
        result = cli_result("run-engine", bundle, tmp_path / "a.png", *options)
        # a graph of the other way is not loaded, and weights are numbers, whatever they are
        unnoticed = consistent and name.startswith(("model", "stream"))
        assert result.exit_code in ((0, 1, 2) if unnoticed else (2,)), result.stderr
        assert not marker.exists()


@pytest.mark.parametrize("suffix", [".png", ".tif", ".npy", ".svg", ".eps"])
def test_in_an_image(suffix, golden_bundle, marker, tmp_path, infexport):
    file = tmp_path / f"a{suffix}"
    file.write_bytes(pickle.dumps(Payload(marker)))
    if suffix == ".npy":
        np.save(file, np.array([Payload(marker)], object))
    if suffix == ".eps":
        file.write_text(f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n({marker}) (w) file closefile showpage\n")
    for options in ((), ("--size", "native", "--execution", "stream")):
        infexport("run-engine", golden_bundle("reference_linear"), file, *options, exit_code=1)
    assert not marker.exists()


def test_in_what_an_interrupted_run_left(marker, tmp_path):
    """Arrays of objects are pickles."""
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    identity = Identity([tmp_path / "a.png"], {})
    hidden = np.array([Payload(marker)], object)
    for content in ({"at": np.array([0, 1]), "sums/x": hidden}, {"at": hidden}):
        with suppress(KeyboardInterrupt), Scratch(tmp_path, identity, SILENT) as left:
            left.record(Position())
            raise KeyboardInterrupt
        made = io.BytesIO()
        np.savez(made, **content)
        (left.folder / STATE).write_bytes(hashlib.sha256(made.getvalue()).digest() + made.getvalue())
        with Scratch(tmp_path, identity, SILENT) as scratch:
            assert scratch.folder == left.folder
            assert scratch.position is None
    assert not marker.exists()
