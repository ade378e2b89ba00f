"""`inspect`: every figure compared with its source, and bundles in every state."""

import dataclasses
import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from support import GOLDEN

from infexport.bundle import open_bundle
from infexport.bundle.engine_record import ShapeRange
from infexport.bundle.integrity import sealed, sha256
from infexport.bundle.provenance import check_provenance
from infexport.cli.sections import _takes
from infexport.evaluation import inspect
from infexport.inference.options import InferenceOptions
from infexport.inference.planner import Image, estimates
from infexport.inference.streaming import token_store
from infexport.inference.streaming.token_store import FileStore
from infexport.system import dependencies
from infvit.config import SIZES
from infvit.network import InfViT

GIB = 2**30


@pytest.fixture
def bundle(golden_bundle, tmp_path):
    """A copy of a bundle that tests may damage, together with its checkpoint."""
    folder = shutil.copytree(golden_bundle("reference_linear"), tmp_path / "b")
    checkpoint = shutil.copy(GOLDEN / "reference_linear.safetensors", tmp_path)
    manifest = json.loads((folder / "infexport.json").read_text())
    manifest["checkpoint"]["path"] = str(checkpoint)
    (folder / "infexport.json").write_bytes(sealed(manifest))
    return folder


@pytest.fixture
def engine(bundle):
    """Write the sidecar of an engine of the whole graph, as `build-engine` does, and a file of 2 MB."""
    (bundle / "engines").mkdir()
    file = bundle / "engines" / "a100-fp32.engine"
    file.write_bytes(bytes(2_000_000))
    facts = {
        "target": "a100", "compute_capability": "8.0", "precision": "fp32", "backend": "tensorrt",
        "backend_version": "10.8", "sha256": sha256(file), "graph": open_bundle(bundle).manifest.graph,
        "profile": {"image": [[1, 8, 8, 3], [2, 32, 40, 3], [8, 64, 64, 3]]}, "chunk": None, "layers": {},
        "gpu": {"name": "NVIDIA A100-SXM4-40GB", "memory": 40 << 30, "driver": "580", "capability": "8.0"},
    }  # fmt: skip
    file.with_name(file.name + ".json").write_bytes(sealed(facts))
    return facts


def document(infexport, *arguments, **options):
    return json.loads(infexport("inspect", *arguments, "--json", **options).stdout)


def row(shown, word):
    """Return the cells of the line that begins with a word."""
    (line,) = (line for line in shown.splitlines() if line.split()[:1] == [word])
    return line.split()


def test_the_sections_in_their_order(infexport, golden_bundle):
    lines = infexport("inspect", golden_bundle("reference_linear")).stdout.splitlines()
    starts = ("bundle ", "model ", "provenance  the checkpoint is there and unchanged", "file ", "input       image: ",
              "output ", "operator ", "parameters ", "part ", "size ", "engines     none; ")  # fmt: skip
    places = [next(i for i, line in enumerate(lines) if line.lstrip().startswith(start)) for start in starts]
    assert places == sorted(places)
    assert "build-engine" in lines[-1]
    assert max(len(line) for line in lines if "/" not in line) <= 120


def test_inputs_and_outputs(infexport, golden_bundle):
    found = document(infexport, golden_bundle("reference_linear"))
    side = found["config"]["patch_size"]
    shape = ["batch", f"{side}*grid_height", f"{side}*grid_width", 3]
    assert found["inputs"] == [{"name": "image", "dtype": "uint8", "shape": shape}]
    classes, width = found["config"]["num_classes"], found["config"]["embed_dim"]
    assert found["outputs"] == [
        {"name": "logits", "dtype": "float32", "shape": ["batch", classes]},
        {"name": "features", "dtype": "float32", "shape": ["batch", width]},
    ]
    shown = infexport("inspect", golden_bundle("reference_linear")).stdout
    assert f"image: uint8 [batch, {side}*grid_height, {side}*grid_width, 3]" in shown


def test_operators(infexport, golden_bundle):
    found = document(infexport, golden_bundle("reference_pure"))["operators"]
    assert found["opsets"] == {"": 20, "infsa": 1}
    assert found["operators"]["infsa::NeumannKernel"] >= 1
    assert list(found["placement"]) == ["CPUExecutionProvider"]
    assert "infsa::NeumannKernel" not in found["placement"]["CPUExecutionProvider"]
    assert found["unknown"] == []


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        *((name, {}) for name in SIZES),
        ("infvit_linear_4l", {"rho_per_head": True, "qkv_bias": False, "pooler": False}),
        ("infvit_pure_4l", {"variant": "softmax"}),
    ],
)
def test_the_parts_are_all_parameters(name, changes):
    config = dataclasses.replace(SIZES[name], **changes)
    with torch.device("meta"):
        network = InfViT(config)
    parts = {part.name: part for part in inspect.list_parts(config)}
    layer, count = network.encoder.layers[0], lambda module: sum(each.numel() for each in module.parameters())
    assert parts["layer: attention"].each == count(layer.attn)
    assert parts["layer: MLP"].each == count(layer.ff)
    assert parts["patch embedding"].each == count(network.patch_embed)
    assert sum(part.all for part in parts.values()) == count(network)


