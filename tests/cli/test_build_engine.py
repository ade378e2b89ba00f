"""`build-engine`: sm_80 engines on a machine without a GPU."""

import dataclasses
import hashlib
import json
import shutil
import subprocess
import sys

import onnx
import pytest
import torch
from safetensors.torch import save_file

from infexport.bundle import open_bundle, seal
from infexport.bundle.manifest import read_manifest
from infexport.conversion.tensorrt import build as engines
from infexport.system.progress import PhaseProgress, Status
from infvit.config import SIZES
from infvit.network import InfViT
from infvit.stage_scope import StageScope

PRECISIONS = ["fp32", "fp16", "bf16", "int8"]


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def bundle(golden_bundle, tmp_path):
    """Function: name of a golden model → a copy of its bundle, to which a test adds engines."""

    def get(name):
        return shutil.copytree(golden_bundle(name), tmp_path / name)

    return get


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "infexport"


@pytest.fixture
def calibrating(golden_images):
    """Options of build-engine for a precision."""

    def get(name, precision):
        images = ("--calibrate", golden_images(name)[0]) if precision == "int8" else ()
        return ("--precision", precision, *images)

    return get


def built(infexport, *arguments):
    return json.loads(infexport("build-engine", *arguments, "--json").stdout)


@pytest.mark.parametrize("name", ["reference_linear", "torchvision_pure"])
def test_a_sidecar_tells_the_whole_chain(name, infexport, bundle, cache):
    folder = bundle(name)
    result = infexport("build-engine", folder, "--target", "a100")
    assert "not run on the target" in result.stderr
    assert "tensorrt can't: it is not installed" in result.stderr
    engine = folder / "engines" / "a100-fp32.engine"
    sidecar = json.loads((folder / "engines" / "a100-fp32.engine.json").read_text())
    manifest = json.loads((folder / "infexport.json").read_text())
    assert sidecar["target"] == "a100"
    assert sidecar["compute_capability"] == "8.0"
    assert sidecar["backend"] == "tensorrt-rtx"
    assert sidecar["profile"] == {"image": [[1, 8, 8, 3], [1, 32, 32, 3], [8, 1024, 1024, 3]]}
    assert sidecar["checkpoint"] == manifest["checkpoint"]["files"]
    assert sidecar["graph"] == {file: sha256(folder / file) for file in ("model.onnx", "model.onnx.data")}
    assert sidecar["sha256"] == sha256(engine)
    assert any("Opset version" in line for line in sidecar["log"])
    assert sorted(path.name for path in engine.parent.iterdir()) == [engine.name, engine.name + ".json"]
    # the bundle is still valid, and lists its engine
    assert f"built by    tensorrt-rtx {sidecar['backend_version']}" in infexport("inspect", folder).stdout


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["reference_linear", "transformers4_wrapped_pure"])
def test_every_precision_whole_and_in_stages(name, precision, infexport, bundle, calibrating, cache):
    """Only matrix products are in the lower precision; sums, norms and states stay float32."""
    folder = bundle(name)
    options = calibrating(name, precision)
    made = built(infexport, folder, "--target", "a100", *options)
    made += built(infexport, folder, "--target", "a100", *options, "--execution", "stream", "--chunk", 64)
    stages = {stage.graph for stage in open_bundle(folder).manifest.stages}
    assert len(made) == 1 + len(stages)
    low = {"fp32": None, "fp16": "HALF", "bf16": "BF16", "int8": "INT8"}[precision]
    for facts in made:
        for kind, types in facts["layers"].items():
            if kind in ("REDUCE", "NORMALIZATION", "ELEMENTWISE", "UNARY", "RECURRENCE", "CUMULATIVE", "TOP_K"):
                assert not {"HALF", "BF16", "INT8"} & set(types), (facts["engine"], kind)
        assert facts["precision"] == precision
        assert facts["seconds"] < 60
    whole = made[0]["layers"]
    assert all(set(facts["layers"].get("MATRIX_MULTIPLY", {})) <= {"FLOAT"} for facts in made)
    if low in ("HALF", "BF16"):
        # weights: patch embedding; first layer's queries and MLP, or queries, keys, values, output and MLP;
        # last layer's queries, or queries and keys
        assert whole["CONSTANT"][low] >= (1 + 3 + 1 if "linear" in name else 1 + 6 + 2)
    elif low == "INT8":
        # attention runs in float16
        assert ("HALF" in whole["CAST"]) == ("pure" in name)
        assert whole["QUANTIZE"] == {"INT8": 3 + 1 if "linear" in name else 4 + 1}
    else:
        assert not {"HALF", "BF16", "INT8"} & {type for types in whole.values() for type in types}
    state = next(facts for facts in made if "apply" in facts["engine"])
    assert "FLOAT" in state["layers"]["NORMALIZATION"]
    assert all(engine.state == "current" for engine in open_bundle(folder).engines)


