"""All golden models through the command line: PNG in, npz out, compared with float64 reference values."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support import GOLDEN, MODELS, relative_error

from infexport.conversion.convert import ConvertOptions, read_checkpoint


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_the_reference_packages(name, infexport, golden_bundle, golden_images, tmp_path):
    folder, io = golden_images(name)
    output = tmp_path / "out.npz"
    infexport("run-engine", golden_bundle(name), folder, "--output", output, "--features", "--batch-size", 2)

    with np.load(output) as arrays:
        assert [file.rsplit("/", 1)[-1] for file in arrays["files"]] == ["0.png", "1.png", "2.png"]
        assert relative_error(arrays["logits"], io["logits_f64"]) <= 5e-6
        assert arrays["features"].shape == (3, 64)


def pickled(name: str, folder: Path) -> Path:
    torch.save(load_file(GOLDEN / f"{name}.safetensors"), folder / f"{name}.pth")
    return folder / f"{name}.pth"


@pytest.mark.parametrize("name", MODELS)
def test_a_pickle_is_the_same_checkpoint(name, tmp_path):
    """Names, dtypes and values of tensors are all that a conversion reads from a file."""
    options, file = ConvertOptions(config_file=GOLDEN / f"{name}.json"), pickled(name, tmp_path)
    found, expected = (read_checkpoint(path, options) for path in (file, GOLDEN / f"{name}.safetensors"))
    assert found.state_dict.keys() == expected.state_dict.keys()
    for key, tensor in expected.state_dict.items():
        assert found.state_dict[key].dtype == tensor.dtype, key
        assert torch.equal(found.state_dict[key], tensor), key
    assert found.files == (file,)
    others = {"state_dict": {}, "files": ()}
    assert dataclasses.replace(found, **others) == dataclasses.replace(expected, **others)


@pytest.mark.parametrize("name", ["reference_linear", "transformers4_wrapped_pure"])
def test_a_pickle_becomes_the_same_bundle(name, infexport, golden_bundle, tmp_path):
    arguments = (pickled(name, tmp_path), "--config", GOLDEN / f"{name}.json", "--output", tmp_path / "bundle")
    infexport("convert", "checkpoint", *arguments)
    for file in ("model.onnx", "model.onnx.data", "centrality.onnx"):
        assert (tmp_path / "bundle" / file).read_bytes() == (golden_bundle(name) / file).read_bytes(), file


def test_there_are_ten():
    assert len(MODELS) == 10
