"""The graphs of a bundle whose hashes fit: bytes, and structure by the `onnx` package.

No loop is put in: a graph is a program, and one that does not end is beyond what a runtime without limits can refuse.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from hostile.cases import Case
from hostile.mutate import INTERESTING, TEXTS, mutate_bytes
from hostile.seeds import seal_again
from hostile.watch import Violation
from infexport.bundle.manifest import CENTRALITY_MODEL, MODEL

OPERATORS = (
    "Add",
    "Relu",
    "MatMul",
    "Identity",
    "Shape",
    "Transpose",
    "Nonsense",
    "NonZero",
    "Exp",
    "Reciprocal",
    "Cast",
)
DATA = f"{MODEL}.data"


def make(case: Case) -> Callable[[], int | None]:
    chance = case.chance
    stages = [stage["graph"] for stage in case.seeds.manifest["stages"]]
    name = chance.choice((MODEL, MODEL, MODEL, CENTRALITY_MODEL, *stages[:4]))
    content = (case.seeds.bundle / name).read_bytes()
    outside = case.given / "outside.data"
    kind, secret = chance.randrange(8), False
    if kind < 2:
        content = mutate_bytes(chance, content, content, head=chance.choice((0, 500)))
    else:
        model = onnx.load_from_string(content)
        if kind < 5:
            secret = _external(case, model, outside)
        else:
            _structure(case, model)
        content = model.SerializeToString()
    changed = {name: content}
    if chance.random() < 0.1:
        changed[DATA] = _weights(case)
    bundle = case.seeds.copy_bundle(case.given / "bundle", changed)
    if secret:
        outside.write_bytes((case.seeds.bundle / DATA).read_bytes())
        (case.given / "link.data").symlink_to(outside)
        (bundle / "link.data").symlink_to(outside)
    seal_again(bundle)
    command = _command(case, name, bundle)

    def act() -> int:
        code = case.cli(*command)
        if secret and code == 0 and command[0] == "run-engine":
            raise Violation("read outside", f"weights from a file outside the bundle: {name}")
        return code

    return act


def _command(case: Case, name: str, bundle: Any) -> tuple[Any, ...]:
    chance = case.chance
    run = ("run-engine", bundle, chance.choice(case.seeds.digits), "--threads", "1")
    if name == CENTRALITY_MODEL:
        return (*run, "--centrality", "-o", case.made / "out.npz")
    if name != MODEL:
        return (*run, "--execution", "stream", "--size", "native")
    if chance.random() < 0.25:
        return ("inspect", bundle, *chance.choice(((), ("--json",))))
    return (*run, *chance.choice(((), ("--json",), ("-o", case.made / "out.csv"))))


def _external(case: Case, model: onnx.ModelProto, outside: Any) -> bool:
    """Weights elsewhere; whether all of these are in a file outside the bundle, which must not be read."""
    chance = case.chance
    tensors = [each for each in model.graph.initializer if each.external_data]
    if not tensors:
        _structure(case, model)
        return False
    places = ("../outside.data", str(outside), "link.data", "x/../../outside.data", "./../outside.data")
    if chance.random() < 0.5:
        place = chance.choice(places)
        for tensor in tensors:
            _entry(tensor, "location", place)
        return True
    tensor = chance.choice(tensors)
    what = chance.choice(("location", "offset", "length", "dims", "type"))
    if what == "location":
        _entry(tensor, "location", chance.choice((*TEXTS[:-1], "/dev/zero", "/proc/self/mem", ".", MODEL)))
    elif what == "dims":
        _dims(case, tensor)
    elif what == "type":
        tensor.data_type = chance.choice((0, 2, 7, 8, 10, 11, 16, 22, 99))
    else:
        _entry(tensor, what, str(chance.choice((*INTERESTING, "x", "", "1e9", 2**70, 4, 2233340))))
    return False


def _entry(tensor: TensorProto, key: str, value: str) -> None:
    for entry in tensor.external_data:
        if entry.key == key:
            entry.value = value.encode("utf-8", "replace").decode()
            return
    tensor.external_data.add(key=key, value=value)


def _dims(case: Case, tensor: TensorProto) -> None:
    del tensor.dims[:]
    tensor.dims.extend(case.chance.choice(([10**12], [2**31, 2**31], [-1], [0], [], [1] * 50, [2**62, 4], [1])))


def _structure(case: Case, model: onnx.ModelProto) -> None:
    """Another graph than was exported."""
    chance, graph = case.chance, model.graph
    node = chance.choice(graph.node)
    kind = chance.randrange(11)
    if kind == 0:
        node.op_type = chance.choice(OPERATORS)
    elif kind == 1:
        node.domain = chance.choice(("", "infsa", "com.microsoft", "x", "ai.onnx.ml"))
    elif kind == 2:
        graph.node.remove(node)
    elif kind == 3:
        chance.choice(graph.output).name = chance.choice((*TEXTS[:4], "features", "logits", graph.node[0].output[0]))
    elif kind == 4:
        output = graph.output[chance.randrange(len(graph.output))]
        graph.output.remove(output)
    elif kind == 5 and graph.input:
        one = chance.choice(graph.input)
        one.type.tensor_type.elem_type = chance.choice((1, 2, 7, 8, 9, 10))
    elif kind == 6 and graph.input:
        graph.input.append(helper.make_tensor_value_info("more", TensorProto.FLOAT, [1]))
    elif kind == 7:
        model.opset_import[0].version = chance.choice((0, 1, 7, 999, 2**31, -1))
    elif kind == 8:  # the answer is of another shape, or no numbers, or takes a terabyte
        name = chance.choice(graph.output).name
        for each in graph.node:
            for i, output in enumerate(each.output):
                if output == name:
                    each.output[i] = "kept"
        _replace_output(case, graph, name)
    elif kind == 9 and graph.initializer:
        _dims(case, chance.choice(graph.initializer))
    elif model.functions:
        function = chance.choice(model.functions)
        body = chance.choice(function.node)
        body.op_type = chance.choice((*OPERATORS, function.name))
        if body.op_type == function.name:
            body.domain = function.domain  # a function that calls itself


def _replace_output(case: Case, graph: onnx.GraphProto, name: str) -> None:
    chance = case.chance
    shape = chance.choice(([1, 10], [1, 11], [1, 3], [10], [], [2, 10], [1, 10, 1], [1, 128], [0], [10**6, 10**6]))
    made = np.array(shape, np.int64)
    graph.initializer.append(numpy_helper.from_array(made, "extents"))
    value = numpy_helper.from_array(np.array([chance.choice((0.0, 1.0, np.nan, np.inf, 1e38))], np.float32))
    if chance.random() < 0.3:
        value = numpy_helper.from_array(np.array([1], chance.choice((np.int64, np.bool_, np.float16, np.float64))))
    graph.node.append(helper.make_node("ConstantOfShape", ["extents"], [name], value=value))
    for output in graph.output:
        if output.name == name:
            output.type.CopyFrom(helper.make_tensor_type_proto(value.data_type, None))


def _weights(case: Case) -> bytes:
    """Not finite, cut short, or of somebody else."""
    values = bytearray((case.seeds.bundle / DATA).read_bytes())
    at = case.chance.randrange(len(values) // 4) * 4
    values[at : at + 4] = case.chance.choice((b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\xff\xff\x7f\x7f"))
    return bytes(values) if case.chance.random() < 0.7 else os.urandom(0) + bytes(values[: at or 4])