def test_a_sum_in_half_precision_is_refused():
    from infexport.conversion.tensorrt.build_worker import check_types
    from infexport.errors import InfexportError

    check_types("a graph", {"CONSTANT": {"HALF": 3}, "REDUCE": {"FLOAT": 2}, "SHAPE": {"INT64": 1}})
    for wrong in ({"REDUCE": {"FLOAT": 2, "BF16": 1}}, {"MATRIX_MULTIPLY": {"HALF": 1}}):
        with pytest.raises(InfexportError, match="sums in less than float32") as refused:
            check_types("a graph", {"CONSTANT": {"HALF": 3}} | wrong)
        assert next(iter(wrong)) in refused.value.details


@pytest.mark.slow
def test_the_paper_s_smallest_through_the_installed_command(tmp_path):
    """53.5M parameters: checkpoint to bundle to engine for 224² to 2048², by the console script and by `python -m`."""
    torch.manual_seed(0)
    save_file(InfViT(SIZES["infvit_linear_4l"]).state_dict(), tmp_path / "model.safetensors")
    bundle = tmp_path / "b"
    options = ["--variant", "linear_infsa", "--num-heads", "16"]
    script = f"{sys.prefix}/bin/infexport"
    subprocess.run(
        [script, "convert", "checkpoint", tmp_path / "model.safetensors", *options, "-o", bundle], check=True
    )
    manifest = json.loads((bundle / "infexport.json").read_text())
    assert manifest["parameters"] == 53_451_756
    sizes = ["--sizes", "224,1024,2048", "--batch", "1,8,16"]
    build = [sys.executable, "-m", "infexport", "build-engine", bundle, "--target", "a100", "--json", *sizes]
    done = subprocess.run([*build, "--precision", "fp16"], check=True, capture_output=True, text=True)
    (sidecar,) = json.loads(done.stdout)
    assert sidecar["compute_capability"] == "8.0"
    assert sidecar["profile"]["image"] == [[1, 224, 224, 3], [8, 1024, 1024, 3], [16, 2048, 2048, 3]]
    assert 2 * 53_000_000 < sidecar["bytes"] < 4 * 53_000_000


def test_timings_are_kept_and_used_again(infexport, bundle, cache):
    """TensorRT-RTX does no timing when it builds, so that its cache stays small; the steps are the same."""
    folder = bundle("reference_linear")
    infexport("build-engine", folder, "--target", "a100")
    kept = cache / "timing-tensorrt-rtx-1.7.1.116-8.0.cache"
    first = kept.read_bytes()
    assert first
    infexport("build-engine", folder, "--target", "a100")
    assert kept.read_bytes() == first
    kept.write_bytes(b"not a cache")
    infexport("build-engine", folder, "--target", "a100")
    assert kept.read_bytes() == first
    assert [file.name for file in cache.iterdir()] == [kept.name]


def test_phases_are_told(bundle, cache, golden_images):
    from infexport.conversion.tensorrt.build import Plan, ProgressListener, build_engines
    from infexport.conversion.tensorrt.profiles import make_profile
    from infexport.images.decode import find_images
    from infexport.inference.tensorrt_libraries import BACKENDS
    from infexport.system.gpus import find_target

    opened = open_bundle(bundle("reference_linear"))
    phases, statuses = [], []

    class Told(ProgressListener):
        def on_event(self, event):
            if isinstance(event, Status):
                statuses.append(event.message)
            elif isinstance(event, PhaseProgress):
                phases.append((event.name, event.done, event.total))

    images = tuple(find_images([golden_images("reference_linear")[0]]))
    profile = make_profile(opened.manifest, None, None)
    plan = Plan(find_target("a100"), BACKENDS["tensorrt-rtx"], "int8", "whole", profile, None, calibrate=images)
    build_engines(opened, plan, Told())
    assert [p for p in phases if p[0] == "calibrating"] == [
        ("calibrating", i + 1, len(images)) for i in range(len(images))
    ]
    assert {name for name, _, _ in phases} > {"calibrating"}  # and the cache of the library
    assert statuses == ["building model.onnx"]


