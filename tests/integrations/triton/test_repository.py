"""Packaged models agree with their configuration. test_server.py runs them in a server."""

import hashlib
import importlib
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelInstanceGroup

from infexport.bundle import open_bundle
from infexport.bundle.engine_record import ShapeRange
from infexport.bundle.integrity import sealed
from infexport.errors import InfexportError
from infexport.inference.prediction import Failure
from infexport.inference.runners.onnxruntime import Port
from infexport.integrations.triton.config import check_config

INPUTS = [Port("image", "uint8", ["batch", "height", "width", 3])]
OUTPUTS = [Port("logits", "float32", ["batch", 10]), Port("features", "float32", ["batch", 128])]


def config_in(folder):
    """Parse a configuration as Triton does: an unknown field or a value of a wrong type raises."""
    return text_format.Parse((folder / "config.pbtxt").read_text(), ModelConfig())


def files_in(folder):
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


def shape_of(tensor):
    return tensor.name, tensor.data_type, list(tensor.dims)


@pytest.fixture
def digits(zoo_bundle):
    return zoo_bundle("canvases-linear")


@pytest.fixture
def engines(digits, tmp_path):
    """A bundle, and a function that adds an engine to it: bytes, and a sidecar as build-engine writes it."""
    folder = shutil.copytree(digits, tmp_path / "engines")
    (folder / "engines").mkdir()

    def add(target="a100", backend="tensorrt", **changes):
        engine = folder / "engines" / f"{target}-fp16.engine"
        engine.write_bytes(f"{target}{backend}".encode())
        facts = {
            "target": target,
            "compute_capability": "8.0",
            "precision": "fp16",
            "backend": backend,
            "backend_version": "10.8.0",
            "sha256": hashlib.sha256(engine.read_bytes()).hexdigest(),
            "graph": open_bundle(folder).manifest.graph,
            "profile": {"image": [[1, 8, 8, 3], [2, 128, 96, 3], [8, 256, 256, 3]]},
            "chunk": None,
            "layers": {},
        }
        engine.with_name(engine.name + ".json").write_bytes(sealed(facts | changes))

    return folder, add


def test_onnxruntime(infexport, digits, tmp_path):
    told = infexport("package", "triton", digits, "-o", tmp_path / "r", "--name", "digits", "--instances", 2)
    folder = tmp_path / "r" / "digits"
    assert files_in(folder) == ["1/model.onnx/model.onnx", "1/model.onnx/model.onnx.data", "config.pbtxt", "labels.txt"]
    config = config_in(folder)
    assert (config.name, config.backend, config.platform) == ("digits", "onnxruntime", "onnxruntime_onnx")
    assert [*map(shape_of, config.input)] == [("image", 2, [-1, -1, 3])]
    assert [*map(shape_of, config.output)] == [("logits", 11, [10]), ("features", 11, [128])]
    assert config.HasField("dynamic_batching")
    assert [(group.count, group.kind) for group in config.instance_group] == [(2, ModelInstanceGroup.KIND_CPU)]
    assert list(config.model_warmup[0].inputs["image"].dims) == [64, 64, 3]
    labels = (folder / config.output[0].label_filename).read_text().splitlines()
    assert labels == open_bundle(digits).labels
    assert "input       image UINT8 [1…8, any, any, 3]" in told.stdout
    assert not [item for item in (tmp_path / "r").iterdir() if item.name != "digits"]
    assert str(tmp_path) not in (folder / "config.pbtxt").read_text()


def test_what_is_packaged_runs(infexport, digits, tmp_path):
    """ONNX Runtime opens the packaged files as Triton's backend does."""
    import onnxruntime

    infexport("package", "triton", digits, "-o", tmp_path, "--name", "digits")
    images = np.random.default_rng(0).integers(0, 256, (2, 24, 40, 3), dtype=np.uint8)
    logits = [
        onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"]).run(["logits"], {"image": images})[0]
        for file in (digits / "model.onnx", tmp_path / "digits" / "1" / "model.onnx" / "model.onnx")
    ]
    np.testing.assert_array_equal(*logits)


