"""Nodes and initializers added to a graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray


class Editor:
    """Adds to a graph, always before `here`; None is its end."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self.here: ir.Node | None = None

    def add(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        output: ir.Value,
        attributes: Mapping[str, Any] | None = None,
        domain: str = "",
        more: Sequence[ir.Value] = (),
    ) -> ir.Value:
        """Add a node and return its first output; `more` are the outputs after it."""
        node = ir.node(op_type, inputs, attributes, domain=domain, outputs=[output, *more])
        if self.here is None:
            self._graph.append(node)
        else:
            self._graph.insert_before(self.here, node)
        return output

    def initializer(self, name: str, array: NDArray[Any]) -> ir.Value:
        """Return the initializer of this name; make it of `array` where there is none."""
        if name not in self._graph.initializers:
            tensor = ir.tensor(array, name=name)
            self._graph.register_initializer(ir.val(name, const_value=tensor))
        return self._graph.initializers[name]

    def replace(self, node: ir.Node, value: ir.Value) -> None:
        """Remove a node and put `value` in the place of its only output, under its name."""
        (old,) = node.outputs
        value.name = old.name
        ir.convenience.replace_all_uses_with(old, value, replace_graph_outputs=True)
        self._graph.remove(node, safe=True)


def first_input(node: ir.Node) -> ir.Value:
    value = node.inputs[0]
    assert value is not None, f"{node.name} has no inputs"
    return value
