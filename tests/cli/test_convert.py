"""`convert checkpoint`: its bundles, messages and errors."""

import json
import os
import pickle
import shutil
import stat
import subprocess
import sys

import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import GOLDEN

pytestmark = pytest.mark.slow

CHECKPOINT = GOLDEN / "torchvision_linear.safetensors"
COMPLETE = ("--variant", "linear_infsa", "--num-heads", "4")
QUICK = (*COMPLETE, "--no-fold")
"""Convert without stages, which take half of the time, in tests of something else."""
PURE = ("--variant", "pure_infsa", "--num-heads", "4")


def test_makes_a_whole_bundle(golden_bundle):
    bundle = golden_bundle("torchvision_linear")
    manifest = json.loads((bundle / "infexport.json").read_text())
    graphs = [stage["graph"] for stage in manifest["stages"]]
    files = {"infexport.json", "model.onnx", "model.onnx.data", "centrality.onnx", *graphs}
    assert {path.name for path in bundle.iterdir()} == files
    assert manifest["config"]["num_heads"] == 4
    assert manifest["assumed"]["mean"] == [0.485, 0.456, 0.406]
    assert manifest["finetuned"] is True
    assert set(manifest["files"]) == files - {"infexport.json"}
    assert [graph.rpartition("-")[2] for graph in graphs][:4] == [
        "start.onnx",
        "embed.onnx",
        "score.onnx",
        "apply.onnx",
    ]
    model = onnx.load(bundle / "model.onnx", load_external_data=False)
    assert {node.op_type for node in model.graph.node if node.domain == "infsa"} == {"LinearInfSAStateUpdate"}
    assert [(function.domain, function.name) for function in model.functions] == [("infsa", "LinearInfSAStateUpdate")]
    onnx.checker.check_model(bundle / "model.onnx", full_check=True)
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)


def test_says_what_it_assumed_and_prints_json(infexport, tmp_path):
    result = infexport("convert", "checkpoint", CHECKPOINT, *QUICK, "-o", tmp_path / "b", "--json")
    assert json.loads(result.stdout)["verified"] is True
    for name in ("norm eps", "mean", "std", "interpolation"):
        assert f"assumed {name}" in result.stderr


def test_warns_of_a_softmax_checkpoint(infexport, tmp_path):
    config = GOLDEN / "timm_softmax_linear.json"
    bundle = tmp_path / "b"
    result = infexport(
        "convert", "checkpoint", GOLDEN / "timm_softmax_linear.safetensors", "--config", config, "-o", bundle
    )
    assert "not fine-tuned" in result.stderr
    assert json.loads((bundle / "infexport.json").read_text())["finetuned"] is False
    assert "not fine-tuned" in infexport("inspect", bundle).stderr
    assert "not fine-tuned" in infexport("build-engine", bundle, "--target", "a100").stderr
    assert "not fine-tuned" in infexport("validate", "parity", bundle, "--sizes", "32").stderr


def test_rho_of_a_softmax_checkpoint_can_be_given(infexport, tmp_path):
    """Parity compares with the same discount rho."""
    checkpoint = GOLDEN / "timm_softmax_pure.safetensors"
    arguments = ("--variant", "pure_infsa", "--num-heads", 4, "--rho", 0.5)
    infexport("convert", "checkpoint", checkpoint, *arguments, "-o", tmp_path / "b")
    infexport("validate", "parity", tmp_path / "b", "--sizes", "32")
    manifest = json.loads((tmp_path / "b" / "infexport.json").read_text())
    assert manifest["rho"] == 0.5


def test_float32_input(infexport, golden_bundle, golden_images):
    import onnxruntime
    from support import relative_error

    bundle = golden_bundle("reference_linear", "--input", "float32")
    _, io = golden_images("reference_linear")
    session = onnxruntime.InferenceSession(bundle / "model.onnx")
    (logits,) = session.run(["logits"], {"pixels": io["pixels"]})
    assert relative_error(logits, io["logits_f64"]) <= 5e-6
    infexport("validate", "parity", bundle, "--sizes", "32,16x48")


def test_neumann_terms(infexport, golden_bundle):
    bundle = golden_bundle("torchvision_pure", "--neumann-terms", "3")
    manifest = json.loads((bundle / "infexport.json").read_text())
    assert manifest["config"]["neumann_terms"] == 3
    assert 0 < manifest["neumann"]["a_posteriori_bound"] <= manifest["neumann"]["a_priori_bound"]
    infexport("validate", "parity", bundle, "--sizes", "32")