def test_tf32_is_asked_for_and_named(infexport, bundle, cache):
    (facts,) = built(infexport, bundle("reference_linear"), "--target", "a100", "--precision", "tf32")
    assert facts["precision"] == "tf32"
    assert facts["engine"].endswith("a100-tf32.engine")


@pytest.mark.parametrize("tf32", [True, False])
def test_tf32_is_off_unless_asked_for(tf32, monkeypatch, tmp_path):
    """The limit is in the config that the library receives."""
    from infexport.conversion.tensorrt import build_worker
    from infexport.inference.tensorrt_libraries import BACKENDS

    target = {"name": "a100", "capability": "8.0", "memory": None}
    request = {"backend": "tensorrt-rtx", "target": target, "tf32": tf32, "memory": None, "gpu": None}
    builder = build_worker.Builder(request | {"caches": str(tmp_path)}, lambda message: None)
    config = builder._config(None, {})
    assert config.get_flag(BACKENDS["tensorrt-rtx"].load().BuilderFlag.TF32) is tf32


def test_a_parser_s_refusal_is_shown_whole(infexport, bundle, cache):
    """A graph that TensorRT rejects gives one failure with every error, and no engine."""
    folder = bundle("reference_linear")
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    model.graph.node[-1].op_type = "NoSuchOperator"
    onnx.save(model, folder / "model.onnx")
    manifest = read_manifest(folder / "infexport.json")
    (folder / "infexport.json").unlink()
    seal(folder, manifest)
    result = infexport("build-engine", folder, "--target", "a100", exit_code=2)
    assert "NoSuchOperator" in result.stderr
    assert "parser refuses" in result.stderr
    assert {item.name for item in folder.iterdir()} == {
        "infexport.json",
        *read_manifest(folder / "infexport.json").files,
    }


