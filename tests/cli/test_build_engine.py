"""`build-engine`: sm_80 engines on a machine without a GPU."""

import hashlib
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from infvit.config import SIZES
from infvit.network import InfViT


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("name", ["reference_linear", "torchvision_pure"])
def test_golden_models(name, infexport, golden_bundle, tmp_path):
    import shutil

    bundle = tmp_path / "b"
    shutil.copytree(golden_bundle(name), bundle)
    result = infexport("build-engine", bundle, "--target", "a100")
    assert "not run on the target" in result.stderr
    engine = bundle / "engines" / "a100-fp32.engine"
    sidecar = json.loads((bundle / "engines" / "a100-fp32.engine.json").read_text())
    manifest = json.loads((bundle / "infexport.json").read_text())
    assert sidecar["target"] == "a100"
    assert sidecar["compute_capability"] == "8.0"
    assert sidecar["backend"] == "tensorrt-rtx"
    assert sidecar["profile"] == {"image": [[1, 8, 8, 3], [1, 32, 32, 3], [8, 1024, 1024, 3]]}
    # the chain: checkpoint, graph, engine
    assert sidecar["checkpoint"] == manifest["checkpoint"]["files"]
    assert sidecar["graph"] == {file: sha256(bundle / file) for file in ("model.onnx", "model.onnx.data")}
    assert sidecar["sha256"] == sha256(engine)
    assert sorted(path.name for path in engine.parent.iterdir()) == [engine.name, engine.name + ".json"]
    # still a whole bundle, that knows its engine
    assert "a100-fp32.engine: tensorrt-rtx" in infexport("inspect", bundle).stdout


def test_the_paper_s_smallest_through_the_installed_command(tmp_path):
    """53.5M parameters: checkpoint to bundle to engine, by the console script and by `python -m`."""
    torch.manual_seed(0)
    save_file(InfViT(SIZES["infvit_linear_4l"]).state_dict(), tmp_path / "model.safetensors")
    bundle = tmp_path / "b"
    convert = [
        "convert",
        "checkpoint",
        tmp_path / "model.safetensors",
        "--variant",
        "linear_infsa",
        "--num-heads",
        "16",
    ]
    script = f"{sys.prefix}/bin/infexport"
    subprocess.run([script, *convert, "-o", bundle], check=True)
    manifest = json.loads((bundle / "infexport.json").read_text())
    assert manifest["parameters"] == 53_451_756
    build = [sys.executable, "-m", "infexport", "build-engine", bundle, "--target", "a100", "--json"]
    done = subprocess.run(build, check=True, capture_output=True, text=True)
    sidecar = json.loads(done.stdout)
    assert sidecar["compute_capability"] == "8.0"
    assert sidecar["bytes"] > 4 * 53_000_000


def test_a_parser_s_refusal_is_shown_whole(infexport, golden_bundle, tmp_path):
    """A graph TensorRT can't take: every error, one failure, and no engine."""
    import shutil

    import onnx

    from infexport.bundle import seal
    from infexport.manifest import read_manifest

    bundle = tmp_path / "b"
    shutil.copytree(golden_bundle("reference_linear"), bundle)
    model = onnx.load(bundle / "model.onnx", load_external_data=False)
    model.graph.node[-1].op_type = "NoSuchOperator"
    onnx.save(model, bundle / "model.onnx")
    manifest = read_manifest(bundle / "infexport.json")
    (bundle / "infexport.json").unlink()
    seal(bundle, manifest)
    result = infexport("build-engine", bundle, "--target", "a100", exit_code=2)
    assert "NoSuchOperator" in result.stderr
    assert "parser refuses" in result.stderr
    assert list((bundle / "engines").iterdir()) == []


def test_wrong_usage(infexport, golden_bundle):
    bundle = golden_bundle("reference_linear")
    assert "a100" in infexport("build-engine", bundle, "--target", "abacus", exit_code=2).stderr
    arguments = ("build-engine", bundle, "--target", "a100", "--max-size")
    assert "--max-size 1000" in infexport(*arguments, 1001, exit_code=2).stderr
    assert "--max-size 32" in infexport(*arguments, 8, exit_code=2).stderr
    result = infexport(*arguments, 65536, "--max-batch", 1, exit_code=2)
    assert "MLP's hidden layer" in result.stderr


def test_a_crash_of_the_library_is_an_error(infexport, golden_bundle, monkeypatch):
    from infexport import engine

    crash = [sys.executable, "-c", "import os; os.kill(os.getpid(), 11)"]
    run = subprocess.run
    monkeypatch.setattr(engine.subprocess, "run", lambda command, **options: run(crash, **options))
    result = infexport("build-engine", golden_bundle("reference_linear"), "--target", "a100", exit_code=2)
    assert "exit code -11" in result.stderr