def test_options_reach_triton(infexport, digits, tmp_path):
    options = ("--max-batch-size", 4, "--max-queue-delay", 500, "--device", "gpu", "--threads", 3)
    document = json.loads(infexport("package", "triton", digits, "-o", tmp_path, *options, "--json").stdout)
    config = config_in(Path(document["model"]))
    assert config.name == Path(document["model"]).name == document["config"]["name"] == digits.name
    assert config.max_batch_size == document["config"]["max_batch_size"] == 4
    assert config.dynamic_batching.max_queue_delay_microseconds == 500
    assert config.instance_group[0].kind == ModelInstanceGroup.KIND_GPU
    assert config.parameters["intra_op_thread_count"].string_value == "3"


def test_normalised_pixels_and_no_labels(infexport, golden_bundle, tmp_path):
    bundle = golden_bundle("reference_linear", "--input", "float32")
    for backend in ("onnxruntime", "python"):
        infexport("package", "triton", bundle, "-o", tmp_path, "--name", backend, "--backend", backend)
    side = open_bundle(bundle).manifest.config.image_size
    config = config_in(tmp_path / "onnxruntime")
    assert [*map(shape_of, config.input)] == [("pixels", 11, [3, -1, -1])]
    assert list(config.model_warmup[0].inputs["pixels"].dims) == [3, side, side]
    # Predictor takes images, whatever the graph takes
    assert [*map(shape_of, config_in(tmp_path / "python").input)] == [("image", 2, [-1, -1, 3])]
    assert not config.output[0].label_filename
    assert not (tmp_path / "onnxruntime" / "labels.txt").exists()


def test_what_a_user_must_know_is_said(infexport, golden_bundle, tmp_path):
    bundle = golden_bundle("timm_softmax_linear")
    assert "not fine-tuned" in infexport("package", "triton", bundle, "-o", tmp_path).stderr


def test_labels_are_lines(infexport, digits, tmp_path):
    bundle = shutil.copytree(digits, tmp_path / "b")
    (bundle / "labels.json").write_text(json.dumps([f"class\n{i}" for i in range(10)]))
    manifest = json.loads((bundle / "infexport.json").read_text())
    manifest["files"]["labels.json"] = hashlib.sha256((bundle / "labels.json").read_bytes()).hexdigest()
    (bundle / "infexport.json").write_bytes(sealed(manifest))
    infexport("package", "triton", bundle, "-o", tmp_path / "r")
    lines = (tmp_path / "r" / "b" / "labels.txt").read_text().splitlines()
    assert lines == [f"class {i}" for i in range(10)]


def test_python(infexport, digits, tmp_path):
    options = ("--size", 96, "--memory", "2GiB", "--max-pixels", 10**6, "--threads", 2)
    infexport("package", "triton", digits, "-o", tmp_path, "--name", "digits", "--backend", "python", *options)
    folder = tmp_path / "digits"
    assert open_bundle(folder / "1" / "bundle").manifest == open_bundle(digits).manifest
    assert files_in(folder / "1") == ["bundle/" + file for file in files_in(digits)] + ["model.py"]
    config = config_in(folder)
    assert (config.backend, config.platform) == ("python", "")
    parameters = {name: value.string_value for name, value in config.parameters.items()}
    assert parameters == {
        "size": "96", "memory": str(2 << 30), "max_pixels": "1000000", "threads": "2", "provider": "cpu",
    }  # fmt: skip


def test_tensorrt(infexport, engines, tmp_path):
    folder, add = engines
    add()
    told = infexport("package", "triton", folder, "-o", tmp_path / "r", "--backend", "tensorrt")
    model = tmp_path / "r" / "engines"
    assert (model / "1" / "model.plan").read_bytes() == b"a100tensorrt"
    config = config_in(model)
    assert (config.backend, config.platform) == ("tensorrt", "tensorrt_plan")
    assert config.instance_group[0].kind == ModelInstanceGroup.KIND_GPU
    assert list(config.model_warmup[0].inputs["image"].dims) == [128, 96, 3]  # the engine's opt shape
    assert "the server needs tensorrt 10.8.0" in told.stderr