def test_a_set_of_engines_appears_whole_or_not_at_all(infexport, bundle, cache):
    folder = bundle("reference_linear")
    graph = folder / "stream-03-apply.onnx"
    model = onnx.load(graph, load_external_data=False)
    model.graph.node[-1].op_type = "NoSuchOperator"
    onnx.save(model, graph)
    manifest = read_manifest(folder / "infexport.json")
    (folder / "infexport.json").unlink()
    seal(folder, manifest)
    result = infexport("build-engine", folder, "--target", "a100", "--execution", "stream", exit_code=2)
    assert "parser refuses stream-03-apply.onnx" in result.stderr
    assert {item.name for item in folder.iterdir()} == {
        "infexport.json",
        *read_manifest(folder / "infexport.json").files,
    }


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--target", "abacus"), ("no such target: abacus", "a100", "sm_80")),
        (("--target", "local"), ("no NVIDIA GPU here",)),
        (("--target", "h100"), ("tensorrt: it is not installed", "compute capabilities 7.5, 8.0")),
        (("--target", "a100", "--backend", "tensorrt"), ("tensorrt: it is not installed",)),
        (("--target", "a100", "--sizes", "1001"), ("1001x1001 is not a whole number of patches", "--sizes 1000x1000")),
        (("--target", "a100", "--sizes", "64,32"), ("not in order", "64x64, 32x32")),
        (("--target", "a100", "--sizes", "8,16,24,32"), ("one to three values", "received 4")),
        (("--target", "a100", "--batch", "4,2,8"), ("--batch is not in order",)),
        (("--target", "a100", "--batch", "0"), ("whole numbers from 1",)),
        (("--target", "a100", "--precision", "int8"), ("int8 without --calibrate",)),
        (("--target", "a100", "--calibrate", "."), ("no image",)),
        (("--target", "a100", "--memory", "1KiB"), ("would need about", "no size fits")),
        (
            ("--target", "a100", "--execution", "stream", "--chunk", "10000000"),
            ("--chunk 10000000 is too large", "a strip's pixels, [1, 80000000, 192]", "a chunk that fits: --chunk"),
        ),
    ],
)
def test_wrong_usage(arguments, words, infexport, bundle, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = infexport("build-engine", bundle("reference_linear"), *arguments, exit_code=2)
    for word in words:
        assert word in result.stderr


def test_images_that_fix_no_ranges(infexport, bundle, golden_images):
    images = golden_images("reference_linear")[0]
    arguments = (bundle("reference_linear"), "--target", "a100", "--calibrate", images)
    assert "fp32 with --calibrate" in infexport("build-engine", *arguments, exit_code=2).stderr


def test_9216_squared_fits_once_and_not_twice(tmp_path):
    """2 × 331,777 tokens × 4096 exceed TensorRT's number of elements; the size in the hint is accepted."""
    from infexport.conversion.tensorrt.profiles import INT32_MAX, check_whole, make_profile
    from infexport.errors import InfexportError
    from infexport.system.gpus import find_target

    manifest = paper_manifest()
    target = find_target("a100")
    side = [(9216, 9216)]
    check_whole(manifest, make_profile(manifest, side, [1]), target, weights=0)
    with pytest.raises(InfexportError, match="more elements than TensorRT counts") as refused:
        check_whole(manifest, make_profile(manifest, side, [2]), target, weights=0)
    assert "the MLP's hidden layer, [2, 331777, 4096]" in refused.value.details
    best = int(refused.value.details.rpartition("x")[2])
    assert "--execution stream" in refused.value.hint
    assert 2 * ((best // 16) ** 2 + 1) * 4096 <= INT32_MAX < 2 * ((best // 16 + 1) ** 2 + 1) * 4096
    check_whole(manifest, make_profile(manifest, [(best, best)], [2]), target, weights=0)


def paper_manifest():
    from types import SimpleNamespace

    stages = [SimpleNamespace(graph="apply", over=StageScope.TOKENS)]
    return SimpleNamespace(config=SIZES["infvit_linear_4l"], input="uint8", stages=stages)


def test_a_gpu_s_memory_is_a_limit():
    from infexport.conversion.tensorrt.profiles import check_whole, make_profile, peak
    from infexport.errors import InfexportError
    from infexport.system.gpus import find_target

    manifest, target = paper_manifest(), find_target("t4")
    profile = make_profile(manifest, [(224, 224), (1024, 1024), (4096, 4096)], [6])
    with pytest.raises(InfexportError, match="of the GPU's 16GiB") as refused:
        check_whole(manifest, profile, target, weights=200 << 20)
    best = int(refused.value.details.rpartition("x")[2])
    assert peak(manifest, 200 << 20, 6, (best // 16) ** 2 + 1) <= target.memory
    assert peak(manifest, 200 << 20, 6, (best // 16 + 1) ** 2 + 1) > target.memory
    check_whole(manifest, profile, target, weights=200 << 20, memory=80 << 30)


def test_a_tile_is_as_large_as_the_operator_s():
    """The number is defined twice, since building must not import torch."""
    from infexport.conversion.tensorrt import profiles
    from infsa_ops import common

    assert profiles.TILE == common.TILE


def test_blocks_of_pairs_are_larger_than_a_chunk():
    """Memory of a stage of Pure InfSA depends on its blocks of queries and keys."""
    from types import SimpleNamespace

    from infexport.conversion.tensorrt.profiles import check_stages, peak
    from infexport.errors import InfexportError
    from infexport.system.gpus import find_target

    stages = [
        SimpleNamespace(graph="attend", over=StageScope.PAIRS),
        SimpleNamespace(graph="apply", over=StageScope.TOKENS),
    ]
    manifest = SimpleNamespace(config=SIZES["infvit_pure_4l"], input="uint8", stages=stages)
    needed = peak(manifest, 0, 1, StageScope.PAIRS.max_rows(8192)) + peak(manifest, 0, 1, 8192)
    check_stages(manifest, 8192, find_target("a100"), weights=0, memory=needed)
    with pytest.raises(InfexportError, match="--chunk 8192 is too large"):
        check_stages(manifest, 8192, find_target("a100"), weights=0, memory=needed - 1)


def test_a_bundle_without_stages(infexport, golden_bundle):
    bundle = golden_bundle("torchvision_linear", "--no-fold")
    arguments = ("build-engine", bundle, "--target", "a100", "--execution", "stream")
    assert "no stages to build engines for" in infexport(*arguments, exit_code=2).stderr


def test_other_bundles_than_fp32(infexport, bundle):
    folder = bundle("reference_linear")
    manifest = dataclasses.replace(read_manifest(folder / "infexport.json"), precision="fp16")
    (folder / "infexport.json").unlink()
    seal(folder, manifest)
    result = infexport("build-engine", folder, "--target", "a100", exit_code=2)
    assert "engines are built from fp32 bundles, this one is fp16" in result.stderr


def test_a_crash_of_the_library_is_an_error(infexport, bundle, monkeypatch):
    crash = [sys.executable, "-c", "import os; os.kill(os.getpid(), 11)"]
    monkeypatch.setattr(engines, "WORKER", crash)
    result = infexport("build-engine", bundle("reference_linear"), "--target", "a100", exit_code=2)
    assert "tensorrt-rtx ended while building: the process was killed by SIGSEGV" in result.stderr
