"""GPU side of scripts/benchmarks/bench_peers.py, as far as a machine without a GPU can test it."""

import importlib
import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from support import TINY, relative_error

from infexport.evaluation.benchmark import gemm

pytestmark = pytest.mark.slow

SCRIPTS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def peers():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPTS)
        importlib.import_module("bench_peers")
        return importlib.import_module("peers")


@pytest.fixture
def tiny(peers, monkeypatch):
    for module in (peers.networks, peers.worker):
        monkeypatch.setattr(module, "CONFIGS", TINY)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_one_clear_line():
    done = subprocess.run(
        [sys.executable, SCRIPTS / "bench_peers.py", "--device", "cuda"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.splitlines() == [f"error: --device cuda: torch {torch.__version__} finds no NVIDIA GPU here"]
    assert done.stdout == ""


def parsed(monkeypatch, *arguments):
    bench_peers = importlib.import_module("bench_peers")
    monkeypatch.setattr(sys, "argv", ["bench_peers.py", *arguments])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return bench_peers.parse()


def test_the_settings(peers, monkeypatch):
    options = parsed(monkeypatch)
    assert (options.sizes, options.batches) == ([1024, 512], [1, 8])
    options = parsed(monkeypatch, "--device", "cuda", "--sizes", "512,224")
    assert (options.sizes, options.batches) == ([512, 512, 512, 224, 224, 224], [1, 8, 32] * 2)
    options = parsed(monkeypatch, "--sizes", "512", "--batch-size", "1,2", "--only", "linear-fp32")
    assert (options.sizes, options.batches) == ([512, 512], [1, 2])
    for wrong in (
        ["--engine", "fp16"],
        ["--device", "cuda", "--engine", "int8"],
        ["--batches", "1,1", "--batch-size", "1"],
    ):
        with pytest.raises(SystemExit):
            parsed(monkeypatch, *wrong)


def test_the_contenders(peers):
    chosen = peers.contenders.chosen
    names = [contender.name for contender in chosen(None, "cuda")]
    assert not [name for name in names if "engine" in name or "int8" in name]
    with_engines = [contender.name for contender in chosen(None, "cuda", ["fp16"])]
    assert set(with_engines) - set(names) == {"linear-engine-fp16", "pure-engine-fp16"}
    everyone = [*peers.contenders.CONTENDERS, *peers.contenders.ON_GPU]
    assert len({contender.label for contender in everyone if contender.family != "gemm"}) == len(
        {contender.name for contender in everyone if contender.family != "gemm"}
    )
    assert all(peers.contenders.BY_NAME[contender.name] == contender for contender in everyone)
    assert all(contender.precision in peers.ask.TOLERANCE for contender in everyone)
    assert {contender.product for contender in everyone if contender.family == "gemm"} == set(gemm.SHAPES)
    some = [contender.name for contender in chosen("linear-fp16,softmax-ort-fp16", "cuda")]
    assert some[4:] == ["linear-fp16", "softmax-eager-fp16", "softmax-ort-fp16"]
    with pytest.raises(ValueError, match="no contender: linear-int8"):
        chosen("linear-int8", "cuda")


IMAGES = np.random.default_rng(0).integers(0, 256, (2, 16, 40, 3), dtype=np.uint8)


def truth_of(peers, family):
    mean, std = (torch.tensor(values).double() for values in (peers.worker.MEAN, peers.worker.STD))
    pixels = ((torch.from_numpy(IMAGES) / 255 - mean) / std).permute(0, 3, 1, 2)
    with torch.no_grad():
        return peers.networks.peer_of(family).double()(pixels)


@pytest.mark.parametrize("name", ["linear-eager", "linear-eager-fp16", "linear-compile-folded", "softmax-eager-fp16"])
def test_torch_is_given_images_and_gives_logits(name, peers, tiny, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    contender = peers.contenders.BY_NAME[name]
    run = peers.on_gpu.torch_run(contender, IMAGES, peers.worker.MEAN, peers.worker.STD, "cpu")
    logits = run()
    assert logits.dtype == np.float32
    assert relative_error(logits, truth_of(peers, contender.family)) <= (5e-3 if "fp16" in name else 1e-5)
    assert not torch.backends.cuda.matmul.allow_tf32
    assert not torch.backends.cudnn.allow_tf32


def test_a_plain_export_in_float16(peers, tiny, tmp_path):
    contender = peers.contenders.BY_NAME["linear-ort-fp16"]
    peers.worker.prepare(contender, tmp_path, "32,32,32", "1,1,1")
    file = tmp_path / "linear-ort-fp16.onnx"
    assert onnx.load(file).graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT16
    pixels = ((IMAGES / 255 - np.array(peers.worker.MEAN)) / np.array(peers.worker.STD)).transpose(0, 3, 1, 2)
    run = peers.on_gpu.plain_export(file, np.ascontiguousarray(pixels, np.float16), 1, "cpu")
    assert relative_error(run(), truth_of(peers, "linear")) <= 5e-3
    assert run().dtype == np.float32


def test_an_engine_is_built_for_all_settings(peers, tiny, tmp_path, monkeypatch):
    from infexport.cli import cli

    told = []
    monkeypatch.setattr(peers.worker, "run_infexport", lambda *command: told.append([str(word) for word in command]))
    peers.worker.prepare(peers.contenders.BY_NAME["linear-engine-bf16"], tmp_path, "224,512,1024", "1,1,32")
    convert, build = told
    assert convert[convert.index("--precision") + 1] == "fp32"
    assert build == ["build-engine", str(tmp_path / "linear-engine-bf16"), "--target", "local", "--precision", "bf16",
                     "--sizes", "224,512,1024", "--batch", "1,1,32"]  # fmt: skip
    cli.commands["build-engine"].make_context("build-engine", build[1:])  # it parses

    done = []

    def run(command, **options):
        done.append(command)
        return Namespace(returncode=0)

    monkeypatch.setattr(peers.ask.subprocess, "run", run)
    peers.ask.prepare_all([peers.contenders.BY_NAME["linear-engine-bf16"]], tmp_path, [(512, 1), (224, 32), (1024, 8)])
    assert done[0][-2:] == ["224,512,1024", "1,1,32"]


def test_a_burst(peers, monkeypatch):
    clock = [0.0]
    times = iter([0.05, 0.01, 0.2, 9.0])

    def run():
        clock[0] += next(times)

    monkeypatch.setattr(peers.on_gpu.time, "perf_counter", lambda: clock[0])
    assert peers.on_gpu.burst(run) == pytest.approx(0.05)
    assert next(times) == 9.0  # 0.26 s were enough


def test_contenders_come_one_after_the_other(peers, tmp_path, monkeypatch):
    open_now, most = set(), []

    class Worker:
        def __init__(self, contender, folder, threads, images, device):
            assert device == "cuda"
            self.name = contender.name
            open_now.add(self.name)
            most.append(len(open_now))
            if contender.family != "gemm":
                factor = 1.5 if self.name == "linear-ort" else 1.001
                np.save(folder / f"{self.name}.logits.npy", factor * np.ones((1, 5)))

        def answer(self):
            return {}

        def run(self):
            return {"seconds": 0.002, "peak_memory": None}

        def close(self):
            open_now.remove(self.name)

    monkeypatch.setattr(peers.ask, "Worker", Worker)
    contenders = [
        peers.contenders.BY_NAME[name] for name in ("gemm-ort-float16", "linear-eager", "linear-ort", "linear-fp16")
    ]
    options = Namespace(device="cuda", threads=None, warmup=1, rounds=3)
    entries = peers.ask.measure(32, 1, {}, contenders, tmp_path, options)
    assert most == [1] * 4
    assert [len(entry.seconds) for entry in entries] == [3, 3, 0, 3]
    assert "its logits are not its family's" in entries[2].reason  # the family's first ran in another group


def test_the_report(peers, tmp_path):
    seconds = {"gemm-ort-float32": [0.002] * 3, "gemm-ort-float16": [0.004] * 3}
    seconds |= {"gemm-torch-float32": [0.003] * 3, "gemm-torch-float16": [0.002, 0.004, 0.005]}
    seconds |= {"linear-eager-fp16": [0.009] * 3, "linear-fp32": [0.018] * 3, "linear-fp16": [0.003] * 3}
    seconds |= {"pure-fp16": [0.006] * 3, "linear-engine-fp16": [0.0015] * 3}
    contenders = peers.contenders.chosen(None, "cuda", ["fp16"])
    entries = [
        peers.ask.Entry(contender, times, 0.0, None if contender.name == "pure-fp16" else 10**9)
        if (times := seconds.get(contender.name))
        else peers.ask.Entry(contender, reason="not enough memory")
        for contender in contenders
    ]
    rows = [peers.report.row_of(entry, entries, 1024, 32, "cuda") for entry in entries]
    machine = {"cpu": "Beads", "cores": 2, "threads": 2, "gpu": "Abacus"}
    report = {"machine": machine, "versions": {"torch": "2"}, "rounds": 3}
    report |= {"settings": [{"side": 1024, "batch": 32, "rows": rows}]}
    report = json.loads(json.dumps(report))
    found = {row["name"]: row for row in report["settings"][0]["rows"]}
    eager, ours = found["linear-eager-fp16"], found["linear-fp16"]
    assert eager["times_ours"] == pytest.approx({"linear-fp32": 0.5, "linear-fp16": 3})
    product = gemm.multiply_adds("float16")
    tokens, width = 64 * 64 + 1, 1024
    # 28 E² by float16 in ONNX Runtime, 48 E² in torch; a product in float32 has another size
    assert ours["limit"] == pytest.approx(32 * tokens * 28 * width**2 * 0.004 / product)
    assert eager["limit"] == pytest.approx(32 * tokens * 48 * width**2 * 0.004 / product)
    assert found["linear-fp32"]["limit"] == pytest.approx(32 * tokens * 28 * width**2 * 0.002 / (product / 16))
    assert found["gemm-torch-float16"]["giga_operations_per_second"] == pytest.approx(2 * product / 0.004 / 1e9)
    # attention by float16, too
    pure = peers.report.matmul_cost(peers.networks.CONFIGS["pure"], True, tokens)
    assert found["pure-fp16"]["limit"] == pytest.approx(32 * (pure.dense + pure.attention) * 0.004 / product)
    assert found["linear-engine-fp16"]["limit"] is None

    text = peers.report.table(report)
    assert text.startswith("Abacus; Beads, 2 cores")
    assert "| contender | median, ms | minimum to maximum | × linear-fp32 | × linear-fp16 |" in text
    assert "| linear: torch, eager, fp16 | 9.000 | 9.000 to 9.000 | 0.50 | 3.00 |" in text
    assert "| linear: infexport engine fp16 | 1.500 | 1.500 to 1.500 | 0.08 | 0.50 | - | 1000 |" in text
    assert "- gemm-torch-float16: 137439 G operations/s (109951 to 274878)\n" in text
    assert "| pure: infexport fp16 | 6.000 |" in text
    assert "| - | 0e+00 |" in text  # no NVML
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in lines} == {9}
    peers.report.draw(report, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        image.load()
        assert min(image.size) > 400
