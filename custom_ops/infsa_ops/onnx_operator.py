"""An operator as ONNX and torch's exporter know it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx
import onnx_ir as ir

from infsa_ops.common import DOMAIN, VERSION

FLOATS = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]
"""Types of tokens and values."""

Parameter = tuple[str, str, str]
"""Name, type (`T`, another variable or `tensor(float)`) and shape."""
Body = Callable[[Mapping[str, ir.Attr], int, ir.DataType], ir.Function]


@dataclass(frozen=True)
class OnnxOperator:
    """An operator in ONNX.

    Attributes:
        name: of its nodes.
        doc: a sentence for the schema.
        torch_op: the overload that is exported as this node.
        inputs, outputs: the schema's parameters, in order.
        translate: makes the node of the overload's arguments, for `torch.onnx.export(custom_translation_table=…)`.
        body: builds the operator from standard operators, of attributes, opset and the dtype of the tokens.
        attributes: name → description, all integers.
        types: type variable → description.
    """

    name: str
    doc: str
    torch_op: Any
    inputs: Sequence[Parameter]
    outputs: Sequence[Parameter]
    translate: Callable[..., Any]
    body: Body
    attributes: Mapping[str, str] = field(default_factory=dict)
    types: Mapping[str, str] = field(default_factory=lambda: {"T": "dtype of the tokens"})

    @property
    def schema(self) -> onnx.defs.OpSchema:
        """The schema, to be registered once in a process."""
        parameter, attribute = onnx.defs.OpSchema.FormalParameter, onnx.defs.OpSchema.Attribute
        return onnx.defs.OpSchema(
            self.name,
            DOMAIN,
            VERSION,
            doc=self.doc,
            inputs=[parameter(*each) for each in self.inputs],
            outputs=[parameter(*each) for each in self.outputs],
            attributes=[
                attribute(name, onnx.defs.OpSchema.AttrType.INT, text) for name, text in self.attributes.items()
            ],
            type_constraints=[(name, FLOATS, text) for name, text in self.types.items()],
        )
