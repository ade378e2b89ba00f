"""A block of Pure InfSA: accurate, additive over keys and queries, sufficient to build the Neumann kernel."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator
from torch import nn
from torch.export import Dim

import infexport
import infsa_ops
from infsa_ops.affinity_product import reference
from infsa_ops.common import TILE


class Product(nn.Module):
    def forward(self, q, k, v):
        return infsa_ops.affinity_product(q, k, v)


def export(q, k, v):
    free = Dim.DYNAMIC
    shapes = ({0: free, 1: free, 2: free}, {0: free, 1: free, 2: free}, {0: free, 1: free, 2: free, 3: free})
    model = infexport.export(Product(), (q, k, v), dynamic_shapes=shapes)
    assert [function.name for function in model.functions] == ["AffinityProduct"]
    return model


@pytest.fixture(scope="module")
def session() -> onnxruntime.InferenceSession:
    model = export(torch.ones(2, 3, 5, 64), torch.ones(2, 3, 7, 64), torch.ones(2, 3, 7, 6))
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


SIZES = [(1, 1), (2, 5), (197, 197), (TILE, 3), (TILE + 1, 785), (3, 4097), (4097, 2)]


@pytest.mark.slow
@pytest.mark.parametrize(("queries", "keys"), SIZES)
def test_float32_is_accurate(queries, keys, session, random_tokens, relative_error):
    q = random_tokens(1, 2, queries, 64, torch.float32)[0]
    _, k, v = random_tokens(1, 2, keys, 64, torch.float32)
    expected, squares = reference.affinity_product(q.double(), k.double(), v.double())
    in_onnx = map(torch.from_numpy, session.run(None, {"q": q.numpy(), "k": k.numpy(), "v": v.numpy()}))
    for product, squared_norm in (infsa_ops.affinity_product(q, k, v), in_onnx):
        assert product.dtype == squared_norm.dtype == torch.float32
        assert relative_error(product, expected) <= 2e-6
        torch.testing.assert_close(squared_norm.double(), squares, rtol=2e-6, atol=1e-30)


@settings(max_examples=30, deadline=None)
@given(query_cut=st.integers(0, 20), key_cut=st.integers(0, 40), seed=st.integers(0, 2**31))
def test_blocks_add(query_cut, key_cut, seed, random_tokens):
    q = random_tokens(2, 3, 20, 4, torch.float64, seed=seed)[0]
    _, k, v = random_tokens(2, 3, 40, 4, torch.float64, seed=seed)
    rows, total = [], torch.zeros(2, 3, dtype=torch.float64)
    for queries in (q[:, :, :query_cut], q[:, :, query_cut:]):
        blocks = [
            infsa_ops.affinity_product(queries, k[:, :, keys], v[:, :, keys])
            for keys in (slice(key_cut), slice(key_cut, None))
        ]
        rows.append(blocks[0][0] + blocks[1][0])
        total += blocks[0][1] + blocks[1][1]
    expected, squares = reference.affinity_product(q, k, v)
    torch.testing.assert_close(torch.cat(rows, 2), expected)
    torch.testing.assert_close(total, squares)


@pytest.mark.parametrize("terms", [1, 4])
def test_it_is_what_the_neumann_kernel_is_made_of(terms, random_tokens, relative_error):
    q, k, v = random_tokens(2, 3, 300, 8, torch.float64)
    values = v
    for _ in range(terms):  # W ← V + ρÂW, then ρÂW
        product, squares = infsa_ops.affinity_product(q, k, values)
        product = 0.9 * product / (squares.sqrt()[..., None, None] + infsa_ops.EPSILON)
        values = v + product
    assert relative_error(product, infsa_ops.neumann_kernel(q, k, v, 0.9, terms)) <= 1e-13


@pytest.mark.parametrize("scale", [1.0, 1e-4, 3000.0])
def test_half_precision_is_finite_and_right(scale, random_tokens, relative_error):
    """ONNX's reference evaluator rounds after every operator; products q·k overflow float16 at 3000."""
    evaluator = ReferenceEvaluator(export(*(torch.ones(1, 2, n, 8).half() for n in (5, 6, 6))))
    q, k, _ = (random_tokens(1, 2, 150, 8, torch.float32) * scale).half()
    v = random_tokens(1, 2, 150, 8, torch.float32, seed=1)[0].half()
    with np.errstate(over="raise", invalid="raise"):
        product, squares = evaluator.run(None, {"q": q.numpy(), "k": k.numpy(), "v": v.numpy()})
    expected, expected_squares = reference.affinity_product(q.double(), k.double(), v.double())
    assert relative_error(torch.from_numpy(product), expected) <= 4 * 2.0**-10
    torch.testing.assert_close(torch.from_numpy(squares).double(), expected_squares, rtol=4 * 2.0**-10, atol=0)


@pytest.mark.parametrize(
    ("q", "k", "v"),
    [
        ((2, 3, 4), (2, 3, 4, 5), (2, 3, 4, 5)), ((2, 3, 4, 5), (2, 3, 4, 6), (2, 3, 4, 5)),
        ((2, 3, 4, 5), (2, 1, 4, 5), (2, 1, 4, 5)), ((2, 3, 4, 5), (2, 3, 7, 5), (2, 3, 4, 5)),
    ],
)  # fmt: skip
def test_shapes_that_do_not_fit_are_refused(q, k, v):
    with pytest.raises(RuntimeError, match="expected"):
        infsa_ops.affinity_product(torch.ones(q), torch.ones(k), torch.ones(v))


def test_torch_knows_its_shapes(random_tokens):
    q, k, v = random_tokens(2, 3, 9, 4, torch.float32)
    arguments = (q, k[:, :, :7], v[:, :, :7, :2])
    torch.library.opcheck(torch.ops.infsa.affinity_product.default, arguments)
