"""Products of half-precision factors that are summed in float32, as TensorRT has to be asked.

A MatMul of two half-precision tensors may be summed in half precision there. Both factors cast to float32 and the
product cast back is the form that it runs as one product of half-precision factors with float32 sums; NVIDIA's own
converters write it so (pytorch/TensorRT #3110, NVIDIA/TensorRT-Model-Connect #1158). ONNX Runtime would cast for real.
"""

from __future__ import annotations

import onnx_ir as ir

from infexport.conversion.passes.base import Pass
from infexport.conversion.passes.graph_editor import Editor, first_input
from infexport.conversion.passes.half_precision import KERNEL

HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


class SumInFloat32(Pass):
    """Ask for float32 sums of every product of factors in a half type.

    Ensures that no product of two such factors is left in the graph itself.

    Args:
        dtype: of the factors.
    """

    def __init__(self, dtype: ir.DataType) -> None:
        self._dtype = dtype

    def apply(self, model: ir.Model) -> None:
        for node in _half_products(model.graph):
            _rewrite(node, self._dtype)
        for function in model.functions.values():
            if function.name in KERNEL:  # where nothing else is a product
                for node in list(ir.traversal.RecursiveGraphIterator(function.graph)):
                    if _is_product(node):
                        _rewrite(node, self._dtype)

    def ensures(self, model: ir.Model) -> None:
        left = _half_products(model.graph)
        assert not left, f"{left[0].name} may be summed in a half type"


def _half_products(graph: ir.Graph) -> list[ir.Node]:
    nodes = ir.traversal.RecursiveGraphIterator(graph)
    return [node for node in nodes if _is_product(node) and first_input(node).dtype in HALVES]


def _is_product(node: ir.Node) -> bool:
    return node.domain == "" and node.op_type == "MatMul"


def _rewrite(node: ir.Node, dtype: ir.DataType) -> None:
    graph = node.graph
    assert isinstance(graph, ir.Graph), f"{node.name} is in no graph"
    edit, (out,) = Editor(graph), node.outputs
    edit.here = node
    factors = []
    for i, x in enumerate(node.inputs):
        assert x is not None, f"{node.name} lacks a factor"
        wide = ir.val(f"{out.name}_factor{i}", ir.DataType.FLOAT, x.shape)
        factors.append(edit.add("Cast", [x], wide, {"to": ir.DataType.FLOAT}))
    exact = edit.add("MatMul", factors, ir.val(f"{out.name}_sums", ir.DataType.FLOAT, out.shape))
    edit.replace(node, edit.add("Cast", [exact], ir.val(f"{out.name}_rounded", dtype, out.shape), {"to": dtype}))
