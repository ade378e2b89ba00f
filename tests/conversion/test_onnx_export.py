"""Exported models: operators stay nodes, with bodies in standard operators, valid to those who know neither."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import onnx
import onnxruntime
import pytest
import torch
from onnx import shape_inference
from support import relative_error
from torch import Tensor, nn
from torch.export import Dim

import infexport
import infsa_ops
from infexport.conversion.onnx_export import OPSET
from infexport.errors import InfexportError

pytestmark = pytest.mark.slow

OPERATORS = {"LinearInfSAStateUpdate", "NeumannKernel"}


class Block(nn.Module):
    """A user's own module: both attentions, one after the other, on tokens `[B, N, E]`."""

    def __init__(self, terms: tuple[int, ...] = (3,)) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)
        self.dropout = nn.Dropout(0.5)
        self.rho = nn.Parameter(torch.tensor([0.9, 0.6]))
        self.terms = terms

    def forward(self, tokens: Tensor) -> Tensor:
        q, k, v = self.qkv(tokens).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        v = infsa_ops.linear_attention(q, k, v, self.rho) + v
        for terms in self.terms:
            v = infsa_ops.neumann_kernel(q, k, v, self.rho, terms)
        return self.dropout(v.transpose(1, 2).flatten(2))


def block(**arguments) -> Block:
    torch.manual_seed(0)
    return Block(**arguments).eval()


def tokens(batch: int, count: int) -> Tensor:
    return torch.randn(batch, count, 16, generator=torch.Generator().manual_seed(count))


DYNAMIC = ({0: Dim("batch"), 1: Dim("tokens")},)


@pytest.fixture(scope="module")
def model() -> onnx.ModelProto:
    return infexport.export(block(), (tokens(2, 5),), dynamic_shapes=DYNAMIC)


@pytest.fixture(scope="module")
def bodies(model) -> dict[str, onnx.FunctionProto]:
    return {function.name: function for function in model.functions}


def subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        yield from ([attribute.g] if attribute.type == onnx.AttributeProto.GRAPH else attribute.graphs)


def all_nodes(nodes) -> Iterator[onnx.NodeProto]:
    for node in nodes:
        yield node
        for graph in subgraphs(node):
            yield from all_nodes(graph.node)


def defined(nodes) -> Iterator[str]:
    """Every value name that `nodes` and the graphs inside them define."""
    for node in nodes:
        yield from node.output
        for graph in subgraphs(node):
            yield from (value.name for value in (*graph.input, *graph.initializer))
            yield from defined(graph.node)


# Nodes and bodies


def test_operators_stay_nodes(model):
    nodes = [node for node in model.graph.node if node.domain == infsa_ops.DOMAIN]
    assert [node.op_type for node in nodes] == ["LinearInfSAStateUpdate"] * 2 + ["NeumannKernel"]
    assert [(a.name, a.i) for a in nodes[-1].attribute] == [("terms", 3)]


def test_every_operator_has_its_body(model, bodies):
    assert set(bodies) == OPERATORS
    assert {function.domain for function in bodies.values()} == {"infsa"}
    assert {entry.domain: entry.version for entry in model.opset_import} == {"": OPSET, "infsa": 1}
    # another default version than the model's fails the full check
    assert all([(e.domain, e.version) for e in f.opset_import] == [("", OPSET)] for f in bodies.values())


@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_bodies_are_standard_operators(name, bodies):
    nodes = list(all_nodes(bodies[name].node))
    assert {node.domain for node in nodes} == {""}
    for node in nodes:
        assert onnx.defs.get_schema(node.op_type, OPSET, "").since_version <= OPSET  # raises for an unknown one


def test_the_walk_enters_scans(bodies):
    """Or the test above, and the one below, would see less than they say."""
    outer = {node.op_type for node in bodies["NeumannKernel"].node}
    assert "Scan" in outer
    assert "Relu" not in outer
    assert [node.op_type for node in all_nodes(bodies["NeumannKernel"].node)].count("Relu") == 3  # one each term


@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_names_inside_a_scan_shadow_none_outside(name, bodies):
    names = [*bodies[name].input, *defined(bodies[name].node)]
    assert len(names) == len(set(names))


# Validity

