"""Torch module → ONNX model whose operators stay nodes of domain `infsa`, each with its body attached."""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import infsa_ops
from infexport.errors import InfexportError

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir
    import torch

    from infsa_ops.onnx_operator import OnnxOperator

OPSET = 20
DTYPES = ("FLOAT", "FLOAT16", "BFLOAT16")
"""Token types that the operators' bodies take, as `onnx_ir.DataType` has them."""
MAX_GRID = 8192
"""Patches along a side, at most: 131,072 pixels at patch 16."""


def _operators() -> list[OnnxOperator]:
    return [importlib.import_module(f"infsa_ops.{name}.function").OPERATOR for name in infsa_ops.ALL]


def _register_schemas(operators: list[OnnxOperator]) -> None:
    import onnx

    for operator in operators:
        if not onnx.defs.has(operator.name, infsa_ops.DOMAIN):
            onnx.defs.register_schema(operator.schema)


def attach_bodies(model: ir.Model) -> ir.Model:
    """Give every node of domain `infsa` its body, as a model-local function, in place.

    Returns:
        The same model, without the exporter's notes to itself.

    Raises:
        InfexportError: an operator on tokens of a dtype that it has no body for, such as float64.
        ValueError: nodes of one operator differ in what its body depends on, attributes and dtype. ONNX has overloads
            for that, but TensorRT's parser ignores them and would run the first body for all.
    """
    import onnx_ir as ir

    by_name = {operator.name: operator for operator in _operators()}
    attributes: dict[str, dict[str, Any]] = {}
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if node.domain != infsa_ops.DOMAIN:
            continue
        tokens = node.inputs[0]
        assert tokens is not None, f"{node.name} has no tokens"
        assert tokens.dtype is not None, f"{node.name}: the exporter types every value"
        if tokens.dtype.name not in DTYPES:
            raise InfexportError(
                f"{node.op_type} has no ONNX form for {tokens.dtype.name.lower()}",
                f"received tokens of {tokens.dtype.name.lower()} at {node.name}, "
                f"expected one of {', '.join(dtype.lower() for dtype in DTYPES)}",
                "export the module in float32: export(module.float(), ...) with inputs in float32",
            )
        values = {name: attribute.value for name, attribute in node.attributes.items()} | {"dtype": str(tokens.dtype)}
        if attributes.setdefault(node.op_type, values) != values:
            raise ValueError(
                f"{node.op_type} occurs with {attributes[node.op_type]} and with {values}: "
                "one model can hold one body of an operator, export with equal attributes"
            )
        function = by_name[node.op_type].body(node.attributes, model.opset_imports[""], tokens.dtype)
        model.functions.setdefault(function.identifier(), function)
    model.opset_imports[infsa_ops.DOMAIN] = infsa_ops.VERSION
    _clear_metadata(model)
    return model


def _clear_metadata(model: ir.Model) -> None:
    """Remove the exporter's notes, in place: they hold paths of this machine, and sets in any order."""
    import onnx_ir as ir

    owners: list[Any] = [model, model.graph, *model.graph.inputs, *model.graph.initializers.values()]
    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        for node in ir.traversal.RecursiveGraphIterator(graph):
            owners += [node, node.graph, *node.outputs]
    for owner in [*owners, *model.functions.values()]:
        owner.metadata_props.clear()
        owner.doc_string = None


@contextmanager
def _evaluating(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Put a module into eval mode within the block, and back afterwards."""
    modes = [(part, part.training) for part in module.modules()]
    try:
        yield module.eval()
    finally:
        for part, training in modes:
            part.training = training


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the exporter and its optimisers, but for errors: users cannot act on their warnings."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def export_program(
    module: torch.nn.Module,
    args: tuple[Any, ...],
    dynamic_shapes: Any = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    optimize: bool = True,
) -> torch.onnx.ONNXProgram:
    """Export a module in eval mode by `torch.onnx.export`; its operators are nodes without bodies.

    Without `optimize`, initializers are the module's own parameters and buffers, by their names.
    """
    import torch

    operators = _operators()
    _register_schemas(operators)
    table: dict[Any, Any] = {operator.torch_op: operator.translate for operator in operators}
    with _evaluating(module), warnings.catch_warnings(), quiet():
        warnings.simplefilter("ignore")  # the exporter warns about its own deprecations and about no torchvision
        program = torch.onnx.export(
            module,
            args,
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=dynamic_shapes,
            custom_translation_table=table,
            input_names=input_names,
            output_names=output_names,
            verbose=False,
            optimize=optimize,
        )
    assert program is not None
    return program


def export_model(
    module: torch.nn.Module,
    args: tuple[Any, ...],
    dynamic_shapes: Any = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
) -> ir.Model:
    """Export as `export` does, to an `onnx_ir.Model` whose weights stay torch's: no copy, no limit of 2 GB."""
    return attach_bodies(export_program(module, args, dynamic_shapes, input_names, output_names).model)


def export(module: torch.nn.Module, args: tuple[Any, ...], dynamic_shapes: Any = None) -> onnx.ModelProto:
    """Export any module that uses `infsa_ops` to ONNX.

    Args:
        module: exported in eval mode.
        args: example inputs, as of `torch.onnx.export`.
        dynamic_shapes: as of `torch.export.export`.

    Returns:
        A model of opset 20 in which the operators are nodes of domain `infsa`, version 1, each with a function body
        in standard operators: any runtime can run it, one with a faster kernel can take the node whole.

    Raises:
        InfexportError: the operators are given tokens in float64: they sum in float32, and their bodies say so.
    """
    import onnx_ir as ir

    proto: onnx.ModelProto = ir.to_proto(export_model(module, args, dynamic_shapes))
    return proto
