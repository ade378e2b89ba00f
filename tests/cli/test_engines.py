"""Running engines without a GPU: ONNX Runtime on the engine's graph replaces the library."""

import hashlib
import json
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from support import relative_error

from infexport import Predictor
from infexport.bundle import open_bundle
from infexport.bundle.integrity import sealed
from infexport.conversion.tensorrt.precision import Lowering
from infexport.inference import engine_selection, tensorrt_libraries
from infexport.inference.runners import factory
from infexport.inference.tensorrt_libraries import TensorRTRTX
from infexport.system.gpus import Gpu

A100 = Gpu("NVIDIA A100-SXM4-40GB", 40 << 30, "580.1", "8.0")
VERSION = "1.7.1.116"


class FakeGpu:
    """Fake of the library and Polygraphy, for the engines of one bundle.

    Attributes:
        loaded, freed: names of engines, in order of the calls.
        refuses: the library takes no engine.
        fails: an engine that is run raises.
        buffers, slow: an engine's outputs, always the same memory; seconds between them.
    """

    def __init__(self, folder, scratch):
        self.folder, self.scratch = folder, scratch
        self.loaded, self.freed = [], []
        self.refuses = self.fails = False
        self.buffers, self.slow = {}, 0.0

    def session(self, content):
        import onnxruntime

        digest = hashlib.sha256(content).hexdigest()
        (engine,) = (engine for engine in open_bundle(self.folder).engines if engine.recorded.sha256 == digest)
        graph = next(name for name in engine.recorded.graph if name.endswith(".onnx"))
        lowered = Lowering(str(self.folder), engine.recorded.precision, [], str(self.scratch))
        content = lowered.graph(self.folder / graph)
        return onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"]), engine.file

    def module(self):
        fake = self

        class Runtime:
            def __init__(self, logger):
                self.logger = logger

            def deserialize_cuda_engine(self, content):
                if fake.refuses:
                    self.logger.log(SimpleNamespace(name="ERROR"), "a serialized engine of another kind")
                    return None
                return content

        made = ModuleType("fake_tensorrt")
        made.__version__, made.Runtime, made.ILogger = VERSION, Runtime, type("ILogger", (), {})
        return made

    def runner(self):
        fake = self

        class TrtRunner:
            def __init__(self, content):
                self.session, self.name = fake.session(content)

            def activate(self):
                fake.loaded.append(self.name)

            def deactivate(self):
                fake.freed.append(self.name)

            def infer(self, feeds):
                if fake.fails:
                    raise RuntimeError("an illegal memory access was encountered")
                names = [output.name for output in self.session.get_outputs()]
                found = dict(zip(names, self.session.run(None, feeds), strict=True))
                for name, value in found.items():  # the next call overwrites these outputs
                    fake.buffers.setdefault((self.name, name, value.shape), np.empty_like(value))[:] = value
                    time.sleep(fake.slow)
                return {name: fake.buffers[self.name, name, value.shape] for name, value in found.items()}

        return TrtRunner


@pytest.fixture(scope="module")
def built(golden_bundle, infexport, tmp_path_factory):
    """A bundle with an fp32 engine of the whole graph up to 64², and others; built once and copied by tests."""
    root = tmp_path_factory.mktemp("built")
    whole = shutil.copytree(golden_bundle("reference_linear"), root / "whole")
    sizes = ("--sizes", "8,32,64")
    infexport("build-engine", whole, "--target", "a100", *sizes)
    stages = shutil.copytree(whole, root / "stages")
    infexport("build-engine", stages, "--target", "a100", "--execution", "stream", "--chunk", 32)
    half = shutil.copytree(whole, root / "half")
    infexport("build-engine", half, "--target", "a100", *sizes, "--precision", "fp16")
    infexport("build-engine", half, "--target", "a100", "--precision", "fp16", "--execution", "stream")
    return root


