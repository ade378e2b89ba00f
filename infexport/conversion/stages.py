"""The stages of `infvit.stages` as ONNX graphs beside the whole graph, in whose weights file theirs lie."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor
from torch import Tensor, nn
from torch.export import Dim

from infexport.bundle.manifest import Stage
from infexport.conversion.image_model import ImageModel
from infexport.conversion.onnx_export import MAX_GRID, attach_bodies, export_program, quiet
from infexport.inference.centrality import CENTRALITY
from infvit.stage_scope import StageScope
from infvit.stages import Score, StageModule, make_stages


class IndependentStages(nn.Module):
    """Independent stages in one module: half of an export's time is start-up."""

    def __init__(self, parts: Sequence[StageModule]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.counts = [len(part.inputs) for part in parts]

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        outputs: list[Tensor] = []
        for part, count in zip(self.parts, self.counts, strict=True):
            outputs += part(*inputs[:count])
            inputs = inputs[count:]
        return tuple(outputs)


def export_stages(model: ImageModel) -> Iterator[tuple[Stage, ir.Model | None]]:
    """Export the graphs of all stages, one at a time.

    Layers have equal graphs with other weights, so each kind is exported once.

    Args:
        model: folded.

    Yields:
        Stages, in the order in which they are run, and the graph of each; None where an earlier stage has the same.
    """
    cut = make_stages(model.network, model.normalise)
    kinds = [_kind(sweep) for sweep in cut]
    first = {kind: index for index, kind in reversed(list(enumerate(kinds)))}
    parts = [cut[index] for index in sorted(first.values())]
    # copies: what two of them share would have the name it has in the first
    program = _export([copy.deepcopy(part) for part in parts], model)
    together = program.model
    for index, (sweep, kind) in enumerate(zip(cut, kinds, strict=True)):
        tensors = _tensors(sweep)
        # what is the same again has one graph; without weights, all layers have
        namesake = cut.index(sweep) if tensors else first[kind]
        file = f"stream-{namesake:02}-{sweep.name}.onnx"
        stage = Stage(file, sweep.over, list(sweep.inputs), list(sweep.outputs), sweep.optional)
        if namesake != index:
            yield stage, None
            continue
        program.model = _part(together, parts.index(cut[first[kind]]), sweep, tensors)
        with quiet():
            program.optimize()
        yield stage, attach_bodies(program.model)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _kind(sweep: StageModule) -> tuple[Any, ...]:
    """Return a key that is equal for stages that differ only in their weights."""
    shapes = ((name, tensor.shape, tensor.dtype) for name, tensor in _tensors(sweep).items())
    return (type(sweep), sweep.inputs, sweep.outputs, *shapes)


def _names(sweep: StageModule, prefix: str = "") -> tuple[list[str], list[str]]:
    """Return the names of a graph's inputs and outputs; an output that is also an input ends in `_out`."""
    outputs = [f"{name}_out" if name in sweep.inputs else name for name in sweep.outputs]
    return [prefix + name for name in sweep.inputs], [prefix + name for name in outputs]


def _export(parts: Sequence[StageModule], model: ImageModel) -> torch.onnx.ONNXProgram:
    """Export all parts as one graph, not yet optimised; initializers have the names of the module's tensors."""
    inputs, outputs, examples, axes = [], [], [], []
    for index, part in enumerate(parts):
        taken, given = _names(part, f"{index}/")
        inputs += taken
        outputs += given
        for example, free in _examples(part, index, model):
            examples.append(example)
            axes.append(free)
    return export_program(IndependentStages(parts), tuple(examples), (tuple(axes),), inputs, outputs, optimize=False)


def _examples(sweep: StageModule, index: int, model: ImageModel) -> list[tuple[Tensor, dict[int, Any]]]:
    """Return an example of every input of a stage, and its dynamic axes, which `index` makes its own."""
    config = model.network.config
    patch, heads, width = config.patch_size, config.num_heads, config.embed_dim
    chunk, keys = Dim(f"tokens_{index}"), Dim(f"keys_{index}")
    rows, columns = (Dim(f"{name}_{index}", max=MAX_GRID) for name in ("rows", "columns"))

    def example(name: str) -> tuple[Tensor, dict[int, Any]]:
        if name == "image" and model.takes == "uint8":
            return torch.zeros(1, 3 * patch, 5 * patch, 3, dtype=torch.uint8), {1: patch * rows, 2: patch * columns}
        if name == "image":
            return torch.zeros(1, 3, 3 * patch, 5 * patch), {2: patch * rows, 3: patch * columns}
        if name in ("row", "column", "grid_height", "grid_width"):
            return torch.zeros(1), {}
        if name in ("mass", "squared_norm"):
            return torch.zeros(1, heads), {}
        if name == "moment":  # of queries, or of tokens
            return torch.zeros(1, heads, config.head_dim if isinstance(sweep, Score) else width), {}
        if name == "query" or sweep.over is StageScope.CLASS_TOKEN:
            return torch.zeros(1, 1, width), {}
        if name == CENTRALITY:
            return torch.zeros(1, 5, heads), {1: keys}
        if sweep.over.is_pairwise and name != sweep.inputs[0]:
            return torch.zeros(1, 5, width), {1: keys}
        return torch.zeros(1, 7, width), {1: chunk}

    return [example(name) for name in sweep.inputs]


def _part(together: ir.Model, index: int, sweep: StageModule, tensors: dict[str, Tensor]) -> ir.Model:
    """Return the graph of one part, with the weights of a stage of its kind."""
    inputs, outputs = _names(sweep, f"{index}/")
    graph = ir.convenience.extract(together.graph, inputs, outputs)
    taken = dict(graph.initializers)  # a set has given them their order
    graph.initializers.clear()
    graph.initializers.update({name: taken[name] for name in together.graph.initializers if name in taken})
    for value in (*graph.inputs, *graph.outputs):
        value.name = str(value.name).partition("/")[2]
    for name, value in graph.initializers.items():
        tensor = tensors.get(name.removeprefix(f"parts.{index}."))
        if tensor is not None:
            value.const_value = TorchTensor(tensor.detach(), name=name)
    return ir.Model(graph, ir_version=together.ir_version)
