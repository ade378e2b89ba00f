"""`validate parity`: its verdict, its measurements, and that it can fail."""

import json
import shutil

import onnx
import pytest
import torch
from onnx import numpy_helper
from safetensors.torch import load_file, save_file
from support import GOLDEN, MODELS

from infvit.config import InfViTConfig
from infvit.network import InfViT

COMPARED = (
    "the bundle with infexport's own PyTorch network, with the checkpoint's weights; "
    "not with the code that trained them"
)


@pytest.mark.parametrize("name", MODELS)
def test_holds_at_every_size(name, infexport, golden_bundle):
    sizes = "32,48,224,16x40,72x8"
    report = json.loads(infexport("validate", "parity", golden_bundle(name), "--sizes", sizes, "--json").stdout)
    assert report["passed"] is True
    assert report["verified"] is True
    assert [case["name"] for case in report["cases"]] == ["32x32", "48x48", "224x224", "16x40", "72x8"]
    for case in report["cases"]:
        assert case["bundle"]["relative"] <= 5e-6
        assert case["bundle"]["top1_agreement"] == 1
        assert case["shape"][0] == 3
    assert report["compared"] == COMPARED
    assert report["tolerance"]["relative"] == pytest.approx(32 * 2**-23 * 2**0.5)


def test_images_are_compared_at_native_resolution(infexport, golden_bundle, golden_images):
    folder, _ = golden_images("torchvision_pure")
    result = infexport("validate", "parity", golden_bundle("torchvision_pure"), "--images", folder)
    assert result.stdout.count(" ok") == 3
    assert "parity holds" in result.stdout
    assert f"compared: {COMPARED}" in result.stdout.splitlines()


def test_an_image_that_cannot_be_read_is_reported(infexport, golden_bundle, golden_images, tmp_path):
    folder, _ = golden_images("torchvision_pure")
    shutil.copy(folder / "0.png", tmp_path / "0.png")
    (tmp_path / "1.png").write_text("no image")
    arguments = ("validate", "parity", golden_bundle("torchvision_pure"), "--images", tmp_path, "--json")
    report = json.loads(infexport(*arguments, exit_code=1).stdout)
    assert [case["bundle"]["passed"] for case in report["cases"]] == [True]
    assert [failure["file"] for failure in report["failed"]] == [str(tmp_path / "1.png")]
    assert report["passed"] is False


def test_a_fine_tuned_checkpoint_judges_a_bundle_made_of_a_softmax_one(infexport, golden_bundle, tmp_path):
    bundle = golden_bundle("timm_softmax_linear")
    torch.manual_seed(0)
    network = InfViT(InfViTConfig(**json.loads((bundle / "infexport.json").read_text())["config"]))
    save_file(network.state_dict(), tmp_path / "tuned.safetensors")
    arguments = ("validate", "parity", bundle, "--sizes", "32", "--checkpoint", tmp_path / "tuned.safetensors")
    assert "FAILED" in infexport(*arguments, exit_code=1).stdout


def changed(bundle, tmp_path, factor):
    """Make a copy of the bundle with one weight of the graph scaled."""
    shutil.copytree(bundle, tmp_path / "changed")
    model = onnx.load(tmp_path / "changed" / "model.onnx")
    tensor = next(t for t in model.graph.initializer if t.name.endswith("head.weight"))
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * factor, tensor.name))
    onnx.save(model, tmp_path / "changed" / "model.onnx")
    return tmp_path / "changed"


def test_a_changed_graph_is_no(infexport, golden_bundle, tmp_path):
    bundle = changed(golden_bundle("reference_linear"), tmp_path, 1.0001)
    assert "was modified" in infexport("validate", "parity", bundle, "--sizes", "32", exit_code=2).stderr
    result = infexport("validate", "parity", bundle, "--sizes", "32", "--no-verify", exit_code=1)
    assert "parity FAILED" in result.stdout
    assert "unverified" in result.stdout


def test_another_checkpoint_is_judged(infexport, golden_bundle, tmp_path):
    bundle = golden_bundle("reference_linear")
    state = load_file(GOLDEN / "reference_linear.safetensors")
    arguments = ("validate", "parity", bundle, "--sizes", "32", "--checkpoint")
    torch.save({"model": state}, tmp_path / "same.pth")
    infexport(*arguments, tmp_path / "same.pth")
    state["head.bias"] = state["head.bias"] + 0.01
    save_file(state, tmp_path / "other.safetensors")
    assert "FAILED" in infexport(*arguments, tmp_path / "other.safetensors", exit_code=1).stdout
    pure = GOLDEN / "torchvision_pure.safetensors"
    assert "of another network" in infexport(*arguments, pure, exit_code=2).stderr


@pytest.mark.slow
def test_the_recorded_checkpoint_must_be_what_it_was(infexport, tmp_path):
    checkpoint = tmp_path / "model.safetensors"
    shutil.copy(GOLDEN / "reference_linear.safetensors", checkpoint)
    config = GOLDEN / "reference_linear.json"
    infexport("convert", "checkpoint", checkpoint, "--config", config, "--no-fold", "-o", tmp_path / "b")
    arguments = ("validate", "parity", tmp_path / "b", "--sizes", "32")
    infexport(*arguments)
    state = load_file(checkpoint)
    state["head.bias"] += 1
    save_file(state, checkpoint)
    result = infexport(*arguments, exit_code=2)
    assert "has changed" in result.stderr
    assert "--checkpoint" in result.stderr
    checkpoint.unlink()
    assert "--checkpoint" in infexport(*arguments, exit_code=2).stderr


def test_wrong_sizes(infexport, golden_bundle):
    arguments = ("validate", "parity", golden_bundle("reference_linear"), "--sizes")
    assert "for example --sizes 32x40" in infexport(*arguments, "33x40", exit_code=2).stderr
    assert "is not a size" in infexport(*arguments, "large", exit_code=2).stderr
