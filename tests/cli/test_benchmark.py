"""`benchmark`: its report, the sizes it leaves out, and its errors."""

import dataclasses
import json
import signal
import subprocess
import sys
from pathlib import Path

import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper
from PIL import Image

from infexport.evaluation.benchmark import benchmark, gemm
from infexport.evaluation.benchmark.result import Spread, speed_limit
from infexport.evaluation.flops import MatmulCost
from infexport.system import host, workers


def report_of(infexport, bundle, *arguments, exit_code=0):
    result = infexport("benchmark", bundle, *arguments, "--json", exit_code=exit_code)
    return json.loads(result.stdout)


@pytest.mark.parametrize("name", ["reference_linear", "torchvision_pure"])
def test_the_report(name, infexport, golden_bundle):
    arguments = ("--sizes", "32,48x32", "--batch-size", 2, "--repeats", 3, "--threads", 2)
    report = report_of(infexport, golden_bundle(name), *arguments)
    manifest = json.loads((golden_bundle(name) / "infexport.json").read_text())
    assert report["graph"]["model.onnx"] == manifest["files"]["model.onnx"]
    assert (report["variant"], report["precision"], report["folded"]) == (manifest["config"]["variant"], "fp32", True)
    assert report["machine"] == {
        "cpu": host.cpu_model(),
        "cores": host.usable_cores(),
        "threads": 2,
        "provider": "cpu",
        "runtime": f"onnxruntime {onnxruntime.__version__}",
    }
    rates = report["gemm"]["giga_operations_per_second"]
    assert list(rates) == ["float32"]
    assert 0 < rates["float32"]["min"] <= rates["float32"]["p50"] <= rates["float32"]["max"]
    assert [row["size"] for row in report["rows"]] == [[32, 32], [48, 32]]
    assert [row["tokens"] for row in report["rows"]] == [17, 25]
    for row in report["rows"]:
        assert row["status"] == "measured"
        seconds = row["seconds"]
        assert len(seconds["all"]) == 3
        assert 0 < seconds["min"] <= seconds["p50"] <= seconds["p90"] <= seconds["p99"] <= seconds["max"]
        assert "on_gpu" not in row
        assert row["images_per_second"] == pytest.approx(2 / seconds["p50"])
        assert row["share_of_limit"] == pytest.approx(row["limit_seconds"] / seconds["p50"])
        assert row["cold_start_seconds"] > seconds["max"]
        assert 2e7 < row["peak_memory_bytes"] < 5e8  # in the worker: this process has imported torch and more
        assert len(row["gemm_seconds"]["float32"]) == 3  # before the first, after two, and after the last
        work = row["multiply_adds"]
        rate = gemm.multiply_adds("float32") / Spread.of(row["gemm_seconds"]["float32"]).p50
        assert row["limit_seconds"] == pytest.approx(2 * (work["dense"] + work["attention"]) / rate)
        assert (work["attention"] > 0) == (report["variant"] == "pure_infsa")


def test_what_a_person_sees(infexport, golden_bundle, tmp_path):
    plot = tmp_path / "new" / "scaling.png"
    bundle = golden_bundle("reference_linear")
    result = infexport("benchmark", bundle, "--sizes", "32,48,32", "--repeats", 1, "--plot", plot)
    for words in ("GFLOP/s", "onnxruntime 1.", "linear_infsa, fp32, folded, batch 1", "share", host.cpu_model()):
        assert words in result.stdout
    assert [line.split()[:2] for line in result.stdout.splitlines()[-2:]] == [["32²", "17"], ["48²", "37"]]
    assert "48²: at least" in result.stderr
    with Image.open(plot) as image:
        image.load()
        assert image.format == "PNG"
        assert image.size == (1500, 645)
        assert len(image.convert("RGB").getcolors(1 << 20)) > 50


def test_a_size_that_would_take_too_long_is_left_out(infexport, golden_bundle, tmp_path):
    arguments = (golden_bundle("torchvision_pure"), "--sizes", "32,100000", "--max-seconds", 5, "--repeats", 1)
    plot = tmp_path / "scaling.png"
    report = report_of(infexport, *arguments, "--plot", plot)
    assert [row["status"] for row in report["rows"]] == ["measured", "skipped"]
    assert "more than --max-seconds 5" in report["rows"][1]["reason"]
    assert report["rows"][1]["limit_seconds"] > 5
    assert plot.is_file()
    result = infexport("benchmark", arguments[0], "--sizes", "100000", "--plot", tmp_path / "none.png")
    assert "100000² skipped: at least" in result.stdout
    assert "no plot" in result.stderr
    assert not (tmp_path / "none.png").exists()


def wrapped(monkeypatch, code):
    """Workers that run `code` first, with the request in `request`."""
    start = "import io, json, os, resource, runpy, signal, sys\ntext = sys.stdin.read()\nrequest = json.loads(text)\n"
    worker = "infexport.evaluation.benchmark.worker"
    end = f"\nsys.stdin = io.StringIO(text)\nrunpy.run_module({worker!r}, run_name='__main__')"
    monkeypatch.setattr(benchmark, "WORKER", [sys.executable, "-c", start + code + end])