@pytest.fixture
def folder(built, tmp_path, monkeypatch):
    """A bundle with an engine of the whole graph up to 64²."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return shutil.copytree(built / "whole", tmp_path / "b")


@pytest.fixture
def streaming(folder, built):
    """A bundle with engines of the whole graph and of its stages."""
    return shutil.copytree(built / "stages", folder, dirs_exist_ok=True)


@pytest.fixture
def half(folder, built):
    """A bundle with engines as `streaming`, in fp32 and in fp16."""
    return shutil.copytree(built / "half", folder, dirs_exist_ok=True)


@pytest.fixture
def gpu(tmp_path, monkeypatch):
    """A machine with an A100."""
    scratch = tmp_path / "lowered"
    scratch.mkdir()
    fake = FakeGpu(tmp_path / "b", scratch)
    library = fake.module()
    for module in (engine_selection, factory):
        monkeypatch.setattr(module, "local_gpu", lambda: A100)
    monkeypatch.setattr(TensorRTRTX, "load", lambda self: library)
    monkeypatch.setattr(TensorRTRTX, "context", lambda self, engine, key, stack: engine)
    polygraphy = ModuleType("polygraphy.backend.trt")
    polygraphy.TrtRunner = fake.runner()
    monkeypatch.setitem(sys.modules, "polygraphy.backend.trt", polygraphy)
    return fake


@pytest.fixture
def pictures(tmp_path):
    random = np.random.default_rng(0)
    found = []
    for name, shape in (("small", (32, 32)), ("tall", (56, 40)), ("large", (120, 96))):
        pixels = random.integers(0, 256, (*shape, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
        found.append(tmp_path / f"{name}.png")
    return found


def logits(infexport, *arguments):
    result = infexport("run-engine", *arguments, "--output", arguments[0].parent / "out.npz")
    with np.load(arguments[0].parent / "out.npz") as found:
        return found["logits"], result.stderr


def test_an_engine_answers_as_onnx_runtime_does(infexport, folder, gpu, pictures):
    arguments = (folder, *pictures[:2], "--size", "native")
    expected, _ = logits(infexport, *arguments, "--provider", "cpu")
    for options in ((), ("--provider", "engine"), ("--engine", "a100-fp32")):
        found, told = logits(infexport, *arguments, *options)
        assert "running on engine a100-fp32 with fp32" in told
        np.testing.assert_array_equal(found, expected)
    assert gpu.freed == gpu.loaded == 3 * ["a100-fp32.engine"]


def test_what_is_too_large_for_it_is_streamed(infexport, streaming, gpu, pictures):
    """Streaming uses the same driver, with the chunk and strips that the stages were built for."""
    arguments = (streaming, *pictures, "--size", "native")
    expected, _ = logits(infexport, *arguments, "--provider", "cpu", "--execution", "whole")
    found, _ = logits(infexport, *arguments)
    assert relative_error(found, expected) < 1e-5
    document = json.loads(infexport("run-engine", *arguments, "--json").stdout)
    assert [image.get("execution", "whole").partition(",")[0] for image in document["images"]] == [
        "whole",
        "whole",
        "stream",
    ]
    assert sorted(set(gpu.freed)) == sorted(set(gpu.loaded))
    assert len(set(gpu.loaded)) == 1 + len(open_bundle(streaming).manifest.stages)


def test_parity_of_stages(infexport, streaming, gpu):
    result = infexport("validate", "parity", streaming, "--provider", "engine", "--execution", "stream")
    assert "ran on: engine a100-fp32, streamed" in result.stdout
    assert "parity holds" in result.stdout
    assert "a100-fp32.engine" not in gpu.loaded


def test_parity_at_a_batch_of_one_and_outside_the_profile(infexport, folder, gpu):
    infexport("build-engine", folder, "--target", "a100", "--sizes", "8,32,40", "--batch", 1)
    arguments = ("validate", "parity", folder, "--engine", "a100-fp32", "--sizes")
    assert "parity holds" in infexport(*arguments, "32,40x24").stdout
    result = infexport(*arguments, "32,48", exit_code=1)
    assert "is outside what a100-fp32.engine was built for" in result.stderr
    assert "parity FAILED" in result.stdout


def test_onnx_runtime_does_what_no_engine_can(infexport, folder, gpu, pictures):
    """`auto` streams in ONNX Runtime if there is only an engine of the whole graph."""
    arguments = (folder, pictures[2], "--size", "native", "--execution", "stream")
    found, told = logits(infexport, *arguments)
    assert "running on cpu with fp32" in told
    np.testing.assert_array_equal(found, logits(infexport, *arguments, "--provider", "cpu")[0])
    assert "several" not in told
    result = infexport("run-engine", *arguments, "--provider", "engine", exit_code=2)
    assert "no set of engines to stream through" in result.stderr


def test_a_set_of_two_builds_is_none(infexport, streaming, gpu):
    """The build is killed while it moves engines to their final places."""
    from infexport.inference.engine_selection import find_engine_sets

    assert len(find_engine_sets(open_bundle(streaming), "stream")) == 1
    other(chunk=16)(streaming / "engines" / "a100-fp32.stream-03-apply.engine")
    assert find_engine_sets(open_bundle(streaming), "stream") == []


def test_an_engine_that_cannot_be_activated_is_an_error(infexport, folder, gpu, pictures, monkeypatch):
    def full(self):
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(sys.modules["polygraphy.backend.trt"].TrtRunner, "activate", full)
    result = infexport("run-engine", folder, pictures[0], "--provider", "engine", exit_code=2)
    assert "or the GPU has no room for it" in result.stderr
    assert "CUDA error: out of memory" in result.stderr


def test_the_real_library_without_a_driver_is_an_error(folder, monkeypatch):
    """TensorRT-RTX and Polygraphy themselves on this machine, without fakes."""
    from infexport.errors import InfexportError
    from infexport.inference.runners.tensorrt import EngineSession
    from infexport.system.gpus import local_gpu

    if local_gpu() is not None:
        pytest.skip("this machine has a GPU: the engine can be loaded")
    (engine,) = open_bundle(folder).engines
    with pytest.raises(InfexportError, match="tensorrt-rtx refuses the engine") as refused:
        EngineSession(folder, engine)
    assert "CUDA driver version is insufficient" in refused.value.details


def test_all_can_be_streamed(infexport, streaming, gpu, pictures):
    arguments = (streaming, *pictures, "--size", "native")
    expected, _ = logits(infexport, *arguments, "--provider", "cpu", "--execution", "whole")
    found, _ = logits(infexport, *arguments, "--execution", "stream", "--chunk", 20)
    assert relative_error(found, expected) < 1e-5
    assert "a100-fp32.engine" not in gpu.loaded
    result = infexport("run-engine", *arguments, "--execution", "stream", "--chunk", 33, exit_code=1)
    assert "is outside what a100-fp32.stream-" in result.stderr


def test_stages_in_half_precision(infexport, half, gpu, pictures):
    arguments = (half, *pictures, "--size", "native", "--execution", "stream", "--engine", "a100-fp16")
    expected, _ = logits(infexport, *arguments[:-4], "--provider", "cpu", "--execution", "whole")
    found, told = logits(infexport, *arguments)
    assert "running on engine a100-fp16 with fp16" in told
    assert 1e-6 < relative_error(found, expected) < 5e-3


def test_an_image_outside_the_profile_names_what_to_build(infexport, folder, gpu, pictures):
    arguments = ("run-engine", folder, *pictures, "--size", "native")
    result = infexport(*arguments, "--provider", "engine", exit_code=1)
    assert "image [1, 120, 96, 3] is outside what a100-fp32.engine was built for" in result.stderr
    assert "expected [1, 8, 8, 3] to [8, 64, 64, 3]" in result.stderr
    assert "--execution stream" in result.stderr
    # ONNX Runtime may run it unless an engine was asked for
    told = infexport(*arguments).stderr
    assert "running on engine a100-fp32" in told
    assert "running on cpu" in told


def test_parity_of_an_engine(infexport, half, gpu):
    result = infexport("validate", "parity", half, "--engine", "a100-fp16")
    assert "ran on: engine a100-fp16, tensorrt-rtx 1.7.1.116" in result.stdout
    assert "(fp16: 2 eps sqrt(depth)" in result.stdout
    assert "parity holds" in result.stdout
    assert "several engines fit" in infexport("validate", "parity", half, "--provider", "engine", exit_code=2).stderr
    # within the tolerance of fp16, but not of fp32: the engine's precision sets the tolerance
    report = json.loads(infexport("validate", "parity", half, "--engine", "a100-fp16", "--json").stdout)
    assert all(1e-6 < case["bundle"]["relative"] < 5e-3 for case in report["cases"])
    assert report["tolerance"]["precision"] == "fp16"


def test_an_engine_that_was_changed_is_named_though_others_do_its_work(infexport, streaming, gpu, pictures):
    engine = next((streaming / "engines").glob("*.stream-*.engine"))
    engine.write_bytes(engine.read_bytes()[:-1])
    told = infexport("run-engine", streaming, pictures[0], "--size", "native").stderr
    assert f"not used: {engine.name}: the engine is not what its sidecar says" in told
    assert gpu.loaded == ["a100-fp32.engine"]


def damage(engine):
    content = bytearray(engine.read_bytes())
    content[len(content) // 2] ^= 1
    engine.write_bytes(content)


NOT_OURS = "the sidecar is not as infexport wrote it"


def stale(engine):
    sidecar = engine.with_name(engine.name + ".json")
    facts = json.loads(sidecar.read_text())
    sidecar.write_bytes(sealed(facts | {"graph": {"model.onnx": "0" * 64}}))


def without(name):
    def change(engine):
        sidecar = engine.with_name(engine.name + ".json")
        facts = json.loads(sidecar.read_text())
        del facts[name]
        sidecar.write_bytes(sealed(facts))

    return change


def other(**changes):
    def change(engine):
        sidecar = engine.with_name(engine.name + ".json")
        sidecar.write_bytes(sealed(json.loads(sidecar.read_text()) | changes))

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (damage, "the engine is not what its sidecar says"),
        (lambda engine: engine.unlink(), "the engine is missing"),
        (stale, "built from another graph than the bundle's"),
        (other(compute_capability="9.0"), "built for compute capability 9.0, this GPU has 8.0"),
        (other(backend_version="1.5.0"), "built with tensorrt-rtx 1.5.0, installed is 1.7.1.116"),
        (other(backend="tensorrt-lite"), "which this infexport does not know"),
        (other(profile={"image": [[1], [2]]}), NOT_OURS),
        (other(profile={"image": [[1], [1], [1, 2]]}), NOT_OURS),
        (other(graph={}), NOT_OURS),
        (other(chunk=0), NOT_OURS),
        (without("chunk"), NOT_OURS),
        (other(precision="fp12"), NOT_OURS),
        (other(profile={}), NOT_OURS),
        (
            other(profile={"pictures": [[1, 8, 8, 3], [1, 8, 8, 3], [1, 8, 8, 3]]}),
            NOT_OURS,
        ),
        (other(layers={"REDUCE": 3}), NOT_OURS),
        (
            lambda engine: engine.with_name(engine.name + ".json").write_text("[]"),
            NOT_OURS,
        ),
    ],
)
def test_an_engine_that_does_not_fit_is_refused_with_what_to_build(change, words, infexport, folder, gpu, pictures):
    change(folder / "engines" / "a100-fp32.engine")
    arguments = ("run-engine", folder, pictures[0], "--provider", "engine")
    result = infexport(*arguments, exit_code=2)
    assert words in result.stderr
    assert "infexport build-engine" in result.stderr
    # without --provider engine it is a warning, not an error
    told = infexport("run-engine", folder, pictures[0]).stderr
    assert "running on cpu" in told
    assert "no engine is used" in told
    assert words in told


def test_a_tampered_graph_is_noticed_before_its_engine(infexport, folder, gpu, pictures):
    damage(folder / "model.onnx.data")
    result = infexport("run-engine", folder, pictures[0], "--provider", "engine", exit_code=2)
    assert "the bundle was modified" in result.stderr
    assert gpu.loaded == []


def test_the_library_s_own_refusal_is_shown(infexport, folder, gpu, pictures):
    gpu.refuses = True
    result = infexport("run-engine", folder, pictures[0], "--provider", "engine", exit_code=2)
    assert "tensorrt-rtx refuses the engine a100-fp32.engine" in result.stderr
    assert "a serialized engine of another kind" in result.stderr
    assert "--target local --precision fp32" in result.stderr


def test_a_gpu_that_fails_is_a_failure_of_the_image(infexport, folder, gpu, pictures):
    gpu.fails = True
    result = infexport("run-engine", folder, pictures[0], exit_code=1)
    assert "the GPU failed in a100-fp32.engine" in result.stderr
    assert "illegal memory access" in result.stderr


def test_no_driver(infexport, folder, pictures, monkeypatch):
    result = infexport("run-engine", folder, pictures[0], "--provider", "engine", exit_code=2)
    assert "engines need an NVIDIA GPU and its driver" in result.stderr
    assert "--provider cpu" in result.stderr
    told = infexport("run-engine", folder, pictures[0], "--engine", "a100-fp32", exit_code=2).stderr
    assert "--provider cpu, without --engine" in told


def test_no_such_engine(infexport, folder, gpu, pictures):
    result = infexport("run-engine", folder, pictures[0], "--engine", "a100-int8", exit_code=2)
    assert "no engine a100-int8 for NVIDIA A100" in result.stderr
    assert "--target local --precision int8 --calibrate IMAGES" in result.stderr
    arguments = ("run-engine", folder, pictures[0], "--engine", "a100-fp32", "--provider", "cpu")
    assert "leave one of the two out" in infexport(*arguments, exit_code=2).stderr


def test_a_cache_of_kernels_that_cannot_be_written_is_no_error(tmp_path):
    cache = SimpleNamespace(serialize=lambda: b"kernels")
    tensorrt_libraries.write_cache(tmp_path / "a" / "b.cache", cache)
    assert (tmp_path / "a" / "b.cache").read_bytes() == b"kernels"
    (tmp_path / "file").touch()
    tensorrt_libraries.write_cache(tmp_path / "file" / "b.cache", cache)


@pytest.mark.parametrize("known", [True, False])
def test_kernels_that_were_compiled_are_kept(known, tmp_path, monkeypatch):
    """TensorRT-RTX compiles on the machine that runs the engine, and caches the result for the next run."""
    from contextlib import ExitStack

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    file = tmp_path / "infexport" / "kernels-tensorrt-rtx-0123456789abcdef.cache"
    if known:
        file.parent.mkdir()
        file.write_bytes(b"old")
    read = []
    cache = SimpleNamespace(deserialize=read.append, serialize=lambda: b"new")
    config = SimpleNamespace(create_runtime_cache=lambda: cache, set_runtime_cache=read.append)
    engine = SimpleNamespace(create_runtime_config=lambda: config, create_execution_context=lambda config: config)
    with ExitStack() as stack:
        assert TensorRTRTX().context(engine, "0123456789abcdef0123", stack) is config
        assert read == [b"old", cache][not known :]
    assert file.read_bytes() == b"new"


def test_inspect_loads_an_engine(infexport, folder, gpu):
    """Layers of the engine are listed next to the graph's nodes; inputs and outputs come from ONNX Runtime."""
    found = json.loads(infexport("inspect", folder, "--engine", "a100-fp32", "--json").stdout)
    assert found["operators"]["runs_on"].startswith("engine a100-fp32, ")
    assert found["operators"]["placement"] == found["placement"]
    assert [each["name"] for each in found["outputs"]] == ["logits", "features"]


def test_threads_take_turns_on_an_engine(folder, gpu):
    """An engine's outputs are always in the same memory, which the next call overwrites."""
    images = [*np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)]
    with Predictor(folder, size="native", provider="engine") as predictor:
        expected = [row.logits for row in predictor.predict(images)]
        gpu.slow = 0.01
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda image: predictor.predict([image])[0].logits, images * 3))
    assert all(np.array_equal(one, other) for one, other in zip(found, expected * 3, strict=True))
