"""Named activations of a whole graph: the tokens that every layer takes, and the outputs of its operators.

`layers.2.tokens` `[B, N, E]` is what the third layer takes. What its operators give has the names in OUTPUTS, such as
`layers.2.energy.mass` `[B, H]`; its scores, `[B, H, N]`, are `layers.2.scores`. These are names of values inside the
graph, which cost nothing; `with_outputs` makes outputs of them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedFunctionsPass, RemoveUnusedNodesPass
from torch import Tensor

import infsa_ops
from infexport.conversion.onnx_export import attach_bodies
from infexport.conversion.passes.graph_editor import Editor, first_input
from infexport.inference.centrality import CENTRALITY

OUTPUTS: dict[tuple[str, str], list[tuple[str, ...]]] = {
    ("linear_infsa", "LinearInfSAStateUpdate"): [("energy.mass", "energy.moment"), ("score.mass", "score.moment")],
    ("pure_infsa", "LinearInfSAStateUpdate"): [("row.mass", "row.moment")],
    ("pure_infsa", "NeumannKernel"): [("mixed",)],
    ("pure_infsa", "AffinitySquaredNorm"): [("squared_norm",)],
}
"""(variant, operator) → names of the outputs of the first such node of a layer, of the second, …"""


def tokens_names(depth: int) -> list[str]:
    """Return the names of the tokens that each layer takes."""
    return [f"layers.{layer}.tokens" for layer in range(depth)]


def activation_names(graph: ir.Graph) -> list[str]:
    """Return the names of all activations, in order. One that exists only in a half type has a suffix."""
    names = [str(out.name) for node in graph for out in node.outputs]
    known = {name for ends in OUTPUTS.values() for outputs in ends for name in outputs} | {"scores", "tokens"}
    found = [name for name in names if re.match(r"layers\.\d+\.", name) and plain_name(name).split(".", 2)[2] in known]
    return [name for name in found if name == plain_name(name) or plain_name(name) not in found]


def plain_name(name: str) -> str:
    """Return the name of an activation without the suffix that passes give to half types."""
    return name.removesuffix("_fp16").removesuffix("_bf16")


def name_operators(graph: ir.Graph, variant: str) -> None:
    """Name the outputs of every layer's operators, in place; the tokens that layers take have names already."""
    seen: Counter[tuple[int, str]] = Counter()
    for layer, node in _operators(graph):
        names = OUTPUTS[variant, node.op_type][seen[layer, node.op_type]]
        seen[layer, node.op_type] += 1
        for value, name in zip(node.outputs, names, strict=True):
            value.name = f"layers.{layer}.{name}"
        if names[0] == "score.mass":
            first_input(node).name = f"layers.{layer}.scores"


def add_centrality(model: ir.Model, terms: int, rho: Sequence[Tensor]) -> None:
    """Give a graph an output `centrality`, float32 `[B, layers, H, N]`: how much each token is attended to.

    Of Linear-InfSA the normalised scores, aₙ / (Σa + ε). Of Pure InfSA the column sums of Σ_{t=1..T} (ρÂ)ᵗ, Katz
    centrality: the same series with queries and keys exchanged, applied to ones.

    Args:
        model: float32, as it was exported, its operators named.
        terms: T, of the network.
        rho: ρ of every layer.
    """
    make = _Centrality(model.graph, terms)
    found = []
    for layer, node in list(_operators(model.graph)):
        if node.outputs[0].name == f"layers.{layer}.score.mass":
            found.append(make.scores(layer, node))
        elif node.op_type != "LinearInfSAStateUpdate":
            found.append(make.columns(layer, node, rho[layer]))
    make.output(found)
    attach_bodies(model)