DEATHS = {
    32: ("os.kill(os.getpid(), signal.SIGKILL)", "killed by SIGKILL: out of memory"),
    40: ("os.abort()", "killed by SIGABRT"),
    48: ("print('first\\nlast', file=sys.stderr); sys.exit(7)", "exit code 7: last"),
    56: ("print('{\"answ', end='', flush=True); os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"),
    # an address space that is large enough for the interpreter, but not for this image
    80000: ("resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))", "not enough memory"),
}
"""Size → code that makes its worker die, and the reason that is reported."""


def test_a_worker_that_dies_stops_no_other(infexport, golden_bundle, monkeypatch, tmp_path):
    code = "side = request.get('shape', [0, 0])[1]\n"
    wrapped(monkeypatch, code + "".join(f"if side == {side}: {death}\n" for side, (death, _) in DEATHS.items()))
    sizes = ",".join(map(str, [*DEATHS, 64]))
    arguments = ("--sizes", sizes, "--repeats", 1, "--max-seconds", 600, "--plot", tmp_path / "a.png")
    report = report_of(infexport, golden_bundle("reference_linear"), *arguments, exit_code=1)
    *failed, measured = report["rows"]
    assert measured["status"] == "measured"
    for row, (_, reason) in zip(failed, DEATHS.values(), strict=True):
        assert row["status"] == "failed"
        assert reason in row["reason"]
        assert "seconds" not in row
    assert (tmp_path / "a.png").is_file()


def test_a_failure_is_told_to_a_person(infexport, golden_bundle, monkeypatch):
    wrapped(monkeypatch, "if 'shape' in request:\n    os.kill(os.getpid(), signal.SIGKILL)")
    result = infexport("benchmark", golden_bundle("reference_linear"), "--sizes", "32", exit_code=1)
    assert "32² failed: the process was killed by SIGKILL" in result.stdout
    assert "32²: failed" in result.stderr


def test_nothing_runs_where_the_first_process_fails(infexport, golden_bundle, monkeypatch):
    wrapped(monkeypatch, "assert 'shape' not in request\nsys.exit(9)")
    result = infexport("benchmark", golden_bundle("reference_linear"), "--sizes", "32", exit_code=2)
    assert "exit code 9" in result.stderr


def test_an_interrupt_leaves_no_process(monkeypatch):
    started = []

    class Popen(subprocess.Popen):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            started.append(self)

    def interrupt(line):
        raise KeyboardInterrupt

    wrapped(monkeypatch, "print('{}', flush=True)\nsignal.pause()")
    monkeypatch.setattr(workers.subprocess, "Popen", Popen)
    monkeypatch.setattr(workers.json, "loads", interrupt)
    with pytest.raises(KeyboardInterrupt):
        workers.ask(benchmark.WORKER, {})
    assert [worker.returncode for worker in started] == [-signal.SIGKILL]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--sizes", "30"), ("30x30 is not a whole number of patches", "--sizes 32x32")),
        (("--sizes", "32x0"), ("'32x0' is not a size",)),
        (("--sizes", "32", "--repeats", 0), ("--repeats",)),
        (("--sizes", "32", "--max-seconds", 0), ("--max-seconds",)),
        (("--sizes", "32", "--provider", "cuda"), ("no CUDAExecutionProvider",)),
        (("--plot", "a.jpg"), ("unknown kind of picture", "expected .png")),
        (("--plot", "/dev/null/a.png"), ("cannot write the picture",)),
    ],
)
def test_wrong_usage(arguments, words, infexport, golden_bundle):
    result = infexport("benchmark", golden_bundle("reference_linear"), *arguments, exit_code=2)
    assert all(word in result.stderr for word in words)
    assert "²" not in result.stderr  # nothing was measured


def test_a_missing_matplotlib_is_named_before_anything_is_measured(infexport, golden_bundle, monkeypatch):
    from infexport.system import dependencies

    monkeypatch.setattr(dependencies, "installed", lambda module: module != "matplotlib")
    result = infexport("benchmark", golden_bundle("reference_linear"), "--plot", "a.png", exit_code=2)
    assert "pip install 'infexport[plot]'" in result.stderr
    assert "measuring" not in result.stderr


def with_patch(bundle, patch):
    config = dataclasses.replace(bundle.manifest.config, patch_size=patch, image_size=patch)
    return dataclasses.replace(bundle, manifest=dataclasses.replace(bundle.manifest, config=config))


def test_default_sizes_are_whole_patches(golden_bundle):
    from infexport.bundle import open_bundle

    bundle = open_bundle(golden_bundle("reference_linear"))
    assert benchmark.sizes_for(bundle) == [(side, side) for side in (224, 512, 1024, 2048, 4096)]
    bundle = with_patch(bundle, 14)
    assert benchmark.sizes_for(bundle) == [(side, side) for side in (224, 518, 1022, 2044, 4102)]
    bundle = with_patch(bundle, 3000)
    assert benchmark.sizes_for(bundle) == [(3000, 3000)]