def test_neumann_tolerance(infexport, tmp_path):
    arguments = (GOLDEN / "reference_pure.safetensors", "--config", GOLDEN / "reference_pure.json", "--no-fold")
    infexport("convert", "checkpoint", *arguments, "--neumann-tol", 0.01, "-o", tmp_path / "tol")
    neumann = json.loads((tmp_path / "tol" / "infexport.json").read_text())["neumann"]
    assert neumann["terms"] >= 30
    assert 0 < neumann["a_posteriori_bound"] < 1e-6
    assert neumann["a_priori_bound"] <= 0.01


@pytest.mark.parametrize("name", ["torchvision_linear", "torchvision_pure"])
def test_without_folding(name, infexport, golden_bundle, golden_images, tmp_path):
    """A graph that computes all tokens in the last layer gives the same logits."""
    import numpy as np
    from support import relative_error

    folder, io = golden_images(name)
    for folded, options in ((True, ()), (False, ("--no-fold",))):
        bundle, output = golden_bundle(name, *options), tmp_path / f"{folded}.npz"
        infexport("run-engine", bundle, folder, "-o", output)
        assert relative_error(np.load(output)["logits"], io["logits_f64"]) <= 5e-6
        assert json.loads((bundle / "infexport.json").read_text())["folded"] is folded
        # input of the final norm: the class token alone, or every token
        graph = onnx.load(bundle / "model.onnx", load_external_data=False).graph
        final = [node.input[0] for node in graph.node if node.op_type == "LayerNormalization"][-1]
        (tokens,) = (value.type.tensor_type.shape.dim[1] for value in graph.value_info if value.name == final)
        assert (tokens.dim_value == 1) is folded


