"""All golden models through the command line: PNG in, npz out, against the reference package's float64."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support import GOLDEN, MODELS, relative_error


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_the_reference_packages(name, suffix, infexport, golden_bundle, golden_images, tmp_path):
    folder, io = golden_images(name)
    bundle, output = tmp_path / "bundle", tmp_path / "out.npz"
    if suffix == ".pth":
        checkpoint = tmp_path / f"{name}.pth"
        torch.save(load_file(GOLDEN / f"{name}.safetensors"), checkpoint)
        infexport("convert", "checkpoint", checkpoint, "--config", GOLDEN / f"{name}.json", "--output", bundle)
    else:
        bundle = golden_bundle(name)
    infexport("run-engine", bundle, folder, "--output", output, "--features", "--batch-size", 2)

    with np.load(output) as arrays:
        assert [file.rsplit("/", 1)[-1] for file in arrays["files"]] == ["0.png", "1.png", "2.png"]
        assert relative_error(arrays["logits"], io["logits_f64"]) <= 5e-6
        assert arrays["features"].shape == (3, 64)


def test_there_are_ten():
    assert len(MODELS) == 10
