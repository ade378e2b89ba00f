"""‖A‖²_F by itself: accurate, additive, the divisor of the Neumann kernel, and what it refuses."""

from __future__ import annotations

import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.export import Dim

import infexport
import infsa_ops
from infsa_ops.affinity_squared_norm import reference
from infsa_ops.common import TILE


class SquaredNorm(nn.Module):
    def forward(self, q, k):
        return infsa_ops.affinity_squared_norm(q, k)


@pytest.fixture(scope="module")
def session() -> onnxruntime.InferenceSession:
    free = Dim.DYNAMIC
    shapes = ({0: free, 1: free, 2: free}, {0: free, 1: free, 2: free})
    model = infexport.export(SquaredNorm(), (torch.ones(2, 3, 5, 64), torch.ones(2, 3, 7, 64)), dynamic_shapes=shapes)
    assert [function.name for function in model.functions] == ["AffinitySquaredNorm"]
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


SIZES = [(1, 1), (2, 5), (197, 197), (TILE, 3), (TILE + 1, 785), (4097, 4097)]


@pytest.mark.slow
@pytest.mark.parametrize(("queries", "keys"), SIZES)
def test_float32_is_accurate(queries, keys, session, random_tokens):
    q = random_tokens(1, 2, queries, 64, torch.float32)[0]
    k = random_tokens(1, 2, keys, 64, torch.float32)[1]
    truth = reference.affinity_squared_norm(q.double(), k.double())
    (in_onnx,) = session.run(None, {"q": q.numpy(), "k": k.numpy()})
    for actual in (infsa_ops.affinity_squared_norm(q, k), torch.from_numpy(in_onnx)):
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual.double(), truth, rtol=2e-6, atol=1e-30)


@settings(max_examples=30, deadline=None)
@given(cut=st.integers(0, 40), swap=st.booleans(), seed=st.integers(0, 2**31))
def test_squares_add_over_queries_and_keys(cut, swap, seed, random_tokens):
    q, k, _ = random_tokens(2, 3, 40, 4, torch.float64, seed=seed)
    parts = [(q[:, :, :cut], k), (q[:, :, cut:], k)]
    if swap:
        parts = [(k, part) for part, _ in parts]
        q, k = k, q
    total = sum(infsa_ops.affinity_squared_norm(*part) for part in parts)
    torch.testing.assert_close(total, reference.affinity_squared_norm(q, k))


def test_it_is_what_the_neumann_kernel_divides_by(random_tokens, relative_error):
    q, k, v = random_tokens(2, 3, 300, 8, torch.float64)
    affinity = torch.relu(q @ k.transpose(-1, -2) / 8)
    norm = infsa_ops.affinity_squared_norm(q, k).sqrt()[..., None, None]
    expected = 0.9 * affinity @ v / (norm + infsa_ops.EPSILON)
    assert relative_error(infsa_ops.neumann_kernel(q, k, v, 0.9), expected) <= 1e-13


def test_half_precision_sums_in_float32():
    q = k = torch.full((1, 1, 300, 64), 20.0).half()  # each square is 400², above half precision's largest
    torch.testing.assert_close(infsa_ops.affinity_squared_norm(q, k), torch.full((1, 1), 300.0**2 * 400**2))


@pytest.mark.parametrize(
    ("q", "k"),
    [((2, 3, 4), (2, 3, 4, 5)), ((2, 3, 4, 5), (2, 3, 4, 6)), ((2, 3, 4, 5), (2, 1, 4, 5)), ((2, 3, 4, 5), (2, 3, 4))],
)
def test_shapes_that_do_not_fit_are_refused(q, k):
    with pytest.raises(RuntimeError, match="expected"):
        infsa_ops.affinity_squared_norm(torch.ones(q), torch.ones(k))


def test_torch_knows_its_shapes(random_tokens):
    q, k, _ = random_tokens(2, 3, 9, 4, torch.float32)
    torch.library.opcheck(torch.ops.infsa.affinity_squared_norm.default, (q, k[:, :, :7]))