def test_an_engine_for_infexport_in_the_server(infexport, engines, tmp_path):
    folder, add = engines
    add(backend="tensorrt-rtx")
    add("l4")
    options = ("--backend", "python", "--engine", "a100-fp16")
    infexport("package", "triton", folder, "-o", tmp_path / "r", *options)
    model = tmp_path / "r" / "engines"
    (engine,) = open_bundle(model / "1" / "bundle").engines
    assert (engine.recorded.target, engine.state) == ("a100", "current")
    parameters = config_in(model).parameters
    assert (parameters["provider"].string_value, parameters["engine"].string_value) == ("engine", "a100-fp16")
    assert list(config_in(model).instance_group[0].gpus) == [0]


@pytest.mark.parametrize(
    ("made", "options", "words"),
    [
        ([], (), "it has no engines"),
        ([{"backend": "tensorrt-rtx"}], (), "runs only engines of TensorRT, not of TensorRT-RTX"),
        ([{"backend": "tensorrt-rtx"}], (), "--backend python --engine NAME"),
        ([{}], ("--engine", "h100-fp16"), "no engine h100-fp16 of the whole graph"),
        ([{}, {"target": "l4"}], (), "choose one: --engine a100-fp16"),
        ([{"graph": {"model.onnx": "0" * 64}}], (), "it has no engines"),
        ([{}], ("--max-batch-size", 9), "batch: image 1 to 9, the engine takes 1 to 8"),
        ([{"profile": {"image": [[2, 8, 8, 3]] * 3}}], (), "batch: image 1 to 8, the engine takes 2 to 2"),
        ([{"profile": {"pixels": [[1, 3, 8, 8]] * 2 + [[8, 3, 8, 8]]}}], (), "warm-up: image [3, 8, 8]"),
    ],
)
def test_engines_that_cannot_be_served(made, options, words, infexport, engines, tmp_path):
    folder, add = engines
    for changes in made:
        add(**changes)
    arguments = ("package", "triton", folder, "-o", tmp_path / "r", "--backend", "tensorrt", *options)
    assert words in infexport(*arguments, exit_code=2).stderr
    assert not (tmp_path / "r" / "engines").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--size", "native"), "--size is for --backend python, not onnxruntime"),
        (("--backend", "tensorrt", "--threads", 2), "--threads is for --backend onnxruntime or python, not tensorrt"),
        (("--engine", "a100-fp16"), "--engine is for --backend tensorrt or python"),
        (("--backend", "tensorrt", "--device", "cpu"), "engines run on a GPU"),
        (("--instances", "9" * 30), "is not in the range"),
        (("--name", "../digits"), "invalid name of a model: '../digits'"),
        (("--backend", "python", "--max-pixels", 4095), "images of the trained size would be refused"),
    ],
)
def test_what_makes_no_sense_is_said(options, words, infexport, digits, tmp_path):
    assert words in infexport("package", "triton", digits, "-o", tmp_path / "r", *options, exit_code=2).stderr
    assert not (tmp_path / "r").exists()


def test_a_bundle_is_no_repository(infexport, digits):
    assert "the output is a bundle" in infexport("package", "triton", digits, "-o", digits, exit_code=2).stderr


def test_a_model_that_exists(infexport, digits, tmp_path):
    arguments = ("package", "triton", digits, "-o", tmp_path, "--name", "digits")
    infexport(*arguments)
    infexport(*arguments[:-1], "others")  # next to it
    refused = infexport(*arguments, exit_code=2).stderr
    assert f"the model exists: {tmp_path / 'digits'}" in refused
    assert "--force" in refused
    infexport(*arguments, "--force", "--backend", "python")
    assert files_in(tmp_path / "digits")[-1] == "labels.txt"
    assert not (tmp_path / "digits" / "1" / "model.onnx").exists()
    (tmp_path / "digits" / "1" / "notes").touch()
    assert "they would be lost: 1/notes" in infexport(*arguments, "--force", exit_code=2).stderr
    (tmp_path / "digits" / "config.pbtxt").unlink()
    assert "exists and is not a model" in infexport(*arguments, "--force", exit_code=2).stderr
    assert sorted(item.name for item in tmp_path.iterdir()) == ["digits", "others"]


