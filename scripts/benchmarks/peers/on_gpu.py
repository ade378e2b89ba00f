"""How a contender runs on a GPU, and how long it takes there.

Every one is given what it takes in the process's memory and has its logits back there, inside the clock, as whoever
calls it would: uint8 images, which torch's peers normalise on the GPU as bundles do. Only a plain export takes pixels,
and has them on the GPU before the clock starts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from infexport.bundle import open_bundle
from infexport.errors import InfexportError
from infexport.evaluation.benchmark import gemm
from infexport.evaluation.benchmark.result import Spread
from infexport.inference.runners.factory import RunnerFactory
from infexport.inference.runners.onnxruntime import PROVIDERS, import_onnxruntime, with_options
from infvit.fold import fold
from peers.contenders import Contender
from peers.networks import network_of, peer_of

BURST = 0.2
"""Seconds of runs that make a round, which counts as their median."""
WARM_UP = 0.5
"""Seconds of runs before the first round: the clock rises, kernels are chosen."""
Run = Callable[[], Any]


def burst(run: Run, least: float = BURST) -> float:
    """The median time of a run, of as many as `least` seconds hold, at least one."""
    seconds: list[float] = []
    while sum(seconds) < least:
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return Spread.of(seconds).p50


def runner_of(contender: Contender, folder: Path, threads: int | None, images: Any, mean: Any, std: Any) -> Run:
    """What runs the contender once on uint8 images `[B, H, W, 3]` and returns its logits.

    Args:
        contender: of any way to run but `gemm`.
        folder: where what it runs was made.
        threads: of ONNX Runtime.
        images: in this process's memory.
        mean, std: of the pixels in [0, 1], per channel.
    """
    if contender.how in ("bundle", "engine"):
        bundle = open_bundle(folder / contender.name)
        provider = "cuda" if contender.how == "bundle" else "engine"
        runner = RunnerFactory(bundle, provider, threads=None if provider == "engine" else threads).runner().__enter__()
        return lambda: runner.run(images)["logits"]
    if contender.how == "ort":
        pixels = ((images / 255 - np.array(mean)) / np.array(std)).transpose(0, 3, 1, 2)
        kind = np.float16 if contender.precision == "fp16" else np.float32
        return plain_export(folder / f"{contender.name}.onnx", np.ascontiguousarray(pixels, kind), threads)
    return torch_run(contender, images, mean, std, "cuda")


def torch_run(contender: Contender, images: Any, mean: Any, std: Any, device: str) -> Run:
    """A network in torch, float32 without TF32."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    dtype = torch.float16 if contender.precision == "fp16" else torch.float32
    network = fold(network_of(contender.family)) if contender.folded else peer_of(contender.family)
    network = network.to(device, dtype)
    center, scale = (torch.tensor(values, dtype=dtype, device=device) for values in (mean, std))

    def forward(image: Tensor) -> Tensor:
        return network(((image.to(dtype) / 255 - center) / scale).permute(0, 3, 1, 2))

    compiled = torch.compile(forward, dynamic=False) if contender.how == "compile" else forward
    host = torch.from_numpy(images)

    def run() -> Any:
        with torch.inference_mode():
            return compiled(host.to(device)).float().cpu().numpy()

    return run


def plain_export(file: Path, pixels: Any, threads: int | None, provider: str = "cuda") -> Run:
    """An exported graph in ONNX Runtime, its pixels where it runs.

    Raises:
        InfexportError: ONNX Runtime gives another provider.
    """
    onnxruntime = import_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or 0
    session = onnxruntime.InferenceSession(file, options, providers=[with_options(provider)])
    if session.get_providers()[0] != PROVIDERS[provider]:
        raise InfexportError(f"ONNX Runtime gave no {PROVIDERS[provider]}")
    binding = session.io_binding()
    name = session.get_inputs()[0].name
    binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(pixels, provider))
    binding.bind_output(session.get_outputs()[0].name, "cpu")

    def run() -> Any:
        session.run_with_iobinding(binding)
        return binding.copy_outputs_to_cpu()[0].astype(np.float32)

    return run


def gemm_of(contender: Contender, threads: int | None) -> Run:
    """A product in torch or in ONNX Runtime, to its end."""
    if contender.how in gemm.SHAPES:
        return gemm.Gemm(contender.how, "cuda", threads).run
    torch.backends.cuda.matmul.allow_tf32 = False
    rows, inner, columns = gemm.SHAPES[contender.product]
    dtype = getattr(torch, contender.product)
    left, out = (
        torch.randn(rows, inner, device="cuda").to(dtype),
        torch.empty(rows, columns, device="cuda", dtype=dtype),
    )
    right = torch.randn(columns, inner, device="cuda").to(dtype).T  # as a Linear holds its weights

    def run() -> None:
        torch.mm(left, right, out=out)
        torch.cuda.synchronize()

    return run
