"""The shipped checkpoints: trained as they say, and the same answers in ONNX Runtime as in PyTorch."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support import ZOO, relative_error

from infvit.checkpoint import build_network, load_checkpoint

REQUIRED = {"digits-linear": 0.985, "digits-pure": 0.975}


@pytest.fixture(scope="module")
def held_out(train_digits, tmp_path_factory):
    """A folder with every held-out digit as PNG, named by index, and their labels."""
    folder = tmp_path_factory.mktemp("held-out")
    _, _, images, labels = train_digits.digits()
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:03}.png")
    return folder, images, labels


@pytest.mark.parametrize("name", REQUIRED)
def test_every_held_out_digit(name, infexport, train_digits, held_out, tmp_path):
    folder, images, labels = held_out
    infexport("convert", "checkpoint", ZOO / name, "-o", tmp_path / "b")
    infexport("run-engine", tmp_path / "b", folder, "-o", tmp_path / "out.npz", "--batch-size", 64)
    with np.load(tmp_path / "out.npz") as arrays:
        assert [Path(file).stem for file in arrays["files"]] == [f"{i:03}" for i in range(len(images))]
        logits = arrays["logits"]
    accuracy = (logits.argmax(-1) == labels).mean()
    recorded = json.loads((ZOO / name / "training.json").read_text())
    assert accuracy >= REQUIRED[name]
    assert accuracy == pytest.approx(recorded["held_out_accuracy"], abs=1e-4)
    assert recorded["held_out_images"] == len(images) == 450

    network = build_network(load_checkpoint(ZOO / name)).double()
    with torch.no_grad():
        truth = network(train_digits.normalise(torch.from_numpy(images)).double()).numpy()
    assert (logits.argmax(-1) == truth.argmax(-1)).all()
    assert relative_error(logits, truth) <= 5e-6


def test_shipped_pictures_are_held_out_digits(train_digits, held_out):
    _, images, labels = held_out
    pictures = sorted((ZOO / "digits-held-out").glob("*.png"))
    assert len(pictures) == 20
    for picture in pictures:
        same = (images == np.asarray(Image.open(picture))).all((1, 2, 3))
        assert str(labels[same][0]) == picture.name[0]


def test_the_softmax_twin_converts_with_a_warning(infexport, tmp_path):
    assert json.loads((ZOO / "digits-softmax" / "training.json").read_text())["held_out_accuracy"] >= 0.97
    convert = ("convert", "checkpoint", ZOO / "digits-softmax", "-o", tmp_path / "b")
    assert "--variant" in infexport(*convert, exit_code=2).stderr
    assert "not fine-tuned" in infexport(*convert, "--variant", "linear_infsa").stderr


@pytest.mark.parametrize("name", ["digits-linear", "digits-pure", "digits-softmax"])
def test_every_checkpoint_says_how_it_was_trained(name):
    folder = ZOO / name
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md", "config.json", "model.safetensors", "training.json"
    ]  # fmt: skip
    facts = json.loads((folder / "training.json").read_text())
    assert f"{facts['held_out_accuracy']:.2%}" in (folder / "README.md").read_text()
    assert facts["seconds_on_2_cores"] < 180
    assert (folder / "model.safetensors").stat().st_size < 4e6
