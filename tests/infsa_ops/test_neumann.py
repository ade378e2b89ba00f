"""The Neumann series: its limit, how far from it T terms are, tiles, memory, gradients, and what it refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import infsa_ops
from infsa_ops.common import TILE
from infsa_ops.neumann_kernel import reference
from infsa_ops.neumann_kernel.bounds import a_posteriori_bound, a_priori_bound, series_term, terms_for

ROUNDING = 1e-13
"""Tolerance of the limit itself, relative to ‖V‖."""


def norm(tensor: Tensor) -> Tensor:
    return torch.linalg.vector_norm(tensor, dim=(-2, -1))


def with_dominant_token(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """One token that attends to itself far more than all others do: ‖Â‖₂ near 1, where the series is slowest."""
    q, k = q.clone(), k.clone()
    q[:, :, 0] = k[:, :, 0] = 30.0
    return q, k


def last_term(q: Tensor, k: Tensor, v: Tensor, rho: float, terms: int) -> Tensor:
    """S_T = (ρÂ)ᵀ V."""
    return torch.linalg.matrix_power(reference.neumann_scores(q, k, rho), terms) @ v


# Series and limit


@pytest.mark.parametrize("dominant", [False, True])
def test_series_converges_to_the_limit(dominant, random_tokens, relative_error):
    q, k, v = random_tokens(2, 2, 40, 8, torch.float64)
    if dominant:
        q, k = with_dominant_token(q, k)
    rho = torch.tensor([0.5, 0.95], dtype=torch.float64)
    limit = reference.neumann_limit(q, k, v, rho)
    assert relative_error(infsa_ops.neumann_kernel(q, k, v, rho, terms=1), limit) > 0.05
    assert relative_error(infsa_ops.neumann_kernel(q, k, v, rho, terms=terms_for(0.95, 1e-14)), limit) <= 1e-12


def test_limit_is_the_fundamental_matrix_less_the_identity(random_tokens, relative_error):
    q, k, v = random_tokens(2, 2, 25, 8, torch.float64)
    identity = torch.eye(25, dtype=torch.float64)
    expected = (torch.linalg.inv(identity - reference.neumann_scores(q, k, 0.95)) - identity) @ v
    assert relative_error(reference.neumann_limit(q, k, v, 0.95), expected) <= 1e-12
    assert reference.neumann_limit(q.float(), k.float(), v.float(), 0.95).dtype == torch.float64


# Bounds


@settings(max_examples=60, deadline=None)
@given(
    rho=st.floats(0.05, 0.95),
    terms=st.integers(1, 12),
    tokens=st.integers(1, 24),
    dominant=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_the_rest_is_within_both_bounds(rho, terms, tokens, dominant, seed, random_tokens):
    q, k, v = random_tokens(1, 2, tokens, 4, torch.float64, seed=seed)
    if dominant:
        q, k = with_dominant_token(q, k)
    rest = norm(reference.neumann_limit(q, k, v, rho) - infsa_ops.neumann_kernel(q, k, v, rho, terms))
    a_posteriori = a_posteriori_bound(rho, last_term(q, k, v, rho, terms))
    a_priori = a_priori_bound(rho, terms) * norm(v)
    slack = ROUNDING * norm(v)
    assert (rest <= a_posteriori + slack).all()
    assert (a_posteriori <= a_priori + slack).all()  # so the rest is within the a-priori bound too


def test_bounds_are_attained_by_one_token(random_tokens):
    """One token has Â = 1 apart from ε: a smaller bound would be wrong."""
    q, k, v = random_tokens(1, 1, 1, 4, torch.float64)
    q, k = with_dominant_token(q, k)
    rest = norm(reference.neumann_limit(q, k, v, 0.8) - infsa_ops.neumann_kernel(q, k, v, 0.8, terms=3))
    torch.testing.assert_close(rest, a_posteriori_bound(0.8, last_term(q, k, v, 0.8, 3)), rtol=1e-6, atol=0)
    torch.testing.assert_close(rest, a_priori_bound(0.8, 3) * norm(v), rtol=1e-6, atol=0)


@pytest.mark.parametrize("terms", [1, 3, 41, 327])
def test_the_last_term_does_not_cancel(terms, random_tokens):
    """The difference of two series in float32 is exactly 0 from about 40 terms on."""
    q, k, v = random_tokens(1, 2, 30, 4, torch.float32)
    scores = reference.neumann_scores(q.double(), k.double(), 0.95)
    expected = torch.linalg.matrix_power(scores, terms) @ v.double()
    term = series_term(q, k, v, 0.95, terms)
    assert term.norm() > 0
    torch.testing.assert_close(term, expected, rtol=1e-9, atol=0)


def test_a_posteriori_bound_takes_rho_per_head(random_tokens):
    term = random_tokens(2, 2, 7, 4, torch.float64)[0]
    bound = a_posteriori_bound(torch.tensor([0.5, 0.9], dtype=torch.float64), term)
    torch.testing.assert_close(bound, norm(term) * torch.tensor([1.0, 9.0], dtype=torch.float64))


@settings(max_examples=200, deadline=None)
@given(rho=st.floats(0.01, 0.999), tolerance=st.floats(1e-12, 1e3))
def test_terms_for_is_the_least_number_of_terms(rho, tolerance):
    terms = terms_for(rho, tolerance)
    assert terms >= 1
    assert a_priori_bound(rho, terms) <= tolerance
    assert terms == 1 or a_priori_bound(rho, terms - 1) > tolerance


@pytest.mark.parametrize(
    ("rho", "tolerance"),
    [(0.0, 0.1), (1.0, 0.1), (-0.5, 0.1), (0.5, 0.0), (0.5, -1.0), (0.5, float("inf")), (0.5, float("nan"))],
)
def test_terms_for_refuses(rho, tolerance):
    with pytest.raises(ValueError, match="expected 0 < rho < 1 and a tolerance above 0"):
        terms_for(rho, tolerance)


# Tiles and memory


@pytest.mark.slow
@pytest.mark.parametrize("terms", [1, 4])
@pytest.mark.parametrize("tokens", [TILE - 1, TILE, TILE + 1, 2 * TILE - 1, 2 * TILE + 1])
def test_tile_boundaries(tokens, terms, random_tokens, onnx_bodies, relative_error):
    q, k, v = random_tokens(1, 2, tokens, 64, torch.float64)
    rho = torch.tensor([0.95, 0.4], dtype=torch.float64)
    truth = reference.neumann_kernel(q, k, v, rho, terms)
    assert relative_error(infsa_ops.neumann_kernel(q, k, v, rho, terms), truth) <= 1e-13
    _, body = onnx_bodies(q.float(), k.float(), v.float(), rho.float(), terms)
    assert relative_error(body, truth) <= 5e-6


MEMORY_OF_TORCH_OP = """
import torch, infsa_ops
def run(n):
    q, k, v = torch.randn(3, 1, 1, n, 8)
    infsa_ops.neumann_kernel(q, k, v, 0.95, terms=2)
