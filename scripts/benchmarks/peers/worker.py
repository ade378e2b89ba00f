"""What a contender's process does: make what it runs, or run it when asked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from infexport.bundle import open_bundle
from infexport.evaluation.benchmark import gemm
from infexport.inference.runners.onnxruntime import OrtRunner, import_onnxruntime
from infexport.system.gpu_meter import Meter
from infexport.system.host import peak_memory
from peers import on_gpu
from peers.contenders import Contender
from peers.networks import CONFIGS, network_of, peer_of

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""ImageNet's, which infexport takes where a checkpoint has none."""


def prepare(contender: Contender, folder: Path, sizes: str, batches: str) -> None:
    """Make what a contender of `ort`, `bundle` or `engine` runs.

    Args:
        contender: of these.
        folder: where to.
        sizes, batches: of an engine's images: least, best and most, as `build-engine` takes them.
    """
    config = CONFIGS[contender.family]
    if contender.how == "ort":
        patch = config.patch_size
        sides = (patch * torch.export.Dim(name, min=1, max=8192) for name in ("grid_height", "grid_width"))
        shapes = ({0: torch.export.Dim("batch"), **dict(zip((2, 3), sides, strict=True))},)
        example = (torch.zeros(2, 3, 3 * patch, 5 * patch),)
        file = folder / f"{contender.name}.onnx"
        network = peer_of(contender.family)
        if contender.precision == "fp16":
            network, example = network.half(), (example[0].half(),)
        torch.onnx.export(network, example, file, dynamo=True, opset_version=20, dynamic_shapes=shapes, verbose=False)
    else:
        from safetensors.torch import save_file

        checkpoint = folder / f"{contender.name}.safetensors"
        save_file(network_of(contender.family).state_dict(), checkpoint)
        command = ["convert", "checkpoint", checkpoint, "--output", folder / contender.name]
        for name, value in (
            ("variant", config.variant),
            ("num-heads", config.num_heads),
            ("norm-eps", config.norm_eps),
        ):
            command += [f"--{name}", str(value)]
        engine = contender.how == "engine"
        command += ["--precision", "fp32" if engine else contender.precision]
        run_infexport(*command, "--fold" if contender.folded else "--no-fold")
        checkpoint.unlink()
        if engine:
            build = ["build-engine", folder / contender.name, "--target", "local", "--precision", contender.precision]
            run_infexport(*build, "--sizes", sizes, "--batch", batches)


def run_infexport(*command: Any) -> None:
    """Run a command; where it fails, infexport says why, and this process ends."""
    done = subprocess.run([sys.executable, "-m", "infexport", *command], stdout=subprocess.DEVNULL, check=False)
    if done.returncode:
        sys.exit(done.returncode)


def runner_of(contender: Contender, folder: Path, threads: int | None, images: Any) -> Callable[[], Any]:
    """What runs the contender once on uint8 images `[B, H, W, 3]` and returns its logits."""
    if contender.how == "bundle":
        runner = OrtRunner(open_bundle(folder / contender.name), "cpu", threads).__enter__()
        return lambda: runner.run(images)["logits"]
    mean, std = (torch.tensor(values) for values in (MEAN, STD))
    pixels = ((torch.from_numpy(images) / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()
    if contender.how == "ort":
        onnxruntime = import_onnxruntime()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        session = onnxruntime.InferenceSession(
            folder / f"{contender.name}.onnx", options, providers=["CPUExecutionProvider"]
        )
        feed = {session.get_inputs()[0].name: pixels.numpy()}
        return lambda: session.run(None, feed)[0]
    network: Callable[[Tensor], Tensor] = peer_of(contender.family)
    if contender.how == "compile":
        network = torch.compile(network, dynamic=False)

    def run() -> Any:
        with torch.inference_mode():
            return network(pixels).numpy()

    return run


def gemm_of(contender: Contender, threads: int | None) -> Callable[[], Any]:
    if contender.how in gemm.SHAPES:
        product = gemm.Gemm(contender.how, "cpu", threads)
        return product.run
    rows, inner, columns = gemm.SHAPES["float32"]
    left, out = torch.randn(rows, inner), torch.empty(rows, columns)
    right = torch.randn(columns, inner).T  # as a Linear holds its weights
    return lambda: torch.mm(left, right, out=out)


def serve(contender: Contender, folder: Path, threads: int | None, images: Path, device: str) -> None:
    """Answer until stdin ends: a line is a run, on a GPU a burst of runs, and its answer seconds and peak memory in
    bytes, on a GPU the GPU's, which is None where NVML doesn't tell.
    """
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print to stdout as they like
    if threads is not None:
        torch.set_num_threads(threads)
    with ExitStack() as stack:
        meter = stack.enter_context(Meter()) if device == "cuda" else None
        if contender.family == "gemm":
            run = gemm_of(contender, threads) if meter is None else on_gpu.gemm_of(contender, threads)
        else:
            pictures = np.load(images)
            if meter is None:
                run = runner_of(contender, folder, threads, pictures)
            else:
                run = on_gpu.runner_of(contender, folder, threads, pictures, MEAN, STD)
            np.save(folder / f"{contender.name}.logits.npy", run())
        run()
        on_the_gpu = None
        if meter is not None:
            on_gpu.burst(run, on_gpu.WARM_UP)
            on_the_gpu = meter.peak_memory()
        print(json.dumps({}), file=out, flush=True)
        for _ in sys.stdin:
            if meter is not None:
                found = {"seconds": on_gpu.burst(run), "peak_memory": on_the_gpu}
            else:
                time.sleep(gemm.SETTLE)
                started = time.perf_counter()
                run()
                found = {"seconds": time.perf_counter() - started, "peak_memory": peak_memory()}
            print(json.dumps(found), file=out, flush=True)
