"""Shipped checkpoints: their recorded training, and equal results in ONNX Runtime and PyTorch."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import train_canvases
import train_digits
from PIL import Image
from support import ZOO, relative_error

from infexport.bundle import open_bundle
from infexport.inference.centrality import centrality_from_tokens
from infexport.inference.runners.onnxruntime import OrtRunner
from infvit.checkpoint import build_network, load_checkpoint

REQUIRED = {"digits-linear": 0.985, "digits-pure": 0.975}


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    """Folder with every held-out digit as PNG, named by index, and the labels."""
    folder = tmp_path_factory.mktemp("held-out")
    _, _, images, labels = train_digits.digits()
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:03}.png")
    return folder, images, labels


@pytest.mark.parametrize("name", REQUIRED)
def test_every_held_out_digit(name, infexport, zoo_bundle, held_out, tmp_path):
    folder, images, labels = held_out
    infexport("run-engine", zoo_bundle(name), folder, "-o", tmp_path / "out.npz", "--batch-size", 64)
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


def test_shipped_pictures_are_held_out_digits(held_out):
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
    assert "not fine-tuned" in infexport(*convert, "--variant", "linear_infsa", "--no-fold").stderr


@pytest.mark.parametrize("name", ["digits-linear", "digits-pure", "digits-softmax", "canvases-linear", "canvases-pure"])
def test_every_checkpoint_says_how_it_was_trained(name):
    folder = ZOO / name
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md", "config.json", "model.safetensors", "training.json"
    ]  # fmt: skip
    facts = json.loads((folder / "training.json").read_text())
    accuracy = facts["held_out_accuracy"]
    for share in accuracy.values() if isinstance(accuracy, dict) else [accuracy]:
        assert f"{share:.2%}" in (folder / "README.md").read_text()
    assert (folder / "model.safetensors").stat().st_size < 4e6


@pytest.fixture(scope="module")
def canvas_files(tmp_path_factory):
    """Size → folder with every held-out canvas of that size, in a folder per class."""
    folder = tmp_path_factory.mktemp("canvases")

    def get(size):
        images, labels, _ = train_canvases.held_out(size)
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            file = folder / f"{size}" / f"{label}" / f"{i:03}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(file, compress_level=1)
        return folder / f"{size}"

    return get


@pytest.mark.parametrize("name", ["linear", "pure"])
def test_every_held_out_canvas(name, infexport, zoo_bundle, canvas_files):
    recorded = json.loads((ZOO / f"canvases-{name}" / "training.json").read_text())
    for size in (64, 128):
        arguments = (
            "validate",
            "accuracy",
            zoo_bundle(f"canvases-{name}"),
            canvas_files(size),
            "--no-pytorch",
            "--size",
            "native",
        )
        report = json.loads(infexport(*arguments, "--batch-size", 50, "--json").stdout)
        assert report["top1"]["share"] == pytest.approx(recorded["held_out_accuracy"][f"{size}"], abs=1e-4)
    assert recorded["held_out_accuracy"]["64"] >= 0.96
    assert recorded["held_out_accuracy"]["256"] >= {"linear": 0.96, "pure": 0.8}[name]


@pytest.mark.parametrize("name", ["linear", "pure"])
def test_centrality_lies_on_the_digit(name, zoo_bundle):
    bundle, patch = open_bundle(zoo_bundle(f"canvases-{name}")), train_canvases.PATCH
    with OrtRunner(bundle, "cpu", centrality=True) as runner:
        for size in train_canvases.SIZES:
            images, _, places = (array[:20] for array in train_canvases.held_out(size))
            found = runner.run(images)["centrality"]
            on_digit, brightest = [], 0
            for tokens, (top, left) in zip(found, places, strict=True):
                shares = centrality_from_tokens(tokens, (size // patch, size // patch)).shares.mean((0, 1))
                on_digit.append(shares[top : top + 3, left : left + 3].sum())
                row, column = np.unravel_index(shares.argmax(), shares.shape)
                brightest += top <= row < top + 3 and left <= column < left + 3
            assert np.mean(on_digit) >= {"linear": 0.75, "pure": 0.4}[name]
            assert brightest == 20


def test_shipped_canvases_are_held_out_and_where_the_table_says():
    folder = ZOO / "canvases-held-out"
    rows = list(csv.DictReader((folder / "canvases.csv").open()))
    assert [row["file"].partition("/")[0] for row in rows] == ["64"] * 10 + ["128"] * 10 + ["256"] * 2
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*.png")} == {row["file"] for row in rows}
    for row in rows:
        size, label, name = row["file"].split("/")
        images, labels, places = train_canvases.held_out(int(size))
        index = int(name.removesuffix(".png"))
        assert np.abs(np.asarray(Image.open(folder / row["file"]), int) - images[index]).max() <= 1
        assert row["label"] == label == str(labels[index])
        assert [int(row["top"]), int(row["left"])] == (places[index] * train_canvases.PATCH).tolist()