"""
MEMORY_OF_ONNX_BODY = """
import sys, numpy, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
pure = session.get_outputs()[1].name
def run(n):
    q, k, v = numpy.random.default_rng(0).standard_normal((3, 1, 1, n, 64), dtype=numpy.float32)
    session.run([pure], {"q": q, "k": k, "v": v, "rho": numpy.array([0.95], numpy.float32)})
"""
# the peak of this process alone; getrusage's would be inherited from the tests
MEASURE = """
def peak():
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(status["VmHWM"].split()[0]) * 1024
run(512)
before = peak()
run(8192)
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
@pytest.mark.parametrize("program", [MEMORY_OF_TORCH_OP, MEMORY_OF_ONNX_BODY], ids=["torch op", "ONNX body"])
def test_all_pairs_never_exist_at_once(program, exported, tmp_path):
    model = tmp_path / "both.onnx"
    model.write_bytes(exported(64, 4, True))
    grown = subprocess.run(
        [sys.executable, "-c", program + MEASURE, str(model)], capture_output=True, text=True, check=True
    )
    assert 1e6 < int(grown.stdout) < 100e6  # one matrix of all pairs has 268 MB; a tile's rows 8 MB


# Shapes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": (2, 4, 3)}, r"q has shape \[2, 4, 3\], expected \[B, H, N, d\]"),
        ({"k": (1, 2, 5, 3)}, r"k has shape \[1, 2, 5, 3\], expected \[1, 2, 4, 3\]"),
        ({"v": (1, 2, 5, 3)}, r"v has shape \[1, 2, 5, 3\], expected \[1, 2, 4, d_v\]"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_wrong_shapes_are_refused(changes, message, device):
    shapes = dict.fromkeys("qkv", (1, 2, 4, 3)) | changes
    with pytest.raises(RuntimeError, match=message):
        infsa_ops.neumann_kernel(**{key: torch.zeros(shape, device=device) for key, shape in shapes.items()}, rho=0.5)


@pytest.mark.parametrize("rho", [torch.ones(3), torch.ones(1, 2)])
def test_rho_of_another_shape_is_refused(rho, random_tokens):
    with pytest.raises(ValueError, match=r"rho has shape .* expected a scalar or one value per head, \[2\]"):
        infsa_ops.neumann_kernel(*random_tokens(1, 2, 4, 3, torch.float32), rho)


def test_no_terms_are_refused(random_tokens):
    with pytest.raises(RuntimeError, match="terms is 0, expected at least 1"):
        infsa_ops.neumann_kernel(*random_tokens(1, 2, 4, 3, torch.float32), 0.5, terms=0)


# Dtypes


@pytest.mark.parametrize(
    ("dtype", "tolerance", "scale"),
    [
        (torch.float16, 2e-3, 1),
        (torch.float16, 2e-3, 40),
        (torch.bfloat16, 2e-2, 1),
        (torch.bfloat16, 2e-2, 40),
    ],
)
def test_half_precision_tokens(dtype, tolerance, scale, random_tokens, relative_error):
    q, k, v = random_tokens(1, 2, 300, 16, torch.float32).to(dtype)
    q, k = scale * q, scale * k
    out = infsa_ops.neumann_kernel(q, k, v, 0.95, terms=2)
    assert out.dtype == dtype
    assert relative_error(out, reference.neumann_kernel(q.double(), k.double(), v.double(), 0.95, 2)) <= tolerance


# Gradients and registration


def arguments(heads: int | None, random_tokens) -> list[Tensor]:
    rho = torch.full(() if heads is None else (heads,), 0.7, dtype=torch.float64)
    return [tensor.requires_grad_() for tensor in (*random_tokens(1, 2, 4, 3, torch.float64), rho)]


@pytest.mark.parametrize("terms", [1, 3])
@pytest.mark.parametrize("heads", [None, 2], ids=["scalar rho", "rho per head"])
def test_gradients(heads, terms, random_tokens):
    def kernel(*tensors: Tensor) -> Tensor:
        return infsa_ops.neumann_kernel(*tensors, terms=terms)

    assert torch.autograd.gradcheck(kernel, arguments(heads, random_tokens))


def test_gradient_of_the_values_alone(random_tokens):
    q, k, v, rho = arguments(None, random_tokens)
    infsa_ops.neumann_kernel(q.detach(), k.detach(), v, rho.detach()).sum().backward()
    expected = reference.neumann_scores(q, k, rho).detach().sum(-2)[..., None].expand_as(v)
    torch.testing.assert_close(v.grad, expected)


@pytest.mark.parametrize("terms", [1, 3])
def test_registration(terms, random_tokens):
    torch.library.opcheck(torch.ops.infsa.neumann_kernel.default, (*arguments(None, random_tokens), terms))