def test_nothing_is_left_of_what_disagrees(infexport, digits, tmp_path, monkeypatch):
    from infexport.integrations.triton import repository

    def wrong(*arguments):
        config = make_config(*arguments)
        config.output[0].dims[0] = 11
        return config

    make_config = repository.make_config
    monkeypatch.setattr(repository, "make_config", wrong)
    told = infexport("package", "triton", digits, "-o", tmp_path / "r", exit_code=2).stderr
    assert "output logits: ('TYPE_FP32', [11]), the graph has ('TYPE_FP32', [10])" in told
    assert list((tmp_path / "r").iterdir()) == []


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('name: "digits"', 'name: "other"', "name: other in the folder digits"),
        ('name: "image"', 'name: "picture"', "input picture: ('TYPE_UINT8', [-1, -1, 3]), the graph has none"),
        ("data_type: TYPE_UINT8", "data_type: TYPE_INT8", "input image: ('TYPE_INT8'"),
        ("dims: 3", "dims: 4", "input image: ('TYPE_UINT8', [-1, -1, 4]), the graph has"),
        ("dims: 128", "dims: 64", "output features: ('TYPE_FP32', [64])"),
        ('name: "features"', 'name: "pooled"', "output features: missing"),
        ("max_batch_size: 8", "max_batch_size: 16", "batch: image 1 to 16, the engine takes 1 to 8"),
        ("labels.txt", "names.txt", "names.txt: 0 labels for logits [10]"),
        ("dims: 64\n      dims: 64", "dims: 64", "warm-up: image [64, 3]"),
        ("dims: 64\n      dims: 64", "dims: 64\n      dims: 512", "warm-up: image [64, 512, 3]"),
        ("max_batch_size", "max_batch", 'no field named "max_batch"'),
        ("max_batch_size: 8", 'max_batch_size: "8"', "Couldn't parse integer"),
    ],
)
def test_planted_disagreements_are_found(old, new, words, infexport, digits, tmp_path):
    infexport("package", "triton", digits, "-o", tmp_path, "--name", "digits")
    file = tmp_path / "digits" / "config.pbtxt"
    profile = {"image": ShapeRange((1, 8, 8, 3), (1, 64, 64, 3), (8, 256, 256, 3))}
    check_config(file, "digits", INPUTS, OUTPUTS, profile)
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))
    with pytest.raises(InfexportError) as found:
        check_config(file, "digits", INPUTS, OUTPUTS, profile)
    assert words in found.value.details


def test_a_graph_of_fixed_batch_is_found(infexport, digits, tmp_path):
    infexport("package", "triton", digits, "-o", tmp_path, "--name", "digits")
    fixed = [Port("image", "uint8", [1, "height", "width", 3])]
    with pytest.raises(InfexportError) as found:
        check_config(tmp_path / "digits" / "config.pbtxt", "digits", fixed, OUTPUTS)
    assert "the graph's batch is fixed, 1" in found.value.details


def test_the_extra_is_named(infexport, digits, tmp_path, monkeypatch):
    from infexport.system import dependencies

    monkeypatch.setattr(dependencies, "installed", lambda module: module != "grpc")
    told = infexport("package", "triton", digits, "-o", tmp_path, exit_code=2).stderr
    assert "pip install 'infexport[triton]'" in told


class Capsule:
    """Wraps a DLPack capsule as an object that NumPy reads."""

    def __init__(self, capsule):
        self.capsule = capsule

    def __dlpack__(self, **options):
        return self.capsule

    def __dlpack_device__(self):
        return 1, 0


class Request:
    """Request of Triton with one input, whose shape can be read before its values."""

    def __init__(self, images, shape=None):
        self.images, self._shape = images, shape or images.shape

    def shape(self):
        return list(self._shape)

    def __dlpack__(self, **options):
        return self.images.__dlpack__()

    def __dlpack_device__(self):
        return 1, 0