CHECK = """
import sys
import onnx
from onnx import shape_inference
model = onnx.load(sys.argv[1])
onnx.checker.check_model(model, full_check=True)
shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
assert not {"torch", "infsa_ops", "infexport", "onnxscript"} & set(sys.modules)
assert not onnx.defs.has("NeumannKernel", "infsa")
"""


def test_model_is_valid(model):
    onnx.checker.check_model(model, full_check=True)
    inferred = shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    assert [d.dim_value or d.dim_param for d in inferred.graph.output[0].type.tensor_type.shape.dim][1:] == [
        "tokens",
        16,
    ]


def test_model_is_valid_where_the_operators_are_unknown(model, tmp_path):
    onnx.save(model, tmp_path / "model.onnx")
    checked = subprocess.run(
        [sys.executable, "-c", CHECK, str(tmp_path / "model.onnx")], capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stderr


def test_a_model_without_operators_is_valid():
    model = infexport.export(nn.Linear(3, 2), (torch.ones(1, 3),))
    assert not model.functions
    onnx.checker.check_model(model, full_check=True)


# Terms


def test_unequal_terms_in_one_module_are_refused():
    with pytest.raises(ValueError, match=r"NeumannKernel occurs with \{'terms': 3, .*\} and with \{'terms': 2, "):
        infexport.export(block(terms=(3, 2)), (tokens(1, 5),))


def test_equal_terms_share_a_body():
    model = infexport.export(block(terms=(2, 2)), (tokens(1, 5),))
    assert [node.op_type for node in model.graph.node].count("NeumannKernel") == 2
    assert sorted(function.name for function in model.functions) == sorted(OPERATORS)


# Running


@pytest.mark.parametrize(("batch", "count"), [(1, 1), (2, 5), (3, 300)])
def test_one_graph_runs_at_every_size(model, batch, count):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (out,) = session.run(None, {session.get_inputs()[0].name: tokens(batch, count).numpy()})
    torch.testing.assert_close(torch.from_numpy(out), block()(tokens(batch, count)).detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("count", [3, 7])
def test_torch_export_keeps_the_operators_dynamic(count):
    program = torch.export.export(block(), (tokens(2, 5),), dynamic_shapes=DYNAMIC)
    called = [str(node.target) for node in program.graph.nodes if str(node.target).startswith("infsa.")]
    assert called == ["infsa.linear_state_update.default"] * 2 + ["infsa.neumann_kernel.default"]
    torch.testing.assert_close(program.module()(tokens(1, count)), block()(tokens(1, count)))


# What is left behind


def test_export_leaves_the_module_as_it_was():
    module = block()
    before = module(tokens(2, 5))
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    infexport.export(module, (tokens(2, 5),), dynamic_shapes=DYNAMIC)
    assert torch.equal(module(tokens(2, 5)), before)
    assert all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())
    before.sum().backward()  # still trainable
    assert module.rho.grad is not None
    assert module.rho.requires_grad


def test_export_leaves_a_module_in_training():
    module = block().train()
    model = infexport.export(module, (tokens(2, 5),))
    assert "Dropout" not in {node.op_type for node in model.graph.node}  # exported in eval mode all the same
    assert module.training
    assert module.dropout.training


# Other dtypes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_valid(dtype):
    model = infexport.export(block().to(dtype), (tokens(2, 5).to(dtype),), dynamic_shapes=DYNAMIC)
    onnx.checker.check_model(model, full_check=True)
    if dtype == torch.float16:  # ONNX Runtime has no products in bfloat16 on CPUs
        session, x = onnxruntime.InferenceSession(model.SerializeToString()), tokens(2, 7)
        (out,) = session.run(None, {session.get_inputs()[0].name: x.half().numpy()})
        # a rounding each of the input, the weights, three products and three sums
        assert relative_error(out, block()(x).detach()) <= 8 * torch.finfo(dtype).eps


def test_float64_is_refused_by_name():
    with pytest.raises(InfexportError) as caught:
        infexport.export(block().double(), (tokens(2, 5).double(),), dynamic_shapes=DYNAMIC)
    assert "double" in caught.value.summary
    assert "LinearInfSAStateUpdate" in caught.value.summary
    assert "float()" in caught.value.hint


def test_float64_without_operators_is_a_model():
    model = infexport.export(nn.Linear(16, 3).double(), (tokens(2, 5).double(),))
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    assert session.get_inputs()[0].type == "tensor(double)"
