"""The sweeps of `infvit.sweeps` as ONNX graphs beside the whole graph, in whose weights file theirs lie."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor
from torch import Tensor, nn
from torch.export import Dim

from infexport.graph import attach_bodies, program_of
from infexport.image_model import ImageModel
from infexport.manifest import Stage
from infvit.sweeps import Sweep, sweeps

INLINE = 1024
"""Bytes. Tensors below that stay in their own graph."""


class Normalise(nn.Module):
    """A strip of an image as the bundle takes it, to what the network's patch embedding takes."""

    def __init__(self, model: ImageModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        return self.model.normalised(image)


def export_stages(model: ImageModel, whole: Path) -> list[Stage]:
    """Write a graph for every sweep beside the whole graph.

    Layers have equal graphs with other weights, so each kind is exported once.

    Args:
        model: folded, what `whole` was exported from.
        whole: the file, its weights in one file of external data.

    Returns:
        The stages, in the order in which they are run.
    """
    stages: list[Stage] = []
    programs: dict[Any, torch.onnx.ONNXProgram] = {}
    written: dict[Any, str] = {}
    shared = _external(whole)
    for index, sweep in enumerate(sweeps(model.network, Normalise(model))):
        tensors = _tensors(sweep)
        kind = (type(sweep), *((name, tensor.shape, tensor.dtype) for name, tensor in tensors.items()))
        if kind not in programs:
            programs[kind] = _export(sweep, model)
        # without weights, one graph serves all layers
        graph = written.get(kind) if not tensors else None
        if graph is None:
            graph = written[kind] = f"stream-{index:02}-{type(sweep).__name__.lower()}.onnx"
            _save(_with_weights(programs[kind], tensors), shared, whole.parent / graph)
        stages.append(Stage(graph, sweep.over, list(sweep.inputs), list(sweep.outputs)))
    return stages


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _export(sweep: Sweep, model: ImageModel) -> torch.onnx.ONNXProgram:
    """The sweep's graph, not yet optimised: its initializers have the names of its tensors."""
    config = model.network.config
    patch, heads = config.patch_size, config.num_heads
    chunk, keys = Dim("tokens"), Dim("keys")
    rows, columns = Dim("rows", max=8192), Dim("columns", max=8192)
    half = any(p.dtype == torch.float16 for p in _tensors(model).values()) and config.variant == "pure_infsa"

    def tokens(count: int, axis: Any) -> tuple[Tensor, dict[int, Any]]:
        return torch.zeros(1, count, config.embed_dim), {1: axis}

    def example(name: str) -> tuple[Tensor, dict[int, Any]]:
        if name == "image":
            if model.takes == "uint8":
                image = torch.zeros(1, 3 * patch, 5 * patch, 3, dtype=torch.uint8)
                return image, {1: patch * rows, 2: patch * columns}
            return torch.zeros(1, 3, 3 * patch, 5 * patch), {2: patch * rows, 3: patch * columns}
        if name in ("mass", "squared_norm"):
            return torch.zeros(1, heads), {}
        if name == "moment":
            per_head = type(sweep).__name__ == "Score"
            return torch.zeros(1, heads, config.head_dim if per_head else config.embed_dim), {}
        if name in ("row", "column", "grid_height", "grid_width"):
            return torch.zeros(1), {}
        if name == "query" or sweep.over == "class_token":
            value, axes = tokens(1, None)
            axes = {}
        else:
            against = sweep.over == "pairs" and name != "q"
            value, axes = tokens(5, keys) if against else tokens(7, chunk)
        return (value.half() if half and name in ("q", "k", "v", "query") else value), axes

    examples = [example(name) for name in sweep.inputs]
    args, axes = tuple(value for value, _ in examples), tuple(axis for _, axis in examples)
    # a module with *needed has its dynamic shapes nested
    fixed = len(axes) if type(sweep).__name__ not in ("Apply", "Head") else 1
    shapes = (*axes[:fixed], axes[fixed:]) if fixed < len(axes) else axes
    # ONNX has one name for one value
    outputs = [f"{name}_out" if name in sweep.inputs else name for name in sweep.outputs]
    return program_of(sweep, args, shapes if args else None, sweep.inputs, outputs, optimize=False)


def _with_weights(program: torch.onnx.ONNXProgram, tensors: dict[str, Tensor]) -> ir.Model:
    template = program.model
    program.model = template.clone()
    for name, value in program.model.graph.initializers.items():
        if name in tensors:
            value.const_value = TorchTensor(tensors[name].detach(), name=name)
    program.optimize()
    made, program.model = program.model, template
    return attach_bodies(made)


def _content(tensor: ir.TensorProtocol) -> tuple[Any, ...]:
    digest = hashlib.sha256(np.ascontiguousarray(tensor.numpy()).data).digest()
    return tensor.dtype, tuple(tensor.shape), digest


def _external(whole: Path) -> dict[Any, ir.ExternalTensor]:
    """The tensors in a graph's external data, by content."""
    tensors = (value.const_value for value in ir.load(whole).graph.initializers.values())
    return {_content(tensor): tensor for tensor in tensors if isinstance(tensor, ir.ExternalTensor)}


def _save(stage: ir.Model, shared: dict[Any, ir.ExternalTensor], file: Path) -> None:
    for name, value in stage.graph.initializers.items():
        tensor = value.const_value
        assert tensor is not None
        found = shared.get(_content(tensor)) if tensor.nbytes >= INLINE else None
        if found is not None:
            value.const_value = ir.ExternalTensor(
                found.location, found.offset, found.length, found.dtype,
                shape=found.shape, name=name, base_dir=found.base_dir,
            )  # fmt: skip
    ir.save(stage, file)
    onnx.checker.check_model(file, full_check=True)