@pytest.fixture
def served(infexport, digits, tmp_path, monkeypatch):
    """`model.py` in this process, with a substitute for Triton's module that collects log messages in `logged`."""
    infexport("package", "triton", digits, "-o", tmp_path, "--name", "digits", "--backend", "python")
    utils = ModuleType("triton_python_backend_utils")
    utils.logged = []
    utils.TritonModelException = type("TritonModelException", (Exception,), {})
    utils.Logger = SimpleNamespace(log_error=utils.logged.append)
    utils.TritonError = lambda message, code: SimpleNamespace(message=message, code=code)
    utils.TritonError.INVALID_ARG, utils.TritonError.INTERNAL = "invalid", "internal"
    utils.InferenceResponse = lambda output_tensors, error=None: SimpleNamespace(
        outputs=dict(output_tensors), error=error
    )
    utils.Tensor = SimpleNamespace(from_dlpack=lambda name, capsule: (name, np.from_dlpack(Capsule(capsule)).copy()))
    utils.get_input_tensor_by_name = lambda request, name: request
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", utils)
    monkeypatch.delitem(sys.modules, "infexport.integrations.triton.model", raising=False)
    module = importlib.import_module("infexport.integrations.triton.model")
    made = module.TritonPythonModel()
    from google.protobuf.json_format import MessageToJson

    config = MessageToJson(config_in(tmp_path / "digits"), preserving_proto_field_name=True)
    arguments = {"model_config": config, "model_repository": str(tmp_path / "digits"), "model_version": "1"}
    yield SimpleNamespace(model=made, arguments=arguments, utils=utils, folder=tmp_path / "digits")
    if hasattr(made, "_predictor"):
        made.finalize()
    sys.modules.pop("infexport.integrations.triton.model", None)


def test_every_request_has_its_own_answer(served, digits):
    """Requests have several sizes and batches, and one of them is refused."""
    import infexport

    random = np.random.default_rng(0)
    shapes = [(1, 64, 64, 3), (2, 40, 33, 3), (1, 1, 1, 3), (3, 64, 64, 3)]
    images = [random.integers(0, 256, shape, dtype=np.uint8) for shape in shapes]
    served.model.initialize(served.arguments)
    requests = [Request(each) for each in images]
    requests.insert(1, Request(images[0], (1, 8193, 8192, 3)))
    refused, found = (answers := served.model.execute(requests)).pop(1), answers
    assert refused.error.code == "invalid"
    assert "received 67,117,056, expected 1 to 67,108,864" in refused.error.message
    predictor = infexport.Predictor(digits, size="native", provider="cpu", batch_size=8)
    expected = predictor([image for each in images for image in each])
    for name in ("logits", "features"):
        assert [len(each.outputs[name]) for each in found] == [1, 2, 1, 3]
        np.testing.assert_array_equal(np.concatenate([each.outputs[name] for each in found]), expected[name])


def test_a_failure_is_that_request_s_alone(served):
    served.model.initialize(served.arguments)
    predict = served.model._predictor.predict
    bad = Failure("image 1", InfexportError("the model's answer is not finite: image 1"))
    served.model._predictor.predict = lambda images: [bad if i == 1 else row for i, row in enumerate(predict(images))]
    images = np.zeros((2, 64, 64, 3), np.uint8)
    one, two = served.model.execute([Request(images), Request(images)])
    assert (one.error.code, one.error.message, one.outputs) == ("internal", bad.text, {})
    assert two.error is None
    assert two.outputs["logits"].shape == (2, 10)


def test_a_bug_does_not_end_the_server(served):
    served.model.initialize(served.arguments)

    def broken(images):
        raise ZeroDivisionError("secret")

    predict, served.model._predictor.predict = served.model._predictor.predict, broken
    (answer,) = served.model.execute([Request(np.zeros((1, 64, 64, 3), np.uint8))])
    assert answer.error.message == "a bug in infexport, or in a library below it; ZeroDivisionError"
    assert served.utils.logged == ["ZeroDivisionError: secret"]
    served.model._predictor.predict = predict
    (answer,) = served.model.execute([Request(np.zeros((1, 64, 64, 3), np.uint8))])
    assert answer.error is None


def test_a_model_that_cannot_be_run_is_not_ready(served):
    (served.folder / "1" / "bundle" / "labels.json").write_text("[]")
    with pytest.raises(served.utils.TritonModelException, match="the bundle was modified"):
        served.model.initialize(served.arguments)