@pytest.mark.parametrize("folded", [True, False])
@pytest.mark.parametrize("name", ["reference_linear", "reference_pure"])
def test_multiply_adds_by_hand(name, folded, golden_bundle):
    opened = open_bundle(golden_bundle(name))
    opened = dataclasses.replace(opened, manifest=dataclasses.replace(opened.manifest, folded=folded))
    config = opened.manifest.config
    width, patch, layers = config.embed_dim, config.patch_size, config.depth
    (found,) = inspect.resolutions(opened, [(patch * 5, patch * 7)], GIB)
    tokens = 5 * 7 + 1
    square, mlp, pairs = tokens * width**2, 2 * tokens * width * config.mlp_dim, tokens**2 * width
    linear = {True: (square + mlp, square), False: (4 * square + mlp,) * 2}
    pure = {True: (4 * square + mlp + 2 * pairs, 2 * square + pairs), False: (4 * square + mlp + 2 * pairs,) * 2}
    first, last = (linear if "linear" in name else pure)[folded]
    assert found.multiply_adds == 5 * 7 * 3 * patch**2 * width + (layers - 1) * first + last


@pytest.mark.parametrize("name", ["reference_linear", "reference_pure"])
def test_memory_is_what_decides_how_an_image_is_run(name, golden_bundle):
    opened = open_bundle(golden_bundle(name))
    patch = opened.manifest.config.patch_size
    found = inspect.resolutions(opened, None, GIB)
    trained = opened.manifest.config.image_size
    assert [each.height for each in found] == [trained, *(-(-side // patch) * patch for side in inspect.SIDES)]
    for each in found:
        assert each.tokens == (each.height // patch) * (each.width // patch) + 1
        image = Image(each.tokens, each.width)
        assert each.memory == estimates(opened, InferenceOptions(), image)
    ways = [each.auto for each in found]
    assert ways[0] == "whole"
    assert "memory" in ways
    assert ways[-1] == "disk"
    assert inspect.resolutions(opened, None, 1000)[0].auto is None


def test_the_scratch_file_is_as_large_as_it_says(infexport, golden_bundle, golden_images, tmp_path, monkeypatch):
    sizes = []

    class Store(FileStore):
        def __init__(self, path, *arguments):
            super().__init__(path, *arguments)
            sizes.append(path.stat().st_size)

    monkeypatch.setattr(token_store, "FileStore", Store)
    bundle, (images, _) = golden_bundle("reference_pure"), golden_images("reference_pure")
    options = ("--size", 48, "--execution", "stream", "--scratch", tmp_path)
    infexport("run-engine", bundle, sorted(images.glob("*.png"))[0], *options)
    (found,) = inspect.resolutions(open_bundle(bundle), [(48, 48)], GIB)
    assert sum(sizes) == found.scratch


def test_sizes_are_completed_to_whole_patches(infexport, golden_bundle):
    bundle = golden_bundle("reference_linear")
    patch = open_bundle(bundle).manifest.config.patch_size
    found = document(infexport, bundle, "--sizes", f"{patch + 1},{patch}x{3 * patch},{2 * patch}")["resolutions"]
    assert [(each["height"], each["width"]) for each in found] == [(2 * patch, 2 * patch), (patch, 3 * patch)]
    shown = infexport("inspect", bundle, "--sizes", 9_999 * patch).stdout
    assert row(shown, f"{9_999 * patch}x{9_999 * patch}")[1] == f"{9_999**2 + 1:,}"


def test_without_stages_there_is_one_way(golden_bundle):
    opened = open_bundle(golden_bundle("reference_linear"))
    opened = dataclasses.replace(opened, manifest=dataclasses.replace(opened.manifest, stages=None))
    found = inspect.resolutions(opened, [(64, 64)], GIB)[0]
    assert found.memory.keys() == {"whole"}
    assert found.scratch is None


def test_what_became_of_the_checkpoint(infexport, bundle):
    """It is reported, and does not make the bundle invalid."""
    checkpoint = bundle.parent / "reference_linear.safetensors"
    assert document(infexport, bundle)["provenance"]["checkpoint"] == "unchanged"
    checkpoint.write_bytes(b"another")
    shown = infexport("inspect", bundle).stdout
    assert "the checkpoint is there, but changed since the conversion" in shown
    assert row(shown, "reference_linear.safetensors")[1:3] == ["(checkpoint)", "CHANGED"]
    checkpoint.unlink()
    assert "the checkpoint is gone" in infexport("inspect", bundle).stdout
    found = document(infexport, bundle)["provenance"]
    assert found["checkpoint"] == "gone"
    assert [each["state"] for each in found["source"]] == ["missing"]


def test_a_checkpoint_that_may_not_be_read(infexport, bundle, monkeypatch):
    def denied(path):
        raise PermissionError(13, "Permission denied", str(path))

    opened = open_bundle(bundle)
    monkeypatch.setattr("infexport.bundle.bundle.sha256", denied)
    assert check_provenance(opened).checkpoint == "unreadable"


def test_a_file_that_was_changed_is_named_and_not_loaded(infexport, bundle):
    weights = bundle / "model.onnx.data"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    (bundle / "labels.json").unlink(missing_ok=True)
    shown = infexport("inspect", bundle, exit_code=1).stdout
    assert row(shown, "model.onnx.data")[1] == "CHANGED"
    assert row(shown, "model.onnx")[1] == "ok"
    assert "is not loaded; --provider cpu" in shown
    assert "CPUExecutionProvider" not in shown
    assert "CPUExecutionProvider" in infexport("inspect", bundle, "--provider", "cpu", exit_code=1).stdout
    weights.unlink()
    assert row(infexport("inspect", bundle, exit_code=1).stdout, "model.onnx.data")[1] == "MISSING"


def test_a_graph_that_cannot_be_read(infexport, bundle):
    (bundle / "model.onnx").write_bytes(b"no graph")
    shown = infexport("inspect", bundle, exit_code=1).stdout
    assert "unknown     operators as written: onnx cannot read" in shown
    infexport("inspect", bundle, "--provider", "cpu", exit_code=2)


def test_engines(infexport, bundle, engine):
    shown = infexport("inspect", bundle).stdout
    assert row(shown, "engines/a100-fp32.engine")[1:] == ["current", engine["sha256"]]
    cells = "current 2.0 a100 (8.0) fp32 whole: 8x8 / 32x40 / 64x64, batch 1 / 2 / 8"
    assert row(shown, "a100-fp32.engine")[1:] == cells.split()
    assert "built by    tensorrt 10.8, on NVIDIA A100-SXM4-40GB: a100-fp32" in shown
    (bundle / "engines" / "a100-fp32.engine").write_bytes(b"")
    assert row(infexport("inspect", bundle, exit_code=1).stdout, "a100-fp32.engine")[1] == "MODIFIED"
    deep = {"log": json.loads("[" * 900 + "]" * 900)}
    (bundle / "engines" / "a100-fp32.engine.json").write_bytes(sealed(engine | deep))
    assert document(infexport, bundle, exit_code=1)["engines"][0]["state"] == "unreadable"
    (bundle / "engines" / "a100-fp32.engine.json").write_text("{")
    shown = infexport("inspect", bundle, exit_code=1).stdout
    assert row(shown, "a100-fp32.engine")[1:] == ["UNREADABLE", "0.0", "-", "-", "-"]
    assert document(infexport, bundle, exit_code=1)["engines"][0]["state"] == "unreadable"


def test_what_an_engine_takes():
    shapes = ShapeRange([1, 3, 8, 8], [1, 3, 32, 40], [4, 3, 64, 64])
    whole = SimpleNamespace(graph={"model.onnx": ""}, chunk=None, profile={"pixels": shapes})
    assert _takes(whole) == "whole: 8x8 / 32x40 / 64x64, batch 1 / 1 / 4"
    profile = {"tokens": shapes, "mass": shapes}
    stage = SimpleNamespace(graph={"stream-02-score.onnx": ""}, chunk=8192, profile=profile)
    assert _takes(stage) == "stream: 8192 tokens at a time"


def test_what_is_not_installed_is_said_in_a_line(infexport, golden_bundle, monkeypatch):
    monkeypatch.setattr(dependencies, "installed", lambda module: module not in ("onnx", "onnxruntime"))
    bundle = golden_bundle("reference_linear")
    shown = infexport("inspect", bundle).stdout
    assert "operators as written: this needs onnx, which is not installed; pip install 'infexport[export]'" in shown
    assert "where nodes run: this needs onnxruntime, which is not installed; pip install 'infexport[cpu]'" in shown
    assert row(shown, "head")
    assert document(infexport, bundle)["inputs"] is None
    infexport("inspect", bundle, "--provider", "cpu", exit_code=2)


def test_the_document_has_all_of_it(infexport, golden_bundle):
    found = document(infexport, golden_bundle("reference_linear"))
    assert found["verified"] is True
    assert sum(part["each"] * part["times"] for part in found["parts"]) == found["parameters"]
    assert {each["file"] for each in found["provenance"]["files"]} == found["files"].keys()
    assert {each["state"] for each in found["provenance"]["files"]} == {"ok"}
    assert found["memory_limit"] > 0


def test_it_needs_no_torch(golden_bundle):
    arguments = ["infexport", "inspect", str(golden_bundle("reference_linear"))]
    code = f"import sys; sys.argv = {arguments!r}; from infexport.__main__ import main\n"
    code += "try: main()\nexcept SystemExit as end: assert not end.code\n"
    code += "print([m for m in ('torch', 'onnxscript', 'infvit.network', 'infsa_ops') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_sizes_whose_tokens_no_computer_counts_are_no_sizes(infexport, zoo_bundle):
    result = infexport("inspect", zoo_bundle("digits-linear"), "--sizes", 10**12, exit_code=2)
    assert "is not a size" in result.stderr
