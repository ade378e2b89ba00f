"""`benchmark` on a simulated GPU: clock, counters and runner are fakes, the arithmetic is real."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from fake_nvml import FakeNvml, install
from PIL import Image

from infexport.errors import InfexportError
from infexport.evaluation.benchmark import benchmark, gemm, worker
from infexport.inference.runners import onnxruntime

WATTS = 250


class Machine(FakeNvml):
    """A fake GPU: a run takes 10 ms, every 25th run 50 ms, at 250 W; a model takes 2 GB."""

    def __init__(self):
        super().__init__()
        self.now, self.runs, self.counts = 0.0, 0, True

    def perf_counter(self):
        return self.now

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        self.millijoules = 1e3 * WATTS * self.now if self.counts else None
        return super().nvmlDeviceGetTotalEnergyConsumption(handle)


class FakeRunner:
    def __init__(self, machine, provider, precision):
        self.machine, self.provider, self.precision, self.version = machine, provider, precision, "fake 1.0"
        self.open = False

    def __enter__(self):
        self.open = True
        self.machine.used += 2 * 10**9
        return self

    def __exit__(self, *error):
        self.open = False
        self.machine.used -= 2 * 10**9

    def takes(self, shape):
        return shape[1] <= 64

    def run(self, images):
        assert self.open
        self.machine.runs += 1
        self.machine.now += 0.05 if self.machine.runs % 25 == 0 else 0.01
        return {"logits": np.zeros((len(images), 2))}


class FakeGemm:
    """A product that takes 10 ms."""

    made: list = []  # noqa: RUF012

    def __init__(self, kind, provider, threads):
        self.made.append((kind, provider))

    def seconds(self):
        return 0.01


@pytest.fixture
def machine(monkeypatch):
    """A fake machine; `machine.runs_on(provider, precision)` sets what `RunnerFactory` opens."""
    machine = Machine()
    install(monkeypatch, machine)
    monkeypatch.setattr(worker, "time", machine)
    monkeypatch.setattr(worker, "Gemm", FakeGemm)
    monkeypatch.setattr(FakeGemm, "made", [])

    def ask(command, request, heard=lambda message: None):
        """The worker in this process."""
        answer = {}

        def tell(message):
            message = json.loads(json.dumps(message))
            answer.update(message)
            heard(message)

        worker.work(json.loads(json.dumps(request)), tell)
        return answer

    def runs_on(provider, precision):
        opening = SimpleNamespace(runner=lambda: FakeRunner(machine, provider, precision))
        monkeypatch.setattr(worker, "RunnerFactory", lambda *arguments: opening)

    monkeypatch.setattr(benchmark, "ask", ask)
    machine.runs_on = runs_on
    return machine


def report_of(infexport, bundle, *arguments):
    return json.loads(infexport("benchmark", bundle, *arguments, "--json").stdout)


def test_the_report(machine, infexport, golden_bundle):
    machine.runs_on("cuda", "fp16")
    bundle = golden_bundle("torchvision_pure")
    report = report_of(infexport, bundle, "--sizes", 32, "--batch-size", 4)
    assert report["machine"]["gpu"] == "Abacus GPU-aaaa-1"
    assert report["precision"] == "fp16"
    assert report["gemm"]["rows_inner_columns"] == {"float16": [8192, 4096, 8192]}
    assert FakeGemm.made == [("float16", "cuda")] * 2  # before everything, and after the size
    (row,) = report["rows"]
    seconds = row["seconds"]
    assert len(seconds["all"]) == 100  # the default number, which takes 1.16 s
    assert (seconds["p50"], seconds["p90"], seconds["max"]) == pytest.approx((0.01, 0.01, 0.05))
    assert seconds["p99"] == pytest.approx(0.05)
    assert row["on_gpu"]["missing"] == []
    assert row["on_gpu"]["peak_memory_bytes"] == 2 * 10**9
    assert row["on_gpu"]["joules_per_image"] == pytest.approx(WATTS * sum(seconds["all"]) / 400, rel=1e-3)
    assert row["images_per_second"] == pytest.approx(400)
    work = row["multiply_adds"]
    assert work["attention"] > 0
    least = 4 * (work["dense"] + work["attention"]) * 0.01 / gemm.multiply_adds("float16")
    assert row["limit_seconds"] == pytest.approx(least)
    assert row["share_of_limit"] == pytest.approx(least / 0.01)
    assert row["gemm_seconds"] == {"float16": [0.01] * 3}


def test_runs_go_on_until_energy_means_something(machine, infexport, golden_bundle):
    machine.runs_on("cuda", "fp32")
    report = report_of(infexport, golden_bundle("reference_linear"), "--sizes", 32, "--repeats", 3)
    seconds = report["rows"][0]["seconds"]["all"]
    assert 1 <= sum(seconds) < 1.05
    assert report["rows"][0]["on_gpu"]["joules_per_image"] == pytest.approx(
        WATTS * sum(seconds) / len(seconds), rel=1e-3
    )
    assert list(report["rows"][0]["gemm_seconds"]) == ["float32"]
    # the first run and half a second of warm-up are not counted
    assert machine.runs - len(seconds) >= 1 + 30


def test_what_a_person_sees(machine, infexport, golden_bundle):
    machine.runs_on("cuda", "fp16")
    result = infexport("benchmark", golden_bundle("reference_linear"), "--sizes", 32, "--batch-size", 4)
    header, row = (line.split() for line in result.stdout.splitlines()[-2:])
    columns = "size,tokens,p50 ms,p90 ms,p99 ms,min ms,max ms,images/s,J/image,peak MB,GPU MB,cold s,limit ms,share"
    assert " ".join(header) == columns.replace(",", " ")
    assert row[2:5] == ["10", "10", "50"]
    assert row[7] == "400"
    assert row[8] == "0.725"  # 1.16 s at 250 W, 400 images
    assert row[10] == "2000"
    assert ", Abacus GPU-aaaa-1\n" in result.stdout
    assert "limit       float16 54976 GFLOP/s (54976 to 54976): [8192,4096] x [4096,8192]\n" in result.stdout


def test_a_gpu_that_does_not_count_energy(machine, infexport, golden_bundle):
    machine.runs_on("cuda", "fp16")
    machine.counts = False
    arguments = (golden_bundle("reference_linear"), "--sizes", "32,48")
    result = infexport("benchmark", *arguments)
    assert "J/image" not in result.stdout
    assert "GPU MB" in result.stdout
    assert result.stdout.count("not measured: energy: NVML: Not Supported\n") == 1
    (row, _) = report_of(infexport, *arguments)["rows"]
    assert row["on_gpu"] == {
        "peak_memory_bytes": 2 * 10**9,
        "joules_per_image": None,
        "missing": ["energy: NVML: Not Supported"],
    }


def test_no_nvml_at_all(machine, infexport, golden_bundle):
    machine.runs_on("cuda", "fp16")
    machine.driver = False
    result = infexport("benchmark", golden_bundle("reference_linear"), "--sizes", 32)
    assert "J/image" not in result.stdout
    assert "GPU MB" not in result.stdout
    assert "not measured: energy and GPU memory: NVML: Driver Not Loaded" in result.stdout


def test_engines_have_no_limit(machine, infexport, golden_bundle, tmp_path):
    machine.runs_on("engine a100-fp16", "fp16")
    bundle = golden_bundle("reference_linear")
    arguments = ("--sizes", "32,48,96", "--max-seconds", 1e-9, "--plot", tmp_path / "a.png")
    result = infexport("benchmark", bundle, *arguments)
    assert "limit       none: engine a100-fp16 runs without ONNX Runtime's CUDA provider" in result.stdout
    assert ", fp16, folded" in result.stdout  # precision of the engine: the bundle is fp32
    *rows, larger, _ = (line.split() for line in result.stdout.splitlines()[-4:])
    assert [(row[0], row[-2:]) for row in rows] == [("32²", ["-", "-"]), ("48²", ["-", "-"])]
    assert larger[-1] == "skipped"  # larger than the engine takes
    assert "96² skipped: engine a100-fp16 was not built for this size and batch" in result.stdout
    assert FakeGemm.made == []
    with Image.open(tmp_path / "a.png") as image:
        image.load()
        assert len(image.convert("RGB").getcolors(1 << 20)) > 50
    report = report_of(infexport, bundle, *arguments)
    assert report["gemm"] == {"rows_inner_columns": {}, "giga_operations_per_second": {}}
    assert [row["status"] for row in report["rows"]] == ["measured", "measured", "skipped"]
    assert all(row["limit_seconds"] is None for row in report["rows"])
    assert report["rows"][0]["share_of_limit"] is None
    assert report["rows"][0]["on_gpu"]["joules_per_image"] > 0


class FakeOnnxRuntime:
    """A fake ONNX Runtime for a matrix product, also its session and binding; a run takes 8 ms."""

    def __init__(self, got):
        self.got, self.now, self.told = got, 0.0, {}
        self.OrtValue = self

    def SessionOptions(self):
        return SimpleNamespace(add_session_config_entry=lambda *entry: None)

    def InferenceSession(self, graph, options, providers):
        self.told |= {"graph": graph.name, "providers": providers}
        return self

    def get_providers(self):
        return [self.got]

    def io_binding(self):
        return self

    def ortvalue_from_numpy(self, array, device):
        return ("from", array.shape, array.dtype, device)

    def ortvalue_from_shape_and_type(self, shape, kind, device):
        return ("of", shape, np.dtype(kind), device)

    def bind_ortvalue_input(self, name, value):
        self.told[name] = value

    def bind_ortvalue_output(self, name, value):
        self.told[name] = value

    def run_with_iobinding(self, binding):
        self.waiting = True

    def synchronize_outputs(self):
        assert self.waiting
        self.now += 0.008

    def perf_counter(self):
        return self.now


def test_a_product_on_a_gpu(monkeypatch):
    fake = FakeOnnxRuntime("CUDAExecutionProvider")
    monkeypatch.setattr(gemm, "import_onnxruntime", lambda: fake)
    monkeypatch.setattr(gemm, "time", fake)
    product = gemm.Gemm("float16", "tensorrt", None)
    assert fake.told["graph"] == "float16.onnx"
    assert fake.told["providers"] == [("CUDAExecutionProvider", {"use_tf32": "0"})]  # as for the model itself
    assert fake.told["a"] == ("from", (8192, 4096), np.float16, "cuda")
    assert fake.told["c"] == ("of", [8192, 8192], np.float16, "cuda")
    assert fake.now == 0.008  # once, when it was created
    assert product.seconds() == pytest.approx(0.008)
    assert fake.now == pytest.approx(0.064)  # the mean of 7 runs, which take 50 ms


def test_a_product_that_gets_no_gpu(monkeypatch):
    monkeypatch.setattr(gemm, "import_onnxruntime", lambda: FakeOnnxRuntime("CPUExecutionProvider"))
    with pytest.raises(InfexportError, match="gave no CUDAExecutionProvider"):
        gemm.Gemm("float32", "cuda", None)


def test_float32_on_a_gpu_is_not_rounded_to_tf32():
    assert onnxruntime.with_options("cuda") == ("CUDAExecutionProvider", {"use_tf32": "0"})
    assert onnxruntime.with_options("cpu") == "CPUExecutionProvider"
