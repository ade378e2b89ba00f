"""What a contender's process does: make what it runs, or run it when asked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from infexport import gemm
from infexport.bundle import open_bundle
from infexport.machine import peak_memory
from infexport.runners.ort import OrtRunner, import_onnxruntime
from peers.contenders import Contender
from peers.networks import CONFIGS, network_of, peer_of

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""ImageNet's, which infexport takes where a checkpoint has none."""


def prepare(contender: Contender, folder: Path) -> None:
    """Make what a contender of `ort` or `bundle` runs."""
    config = CONFIGS[contender.family]
    if contender.how == "ort":
        patch = config.patch_size
        sides = (patch * torch.export.Dim(name, min=1, max=8192) for name in ("grid_height", "grid_width"))
        shapes = ({0: torch.export.Dim("batch"), **dict(zip((2, 3), sides, strict=True))},)
        example = (torch.zeros(2, 3, 3 * patch, 5 * patch),)
        file = folder / f"{contender.name}.onnx"
        network = peer_of(contender.family)
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
        command += ["--precision", contender.precision, "--fold" if contender.folded else "--no-fold"]
        done = subprocess.run([sys.executable, "-m", "infexport", *command], stdout=subprocess.DEVNULL, check=False)
        checkpoint.unlink()
        if done.returncode:
            sys.exit(done.returncode)  # infexport said why


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
    if contender.how in gemm.KINDS:
        product = gemm.Gemm(contender.how, "cpu", threads)
        return product.run
    left, out = torch.randn(gemm.ROWS, gemm.INNER), torch.empty(gemm.ROWS, gemm.COLUMNS)
    right = torch.randn(gemm.COLUMNS, gemm.INNER).T  # as a Linear holds its weights
    return lambda: torch.mm(left, right, out=out)


def serve(contender: Contender, folder: Path, threads: int | None, images: Path) -> None:
    """Answer until stdin ends: a line is a run, and its answer seconds and peak memory in bytes."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print to stdout as they like
    if threads is not None:
        torch.set_num_threads(threads)
    if contender.family == "gemm":
        run = gemm_of(contender, threads)
    else:
        run = runner_of(contender, folder, threads, np.load(images))
        np.save(folder / f"{contender.name}.logits.npy", run())
    run()
    print(json.dumps({}), file=out, flush=True)
    for _ in sys.stdin:
        time.sleep(gemm.SETTLE)
        started = time.perf_counter()
        run()
        seconds = time.perf_counter() - started
        print(json.dumps({"seconds": seconds, "peak_memory": peak_memory()}), file=out, flush=True)