def test_what_is_said(tmp_path):
    """The exporter's optimisers print nothing, in a separate process without a logging configuration."""
    command = [sys.executable, "-m", "infexport", "convert", "checkpoint", CHECKPOINT, *COMPLETE, "-o", tmp_path / "b"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    said = [line.split()[0] for line in done.stderr.splitlines()]
    assert said[:3] == ["reading", "exporting", "hashing"]
    assert set(said[3:]) <= {"assumed", "warning:"}


def test_labels_from_lines(infexport, tmp_path):
    labels = tmp_path / "labels.txt"
    labels.write_text("".join(f"class {i}\n" for i in range(10)))
    infexport("convert", "checkpoint", CHECKPOINT, *QUICK, "--labels", labels, "-o", tmp_path / "b")
    assert json.loads((tmp_path / "b" / "labels.json").read_text())[3] == "class 3"
    labels.write_text("only one\n")
    result = infexport(
        "convert", "checkpoint", CHECKPOINT, *COMPLETE, "--labels", labels, "-o", tmp_path / "c", exit_code=2
    )
    assert "received 1 labels, expected 10" in result.stderr


def test_an_output_is_replaced_only_with_force(infexport, golden_bundle, tmp_path):
    shutil.copytree(golden_bundle("torchvision_linear"), tmp_path / "b")
    before = (tmp_path / "b" / "infexport.json").stat().st_ino
    result = infexport("convert", "checkpoint", CHECKPOINT, *COMPLETE, "-o", tmp_path / "b", exit_code=2)
    assert "--force" in result.stderr
    assert (tmp_path / "b" / "infexport.json").stat().st_ino == before
    infexport("convert", "checkpoint", CHECKPOINT, *COMPLETE, "--fold", "-o", tmp_path / "b", "--force")
    assert (tmp_path / "b" / "infexport.json").stat().st_ino != before
    assert json.loads((tmp_path / "b" / "infexport.json").read_text())["folded"] is True
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_a_folder_that_is_no_bundle_is_never_replaced(infexport, tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.tex").write_text("years of work")
    arguments = ("convert", "checkpoint", CHECKPOINT, *COMPLETE, "-o", tmp_path / "precious", "--force")
    assert "is no bundle" in infexport(*arguments, exit_code=2).stderr
    assert (tmp_path / "precious" / "thesis.tex").read_text() == "years of work"


class Code:
    """A pickle that runs a command when it is loaded without restrictions."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def bad_checkpoints(folder):
    """Name → (checkpoint, arguments, words that the message must contain)."""
    tensors = load_file(CHECKPOINT)
    (folder / "truncated.safetensors").write_bytes(CHECKPOINT.read_bytes()[:10_000])
    torch.save(tensors, folder / "whole.pth")
    (folder / "truncated.pth").write_bytes((folder / "whole.pth").read_bytes()[:10_000])
    (folder / "code.pth").write_bytes(pickle.dumps({"model": Code(folder / "marker")}))
    torch.save({"model": tensors, "hook": Code(folder / "marker")}, folder / "code-zip.pth")
    (folder / "text.pth").write_text("these are not weights\n")
    (folder / "empty.pth").touch()
    resnet = {"conv1.weight": torch.zeros(64, 3, 7, 7), "layer1.0.conv1.weight": torch.zeros(64, 64, 3, 3)}
    save_file(resnet, folder / "resnet.safetensors")
    (folder / "empty-folder").mkdir()
    return {
        "no head count": (CHECKPOINT, ("--variant", "linear_infsa"), "--num-heads"),
        "no variant": (CHECKPOINT, ("--num-heads", "4"), "--variant"),
        "wrong variant": (CHECKPOINT, ("--variant", "quadratic", "--num-heads", "4"), "linear_infsa"),
        "heads that don't divide": (CHECKPOINT, ("--variant", "linear_infsa", "--num-heads", "7"), "divi"),
        "wrong layout": (CHECKPOINT, (*COMPLETE, "--layout", "timm"), "torchvision"),
        "unknown layout": (CHECKPOINT, (*COMPLETE, "--layout", "keras"), "torchvision"),
        "truncated safetensors": (folder / "truncated.safetensors", COMPLETE, "truncated"),
        "truncated pth": (folder / "truncated.pth", COMPLETE, "truncated"),
        "pickle with code": (folder / "code.pth", COMPLETE, "code.pth"),
        "zipped pickle with code": (folder / "code-zip.pth", COMPLETE, "code-zip.pth"),
        "text called pth": (folder / "text.pth", COMPLETE, "text.pth"),
        "empty file": (folder / "empty.pth", COMPLETE, "empty"),
        "another family": (folder / "resnet.safetensors", COMPLETE, "layout"),
        "empty folder": (folder / "empty-folder", COMPLETE, "empty-folder"),
        "missing": (folder / "nowhere.pth", COMPLETE, "nowhere.pth"),
        "tolerance for linear": (CHECKPOINT, (*COMPLETE, "--neumann-tol", "1e-3"), "pure_infsa"),
        "rho of a learned one": (CHECKPOINT, (*COMPLETE, "--rho", "0.9"), "--rho"),
        "infinite tolerance": (GOLDEN / "reference_pure.safetensors", (*PURE, "--neumann-tol", "inf"), "--neumann-tol"),
        "no spread": (CHECKPOINT, (*COMPLETE, "--std", "0,1,1"), "above 0"),
        "mean that is no number": (CHECKPOINT, (*COMPLETE, "--mean", "nan,0,0"), "three numbers"),
        "bad mean": (CHECKPOINT, (*COMPLETE, "--mean", "0.5,0.5"), "three numbers"),
        "terms and tolerance": (CHECKPOINT, (*COMPLETE, "--neumann-terms", "2", "--neumann-tol", "0.1"), "give one"),
    }


CASES = (
    "no head count", "no variant", "wrong variant", "heads that don't divide", "wrong layout", "unknown layout",
    "truncated safetensors", "truncated pth", "pickle with code", "zipped pickle with code", "text called pth",
    "empty file", "another family", "empty folder", "missing", "tolerance for linear", "rho of a learned one",
    "bad mean", "terms and tolerance", "infinite tolerance", "no spread", "mean that is no number",
)  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_error_with_a_hint(case, infexport, tmp_path):
    cases = bad_checkpoints(tmp_path)
    assert set(cases) == set(CASES)
    checkpoint, arguments, words = cases[case]
    (tmp_path / "out").mkdir()
    result = infexport("convert", "checkpoint", checkpoint, *arguments, "-o", tmp_path / "out" / "b", exit_code=2)
    message = result.stderr
    assert words in message
    assert sum(line.startswith(("error:", "Error:")) for line in message.splitlines()) == 1
    assert "Traceback" not in message
    assert "hint:" in message or "Usage:" in message
    assert result.stdout == ""
    assert list((tmp_path / "out").iterdir()) == []
    assert not (tmp_path / "marker").exists()


def test_an_unwritable_output(infexport, tmp_path):
    (tmp_path / "file").write_text("in the way")
    arguments = ("convert", "checkpoint", CHECKPOINT, *COMPLETE, "-o", tmp_path / "file" / "b")
    result = infexport(*arguments, exit_code=2)
    assert "file" in result.stderr
    assert "hint:" in result.stderr


def test_an_output_that_may_not_be_written(infexport, golden_bundle, tmp_path):
    golden_bundle("torchvision_linear")  # imports now what an ordinary user may not read in this environment
    (tmp_path / "locked").mkdir(mode=stat.S_IRUSR | stat.S_IXUSR)
    user = os.geteuid()
    arguments = ("convert", "checkpoint", CHECKPOINT, *COMPLETE, "-o", tmp_path / "locked" / "b")
    try:
        if user == 0:  # root may write anywhere
            os.seteuid(65534)
        result = infexport(*arguments, exit_code=2)
    finally:
        os.seteuid(user)
    assert "Permission denied" in result.stderr
    assert "hint:" in result.stderr
    assert infexport(*arguments[:-1], tmp_path / ("long" * 100), exit_code=2).stderr.count("error:") == 1


def test_a_linked_checkpoint_can_be_validated(infexport, tmp_path):
    """A folder as in Hugging Face's cache, where every file is a symbolic link to another name."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    shutil.copy(CHECKPOINT, tmp_path / "blobs" / "deadbeef")
    (tmp_path / "snapshot" / "model.safetensors").symlink_to("../blobs/deadbeef")
    convert = ("convert", "checkpoint", tmp_path / "snapshot" / "model.safetensors", *QUICK)
    infexport(*convert, "-o", tmp_path / "b")
    infexport("validate", "parity", tmp_path / "b", "--sizes", "32")


def test_options_that_correct_a_sidecar_hold_in_validate_too(infexport, tmp_path):
    shutil.copy(GOLDEN / "timm_softmax_pure.safetensors", tmp_path / "model.safetensors")
    sidecar = {"hidden_act": "gelu_new", "labels": ["too", "few"], "num_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps(sidecar))
    given = {"hidden_act": "gelu", "num_heads": 4, "variant": "pure_infsa", "rho": 0.7, "rho_per_head": True}
    (tmp_path / "given.json").write_text(json.dumps(given))
    (tmp_path / "labels.txt").write_text("\ufeff" + "".join(f"class {i}\n" for i in range(10)), encoding="utf-8")
    options = ("--config", tmp_path / "given.json", "--labels", tmp_path / "labels.txt")
    infexport("convert", "checkpoint", tmp_path / "model.safetensors", *options, "-o", tmp_path / "b")
    assert json.loads((tmp_path / "b" / "labels.json").read_text())[0] == "class 0"
    infexport("validate", "parity", tmp_path / "b", "--sizes", "32")


def test_a_huggingface_folder(infexport, golden_images, tmp_path):
    folder = tmp_path / "hf"
    folder.mkdir()
    shutil.copy(GOLDEN / "transformers_linear.safetensors", folder / "model.safetensors")
    config = {
        "model_type": "vit",
        "num_attention_heads": 4,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "id2label": {str(i): f"digit {i}" for i in range(10)},
    }
    (folder / "config.json").write_text(json.dumps(config))
    processor = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": 32, "width": 32}, "resample": 2}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    infexport("convert", "checkpoint", folder, "--variant", "linear_infsa", "--no-fold", "-o", tmp_path / "b")
    manifest = json.loads((tmp_path / "b" / "infexport.json").read_text())
    assert manifest["preprocessing"] == {
        "mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "exact", "resize_size": 32, "crop_size": 32,
        "interpolation": "bilinear",
    }  # fmt: skip
    images, _ = golden_images("transformers_linear")
    result = infexport("run-engine", tmp_path / "b", images, "--json")
    assert json.loads(result.stdout)["images"][0]["top"][0]["label"].startswith("digit ")
    infexport("validate", "parity", tmp_path / "b", "--sizes", "32")
