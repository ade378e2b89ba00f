"""Shared fixtures of the operators' tests: random tokens, the measure of error, both operators exported to ONNX."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import infexport
import infsa_ops


class BothOperators(nn.Module):
    """Linear-InfSA and T terms of Pure InfSA, of the same tokens."""

    def __init__(self, terms: int) -> None:
        super().__init__()
        self.terms = terms

    def forward(self, q: Tensor, k: Tensor, v: Tensor, rho: Tensor) -> tuple[Tensor, Tensor]:
        return infsa_ops.linear_attention(q, k, v, rho), infsa_ops.neumann_kernel(q, k, v, rho, self.terms)


def _random_tokens(batch: int, heads: int, tokens: int, width: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, batch, heads, tokens, width, generator=generator, dtype=dtype)


def _relative_error(actual: Tensor, truth: Tensor) -> float:
    """The worst head's ‖actual − truth‖_F / ‖truth‖_F; absolute for a head whose truth is zero."""
    assert actual.shape == truth.shape
    difference = torch.linalg.vector_norm(actual.double() - truth.double(), dim=(-2, -1))
    scale = torch.linalg.vector_norm(truth.double(), dim=(-2, -1))
    return (difference / torch.where(scale == 0, 1, scale)).max().item()


@cache
def _exported(width: int, terms: int, rho_per_head: bool) -> bytes:
    """`BothOperators` as a serialised ONNX model; batch, heads, tokens and the width of v are dynamic."""
    free = Dim.DYNAMIC
    q, k, v = _random_tokens(2, 3, 5, width, torch.float32)
    rho = torch.tensor([0.5, 0.6, 0.7]) if rho_per_head else torch.tensor(0.5)
    tokens = {0: free, 1: free, 2: free}
    shapes = (tokens, tokens, {**tokens, 3: free}, {0: free} if rho_per_head else {})
    model = infexport.export(BothOperators(terms), (q, k, v[..., :4], rho), dynamic_shapes=shapes)
    return model.SerializeToString()


@pytest.fixture(scope="session")
def random_tokens() -> Callable[..., Tensor]:
    return _random_tokens


@pytest.fixture(scope="session")
def relative_error() -> Callable[[Tensor, Tensor], float]:
    return _relative_error


@pytest.fixture(scope="session")
def exported() -> Callable[[int, int, bool], bytes]:
    """(head width, T, one ρ per head) → the serialised ONNX model behind `onnx_bodies`."""
    return _exported


@pytest.fixture(scope="session")
def torch_ops() -> Callable[..., tuple[Tensor, Tensor]]:
    """(q, k, v, rho, terms) → Linear-InfSA and Pure InfSA, by the torch ops."""
    return lambda q, k, v, rho, terms=1: BothOperators(terms)(q, k, v, rho)


@pytest.fixture(scope="session")
def onnx_bodies() -> Callable[..., tuple[Tensor, Tensor]]:
    """(q, k, v, rho, terms) → the same, by the ONNX function bodies in ONNX Runtime.

    A graph is exported once for each head width, T, and kind of ρ; it serves every other size.
    """

    @cache
    def session(*key: int | bool) -> onnxruntime.InferenceSession:
        return onnxruntime.InferenceSession(_exported(*key), providers=["CPUExecutionProvider"])

    def run(q: Tensor, k: Tensor, v: Tensor, rho: Tensor, terms: int = 1) -> tuple[Tensor, Tensor]:
        feeds = {name: tensor.numpy() for name, tensor in (("q", q), ("k", k), ("v", v), ("rho", rho))}
        linear, pure = session(q.shape[-1], terms, rho.dim() == 1).run(None, feeds)
        return torch.from_numpy(linear), torch.from_numpy(pure)

    return run
