"""ONNX Runtime's providers: where nodes run is told, and none is another than asked for."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from infexport.bundle import seal
from infexport.bundle.manifest import FILE, read_manifest
from infexport.errors import InfexportError
from infexport.inference.runners import onnxruntime, spread
from infexport.system.gpus import local_gpu

EXTRA = helper.make_tensor_value_info("more", TensorProto.FLOAT, [1])
RTX = "NvTensorRTRTXExecutionProvider"


def test_the_table_of_nodes(infexport, golden_bundle):
    result = infexport("inspect", golden_bundle("reference_pure"), "--provider", "cpu")
    assert "runs on     cpu, onnxruntime 1." in result.stdout
    header, *rows = result.stdout[result.stdout.index("operator ") :].partition("\n\n")[0].splitlines()
    assert header.split() == ["operator", "model.onnx", "CPUExecutionProvider"]
    counts = {name: int(count) for name, _, count in (row.split() for row in rows) if count != "-"}
    assert counts["MatMul"] > 10
    assert counts.pop("all") == sum(counts.values())
    document = json.loads(infexport("inspect", golden_bundle("reference_pure"), "--provider", "cpu", "--json").stdout)
    assert document["placement"]["CPUExecutionProvider"] == counts
    assert "placement" not in json.loads(infexport("inspect", golden_bundle("reference_pure"), "--json").stdout)


def test_nothing_of_what_is_run_is_sent_to_anyone(golden_bundle, tmp_path):
    """ONNX Runtime 1.32 and later: its telemetry leaves a file in the temporary folder, if it is not told in time."""
    graph = golden_bundle("reference_pure") / "model.onnx"
    code = f"from infexport.inference.runners import onnxruntime; onnxruntime.open_session({str(graph)!r}, 'cpu', 1)"
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment | {"TMPDIR": str(tmp_path)})
    assert list(tmp_path.iterdir()) == []


def damaged(bundle: Path, folder: Path, change: Callable[[onnx.ModelProto], None], **fields: Any) -> Path:
    """The bundle again, with another graph, or another config, and hashes that fit."""
    shutil.copytree(bundle, folder)
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    change(model)
    onnx.save(model, folder / "model.onnx")
    seal_again(folder, **fields)
    return folder


def seal_again(folder: Path, **fields: Any) -> None:
    manifest = read_manifest(folder / FILE)
    (folder / FILE).unlink()  # it is none of its files
    seal(folder, dataclasses.replace(manifest, config=dataclasses.replace(manifest.config, **fields)))


@pytest.mark.parametrize(
    ("change", "fields", "told"),
    [
        (lambda model: None, {"embed_dim": 96}, "features"),
        (lambda model: model.graph.output.pop(1), {}, "features: none"),
        (lambda model: model.graph.input.add().CopyFrom(EXTRA), {}, "2 inputs, expected one"),
    ],
)
def test_a_graph_that_is_not_the_manifests_is_refused(change, fields, told, infexport, golden_bundle, tmp_path):
    bundle = damaged(golden_bundle("reference_pure"), tmp_path / "bundle", change, **fields)
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    result = infexport("run-engine", bundle, tmp_path / "a.png", "--size", "native", exit_code=1)
    assert "error: model.onnx is not the graph that the manifest describes" in result.stderr
    assert told in result.stderr


def test_what_fails_in_a_run_is_told_once_and_by_us(infexport, golden_bundle, tmp_path, capfd):
    """ONNX Runtime's log writes to the terminal itself: in colour, with names that the graph chose."""

    def break_shape(model: onnx.ModelProto) -> None:
        name = model.graph.output[0].name
        for node in model.graph.node:
            node.output[:] = ["kept" if each == name else each for each in node.output]
        model.graph.initializer.append(numpy_helper.from_array(np.array([7, 7, 7]), "never"))
        model.graph.node.append(helper.make_node("Reshape", ["kept", "never"], [name], "erase\x1b[2J"))

    bundle = damaged(golden_bundle("reference_pure"), tmp_path / "bundle", break_shape)
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    result = infexport("run-engine", bundle, tmp_path / "a.png", "--size", "native", exit_code=1)
    assert result.stderr.count("error: ") == 1
    assert "\x1b" not in result.stderr
    assert capfd.readouterr() == ("", "")


def test_a_graph_without_centrality_is_refused(infexport, golden_bundle, tmp_path):
    bundle = tmp_path / "bundle"
    shutil.copytree(golden_bundle("reference_pure"), bundle)
    shutil.copy(bundle / "model.onnx", bundle / "centrality.onnx")
    seal_again(bundle)
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    run = ("run-engine", bundle, tmp_path / "a.png", "--centrality", "-o", tmp_path / "o.npz")
    assert "centrality: none" in infexport(*run, exit_code=1).stderr


