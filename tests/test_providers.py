"""ONNX Runtime's providers: where nodes run is told, and none is another than asked for."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from infexport.errors import InfexportError
from infexport.runners import ort, spread
from infexport.targets import local_gpu

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


def test_nodes_on_several_providers_are_told():
    def part(provider, *operators):
        nodes = [SimpleNamespace(domain=domain, op_type=name) for domain, name in operators]
        return SimpleNamespace(ep_name=provider, get_nodes=lambda: nodes)

    parts = [
        part("CUDA", ("", "MatMul")),
        part("CPU", ("", "Shape"), ("com.microsoft", "Gelu")),
        part("CUDA", ("", "MatMul")),
    ]
    placement = ort.placement_of(SimpleNamespace(get_provider_graph_assignment_info=lambda: parts))
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
        monkeypatch.setattr(ort, "import_onnxruntime", lambda: fake)
        return fake

    return use


def test_the_rtx_provider_is_loaded_and_given_its_gpus(runtime, tmp_path):
    gpu, cpu = SimpleNamespace(ep_name=RTX), SimpleNamespace(ep_name="CPUExecutionProvider")
    fake = runtime([cpu, gpu])
    for _ in range(2):
        _, provider = ort.open_session(tmp_path / "model.onnx", "tensorrt-rtx", None)
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
        ort.open_session(tmp_path / "model.onnx", "tensorrt-rtx", None)
    assert "--provider cpu" in refused.value.hint


@pytest.mark.skipif(local_gpu() is not None, reason="this machine has a GPU, so its providers can be loaded")
@pytest.mark.parametrize(("provider", "words"), [("tensorrt-rtx", "cannot load"), ("cuda", "has no CUDA")])
def test_a_provider_this_machine_has_not(provider, words, infexport, golden_bundle):
    """As things are here, with the libraries themselves."""
    result = infexport("inspect", golden_bundle("reference_linear"), "--provider", provider, exit_code=2)
    assert words in result.stderr