class _Centrality:
    """The nodes of `add_centrality`."""

    def __init__(self, graph: ir.Graph, terms: int) -> None:
        self._graph, self._edit, self._terms = graph, Editor(graph), terms
        self._one = self._edit.initializer("centrality_one", np.ones((1, 1, 1, 1), np.float32))
        self._axis = self._edit.initializer("centrality_axis", np.array([1]))
        self._last = self._edit.initializer("centrality_last", np.array([-1]))
        self._epsilon = self._edit.initializer("centrality_epsilon", np.array([infsa_ops.EPSILON], np.float32))

    def scores(self, layer: int, node: ir.Node) -> ir.Value:
        """Return the scores of a layer of Linear-InfSA, `[B, H, N]`, whose state update is `node`."""
        scores, mass = first_input(node), node.outputs[0]
        batch, heads, _ = _shape(scores)
        mass = self._add("Add", [mass, self._epsilon], f"layers.{layer}.divisor", [batch, heads])
        mass = self._add("Unsqueeze", [mass, self._last], f"layers.{layer}.divisors", [batch, heads, 1])
        return self._add("Div", [scores, mass], f"layers.{layer}.centrality", _shape(scores))

    def columns(self, layer: int, node: ir.Node, rho: Tensor) -> ir.Value:
        """Return the column sums of a layer of Pure InfSA, `[B, H, N]`, whose queries and keys `node` takes."""
        q, k = first_input(node), node.inputs[1]
        name, edit, shape = f"layers.{layer}.centrality", self._edit, _shape(q)[:3]
        sizes = edit.add("Shape", [q], ir.val(f"{name}_sizes", ir.DataType.INT64, [3]), {"end": 3})
        sizes = edit.add("Concat", [sizes, self._axis], ir.val(f"{name}_shape", ir.DataType.INT64, [4]), {"axis": 0})
        ones = self._add("Expand", [self._one, sizes], f"{name}_ones", [*shape, 1])
        discount = edit.initializer(f"{name}_rho", rho.detach().float().numpy())
        sums = ir.val(f"{name}_sums", ir.DataType.FLOAT, [*shape, 1])
        sums = edit.add("NeumannKernel", [k, q, ones, discount], sums, {"terms": self._terms}, infsa_ops.DOMAIN)
        return self._add("Squeeze", [sums, self._last], name, shape)

    def output(self, layers: Sequence[ir.Value]) -> None:
        batch, heads, tokens = _shape(layers[0])
        rows = [self._add("Unsqueeze", [x, self._axis], f"{x.name}_row", [batch, 1, heads, tokens]) for x in layers]
        out = ir.val(CENTRALITY, ir.DataType.FLOAT, [batch, len(layers), heads, tokens])
        self._graph.outputs.append(self._edit.add("Concat", rows, out, {"axis": 1}))

    def _add(self, op_type: str, inputs: Sequence[ir.Value | None], name: str, shape: Sequence[int | str]) -> ir.Value:
        return self._edit.add(op_type, inputs, ir.val(name, ir.DataType.FLOAT, shape))


def with_outputs(model: ir.Model, names: Sequence[str]) -> ir.Model:
    """Return a copy of a graph with these outputs and no node that only others need; weights are shared.

    Raises:
        KeyError: no value has one of the names.
    """
    copy = model.clone()
    values = {str(out.name): out for node in copy.graph for out in node.outputs}
    outputs = [values[name] for name in names]
    copy.graph.outputs.clear()
    copy.graph.outputs.extend(outputs)
    RemoveUnusedNodesPass()(copy)
    RemoveUnusedFunctionsPass()(copy)
    return copy


def _operators(graph: ir.Graph) -> Iterator[tuple[int, ir.Node]]:
    """Return the operators of domain `infsa`, in order, and the layer of each."""
    layer = -1
    for node in graph:
        layer += any(str(out.name) == f"layers.{layer + 1}.tokens" for out in node.outputs)
        if node.domain == infsa_ops.DOMAIN:
            yield layer, node


def _shape(value: ir.Value) -> list[int | str]:
    assert value.shape is not None, f"{value.name} has no shape: the exporter gives every value one"
    return [size if isinstance(size, int) else str(size.value) for size in value.shape]