@pytest.mark.parametrize("name", ["head", "start", "embed"])
def test_a_stage_that_gives_another_shape_is_refused(name, infexport, zoo_bundle, tmp_path):
    """A sum, or the answer, has twice as many numbers; the stage after the first is where that is met."""
    bundle = tmp_path / "bundle"
    shutil.copytree(zoo_bundle("digits-linear"), bundle)
    (file,) = bundle.glob(f"stream-*-{name}.onnx")
    model = onnx.load(file, load_external_data=False)
    output = model.graph.output[0 if name == "head" else 1].name
    for node in model.graph.node:
        node.output[:] = ["kept" if each == output else each for each in node.output]
    twice = helper.make_node("Concat", ["kept", "kept"], [output], axis=-1)
    model.graph.node.append(twice)
    for each in model.graph.output:
        each.type.CopyFrom(helper.make_tensor_type_proto(TensorProto.FLOAT, None))
    onnx.save(model, file)
    seal_again(bundle)
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    run = ("run-engine", bundle, tmp_path / "a.png", "--size", "native", "--execution", "stream")
    result = infexport(*run, exit_code=1)
    assert result.stderr.count("error: ") == 1
    assert "error: stream-0" in result.stderr


def test_nodes_on_several_providers_are_told():
    def part(provider, *operators):
        nodes = [SimpleNamespace(domain=domain, op_type=name) for domain, name in operators]
        return SimpleNamespace(ep_name=provider, get_nodes=lambda: nodes)

    parts = [
        part("CUDA", ("", "MatMul")),
        part("CPU", ("", "Shape"), ("com.microsoft", "Gelu")),
        part("CUDA", ("", "MatMul")),
    ]
    placement = onnxruntime.read_placement(SimpleNamespace(get_provider_graph_assignment_info=lambda: parts))
    assert placement == {"CUDA": {"MatMul": 2}, "CPU": {"Shape": 1, "com.microsoft::Gelu": 1}}
    assert spread(placement) == "2 nodes on CUDA, 2 nodes on CPU"
    assert spread({"CUDA": placement["CUDA"]}) == ""


class FakeRuntime:
    """An ONNX Runtime that finds `devices` once the provider's library is registered."""

    def __init__(self, devices, registers=True):
        self._devices, self._registers = devices, registers
        self.registered = []
        self.given = None
        fake = self

        class SessionOptions:
            def add_session_config_entry(self, name, value):
                pass

            def add_provider_for_devices(self, devices, options):
                fake.given = devices

        class InferenceSession:
            def __init__(self, graph, sess_options, providers, enable_fallback):
                assert providers is None

            def get_providers(self):
                return [RTX]

        self.SessionOptions, self.InferenceSession = SessionOptions, InferenceSession

    def get_available_providers(self):
        return ["CPUExecutionProvider"]

    def get_ep_devices(self):
        return self._devices if self.registered else []

    def register_execution_provider_library(self, name, library):
        if not self._registers:
            raise RuntimeError("libcuda.so.1: cannot open shared object file")
        self.registered.append(name)


@pytest.fixture
def runtime(monkeypatch):
    def use(*arguments):
        fake = FakeRuntime(*arguments)
        monkeypatch.setattr(onnxruntime, "import_onnxruntime", lambda: fake)
        return fake

    return use


def test_the_rtx_provider_is_loaded_and_given_its_gpus(runtime, tmp_path):
    gpu, cpu = SimpleNamespace(ep_name=RTX), SimpleNamespace(ep_name="CPUExecutionProvider")
    fake = runtime([cpu, gpu])
    for _ in range(2):
        _, provider = onnxruntime.open_session(tmp_path / "model.onnx", "tensorrt-rtx", None)
        assert provider == "tensorrt-rtx"
    assert fake.given == [gpu]
    assert fake.registered == [RTX]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([], False), "cannot load NvTensorRTRTXExecutionProvider"),
        (([],), "NvTensorRTRTXExecutionProvider finds no GPU"),
    ],
)
def test_the_rtx_provider_without_a_gpu(arguments, words, runtime, tmp_path):
    runtime(*arguments)
    with pytest.raises(InfexportError, match=words) as refused:
        onnxruntime.open_session(tmp_path / "model.onnx", "tensorrt-rtx", None)
    assert "--provider cpu" in refused.value.hint


@pytest.mark.skipif(local_gpu() is not None, reason="this machine has a GPU, so its providers can be loaded")
@pytest.mark.parametrize(("provider", "words"), [("tensorrt-rtx", "cannot load"), ("cuda", "has no CUDA")])
def test_a_provider_this_machine_has_not(provider, words, infexport, golden_bundle):
    """As things are here, with the libraries themselves."""
    result = infexport("inspect", golden_bundle("reference_linear"), "--provider", provider, exit_code=2)
    assert words in result.stderr