def test_the_worker_imports_no_torch(golden_bundle):
    request = json.dumps(
        {"bundle": str(golden_bundle("reference_linear")), "provider": "cpu", "engine": None, "threads": 1}
    )
    code = "import sys; from infexport.evaluation.benchmark.worker import work\n"
    code += "from infexport.system.workers import serve; serve(work)\n"
    code += "print([m for m in ('torch', 'onnx', 'infvit.network', 'infsa_ops') if m in sys.modules], file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], input=request, capture_output=True, text=True, check=True)
    assert done.stderr == "[]\n"
    told = {}
    for line in done.stdout.splitlines():
        told |= json.loads(line)
    assert told["machine"]["threads"] == 1  # counted, not repeated
    assert len(told["gemm"]["float32"]) == 3


def test_the_limit_of_int8():
    """The limit takes dense products at the int8 rate and attention at the float32 rate, each a median."""
    seconds = {"float32": [3.0, 2.0, 9.0], "int8": [0.5, 0.5]}
    product = gemm.multiply_adds("float32")
    work = MatmulCost(dense=product, attention=2 * product)
    assert speed_limit(work, 10, "int8", seconds) == pytest.approx(10 * (0.5 + 2 * 3))
    assert speed_limit(work, 10, "fp32", seconds) == pytest.approx(10 * (3 + 2 * 3))
    assert speed_limit(work, 10, "fp16", seconds) == speed_limit(
        work, 10, "fp32", seconds
    )  # a CPU computes it in float32
    assert speed_limit(work, 10, "int8", seconds, "cuda") is None


@pytest.mark.parametrize(("precision", "provider"), [("fp16", "cuda"), ("bf16", "tensorrt")])
def test_the_limit_of_16_bits_on_a_gpu(precision, provider):
    """The limit takes all products at the float16 rate, which is measured with its own matrix size."""
    product = gemm.multiply_adds("float16")
    assert product == 8192 * 4096 * 8192
    work = MatmulCost(dense=product, attention=2 * product)
    assert speed_limit(work, 10, precision, {"float16": [0.5, 2.0, 1.0]}, provider) == pytest.approx(10 * 3)
    assert speed_limit(work, 10, precision, {"float32": [1.0]}, provider) is None
    assert speed_limit(work, 10, "fp32", {"float32": [1.0]}, provider) == pytest.approx(10 * 3 * 16)
    assert gemm.giga_operations(2.0, "float16") == product / 1e9


@pytest.mark.parametrize("provider", ["engine a100-fp16", "tensorrt-rtx"])
def test_what_onnx_runtime_does_not_multiply_has_no_limit(provider):
    assert gemm.limiting("fp16", provider) is None
    assert speed_limit(MatmulCost(1, 1), 1, "fp16", {}, provider) is None
    assert provider in gemm.absence("fp16", provider)
    assert gemm.limiting("int8", "cuda") is None
    assert "int8" in gemm.absence("int8", "cuda")


def test_the_spread():
    spread = Spread.of([float(value) for value in range(101)])
    assert (spread.p50, spread.p90, spread.p99, spread.min, spread.max) == (50, 90, 99, 0, 100)


def product(shape, operator, left, right, out):
    """Run the matrix product of a shape with a right side of ones."""
    rows, inner, columns = shape
    ones = helper.make_tensor("value", right, [1], [1])
    graph = helper.make_graph(
        [
            helper.make_node("ConstantOfShape", ["shape"], ["b"], value=ones),
            helper.make_node(operator, ["a", "b"], ["c"]),
        ],
        "gemm",
        [helper.make_tensor_value_info("a", left, [rows, inner])],
        [helper.make_tensor_value_info("c", out, [rows, columns])],
        [helper.make_tensor("shape", TensorProto.INT64, [2], [inner, columns])],
    )
    opset = helper.make_opsetid("", 20)
    return helper.make_model(graph, opset_imports=[opset], ir_version=10, producer_name="infexport")


PRODUCTS = {
    "float32": ("MatMul", TensorProto.FLOAT, TensorProto.FLOAT, TensorProto.FLOAT),
    "int8": ("MatMulInteger", TensorProto.UINT8, TensorProto.INT8, TensorProto.INT32),
    "float16": ("MatMul", *[TensorProto.FLOAT16] * 3),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", gemm.SHAPES)
def test_the_shipped_products_are_these(kind, tmp_path):
    file = Path(gemm.__file__).with_name(f"{kind}.onnx")
    assert onnx.load(file) == product(gemm.SHAPES[kind], *PRODUCTS[kind])
    onnx.checker.check_model(file, full_check=True)
    if kind == "float16":
        return  # on a CPU ONNX Runtime would add casts, and take seconds
    # ONNX Runtime folds the right side into a weight when it loads the graph, and packs it once
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    optimised = onnx.load(tmp_path / "optimised.onnx").graph
    assert [node.op_type for node in optimised.node] == [PRODUCTS[kind][0]]
    assert [list(tensor.dims) for tensor in optimised.initializer] == [list(gemm.SHAPES[kind][1:])]
    assert gemm.giga_operations(gemm.Gemm(kind, "cpu", 1).seconds()) > 0
