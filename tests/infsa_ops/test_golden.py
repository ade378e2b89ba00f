"""Reference, torch ops and ONNX bodies against the InfSA reference package's own results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from infsa_ops.linear_state import reference as linear
from infsa_ops.neumann_kernel import reference as pure

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = sorted(path.stem.removeprefix("attention_") for path in GOLDEN.glob("attention_*.safetensors"))
EXACT_RHO = {
    entry["file"].removeprefix("attention_").removesuffix(".safetensors"): entry["rho"]
    for entry in json.loads((GOLDEN / "index.json").read_text())
    if entry["kind"] == "attention"
}
TOLERANCE = 5e-6


def golden(case: str) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], dict[str, Tensor]]:
    """(q, k, v, rho) and the rest of the file."""
    tensors = load_file(GOLDEN / f"attention_{case}.safetensors")
    return (tensors["q"], tensors["k"], tensors["v"], tensors["rho"]), tensors


@pytest.fixture(params=["torch_ops", "onnx_bodies"])
def operators(request):
    return request.getfixturevalue(request.param)


def test_all_cases_are_here():
    assert CASES == ["base", "large", "negative", "one_token", "tiny", "zero_tokens"]


@pytest.mark.parametrize("case", CASES)
def test_reference(case, relative_error):
    (q, k, v, rho), expected = golden(case)
    assert relative_error(linear.linear_attention(q, k, v, rho), expected["linear_infsa.out_f64"]) <= TOLERANCE
    assert relative_error(linear.linear_scores(q, k, rho)[..., None], expected["linear_infsa.scores"]) <= TOLERANCE
    assert relative_error(pure.neumann_kernel(q, k, v, rho), expected["pure_infsa.out_f64"]) <= TOLERANCE
    assert relative_error(pure.neumann_scores(q, k, rho), expected["pure_infsa.scores"]) <= TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_reference_in_float64(case, relative_error):
    tokens, expected = golden(case)
    q, k, v, _ = (tensor.double() for tensor in tokens)
    rho = EXACT_RHO[case]  # 0.95 in float32 is off by 1e-8
    assert relative_error(linear.linear_attention(q, k, v, rho), expected["linear_infsa.out_f64"]) <= 1e-13
    assert relative_error(pure.neumann_kernel(q, k, v, rho), expected["pure_infsa.out_f64"]) <= 1e-13


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_operators(case, operators, relative_error):
    tokens, expected = golden(case)
    linear_out, pure_out = operators(*tokens)
    assert relative_error(linear_out, expected["linear_infsa.out_f64"]) <= TOLERANCE
    assert relative_error(pure_out, expected["pure_infsa.out_f64"]) <= TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_scores_of_operators(case, operators, relative_error):
    """With the identity for values, the results are the scores."""
    (q, k, _, rho), expected = golden(case)
    identity = torch.eye(q.shape[2]).expand(*q.shape[:2], -1, -1).contiguous()
    linear_rows, pure_scores = operators(q, k, identity, rho)
    assert relative_error(linear_rows, expected["linear_infsa.scores"].mT.expand_as(linear_rows)) <= TOLERANCE
    assert relative_error(pure_scores, expected["pure_infsa.scores"]) <= TOLERANCE
