"""Scores, Katz and principal eigenvectors against dense linear algebra, and the walk against the dense inverse."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support import GOLDEN, relative_error
from torch import Tensor

from infsa_ops.neumann_kernel import reference
from infvit.absorbing import ALLOWANCE, BATCHES, compare_visits, expected_visits, make_chain, simulate
from infvit.centrality import katz, katz_limit, linear_scores, principal, row_sums

RHO = 0.95
WALKERS = 50_000


def random_tokens(
    tokens: int, width: int = 8, seed: int = 0, heads: int = 1, common: float = 0.0
) -> tuple[Tensor, Tensor]:
    """q and k, float64 `[1, heads, N, d]`; with a direction in common, one token in many rows."""
    q, k = torch.randn(2, 1, heads, tokens, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return q + common, k + common


def having(affinity) -> tuple[Tensor, Tensor]:
    """q and k whose relu(q̂k̂ᵀ) is a given matrix `[N, N]`, non-negative."""
    affinity = torch.as_tensor(affinity, dtype=torch.float64)
    return (affinity * len(affinity))[None, None], torch.eye(len(affinity), dtype=torch.float64)[None, None]


def without(q: Tensor, k: Tensor, rows=(), columns=()) -> tuple[Tensor, Tensor]:
    """Tokens that attend to none, and tokens that none attends to."""
    q[:, :, list(rows)], k[:, :, list(columns)] = 0, 0
    return q, k


def bipartite(size: int) -> Tensor:
    """λ and −λ are both eigenvalues: plain power iteration oscillates."""
    block = torch.rand(2, size, size, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    zero = torch.zeros(size, size)
    return torch.cat([torch.cat([zero, block[0]], 1), torch.cat([3 * block[1], zero], 1)])


def triangular() -> Tensor:
    """Tokens 4 to 6 attend to no token before them: one of the eigenvectors has zeros that no count of steps shows."""
    affinity = torch.rand(7, 7, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    affinity[4:, :4] = 0
    return affinity


CASES = {
    "random": random_tokens(33, 4),
    "several_heads": random_tokens(17, 8, heads=3),
    "in_common": random_tokens(33, common=0.7),
    "zero_columns": without(*random_tokens(21, common=0.3), columns=(0, 5, 6)),
    "zero_rows": without(*random_tokens(21, common=0.3), rows=(2, 3)),
    "zero_rows_and_columns": without(*random_tokens(21, common=0.3), rows=(2, 3), columns=(3, 20)),
    "bipartite": having(bipartite(6)),
    "lopsided": having(bipartite(6) * torch.tensor([8.0] + 11 * [1])[:, None]),
    "cycle": having(torch.tensor([[0, 2.0, 0], [0, 0, 1], [4, 0, 0]])),
    "triangular": having(triangular()),
    "one_token": having([[0.3]]),
}
S_OF = {name: reference.neumann_scores(q, k, RHO)[0, 0].numpy() for name, (q, k) in CASES.items()}


def dense_principal(affinity: np.ndarray, side: str) -> tuple[float, np.ndarray]:
    values, vectors = np.linalg.eig(affinity.T if side == "left" else affinity)
    largest = np.argmax(values.real)
    vector = np.abs(vectors[:, largest].real)
    return values[largest].real, vector / np.linalg.norm(vector)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("case", CASES)
def test_power_iteration_finds_the_dense_eigenvector(case, side):
    q, k = CASES[case]
    found = principal(q, k, side)
    assert found.residual.max() <= 1e-10
    for head in range(q.shape[1]):
        affinity = torch.relu(q[0, head] @ k[0, head].T / q.shape[-1]).numpy()
        value, vector = dense_principal(affinity, side)
        assert abs(found.eigenvalue[0, head].item() - value) <= 1e-6 * value
        assert np.abs(found.vector[0, head].numpy() - vector).max() <= 1e-6


@pytest.mark.parametrize("side", ["left", "right"])
def test_no_endless_walk_is_no_vector(side):
    """All affinities zero; or a walk that ends after three steps: λ = 0, found exactly and at once."""
    nilpotent = torch.triu(torch.ones(4, 4), diagonal=1)
    for affinity, steps in ((torch.zeros(5, 5), 1), (nilpotent, 4)):
        found = principal(*having(affinity), side)
        assert found.eigenvalue.item() == 0
        assert found.vector.isnan().all()
        assert found.steps.item() == steps
        assert found.residual.item() == 0


def test_what_does_not_converge_says_so():
    q, k = having(torch.diag(torch.tensor([1, 1 - 1e-6, 0.5])) + 1e-9)
    found = principal(q, k, max_steps=50)
    assert found.steps.item() == 50
    assert 1e-10 < found.residual.item() < 1e-5
    assert found.vector.norm().item() == pytest.approx(1)


@pytest.mark.parametrize("case", CASES)
def test_column_katz_is_the_dense_inverse(case):
    q, k = CASES[case]
    scores = reference.neumann_scores(q, k, RHO)[0].numpy()
    identity = np.eye(q.shape[2])
    series = np.linalg.inv(identity - scores) - identity
    for side, axis in (("left", -2), ("right", -1)):
        found, terms = katz_limit(q, k, RHO, side, 1e-12)
        assert relative_error(found[0], series.sum(axis)) <= 1e-11
        if side == "left":
            assert relative_error(katz(q, k, RHO, terms)[0], series.sum(axis)) <= 1e-11
    assert relative_error(row_sums(q, k, RHO)[0], scores.sum(-1)) <= 1e-13
    powers, total = np.broadcast_to(identity, scores.shape), 0
    for terms in (1, 2, 3):
        powers = powers @ scores
        total = total + powers
        assert relative_error(katz(q, k, RHO, terms)[0], total.sum(-2)) <= 1e-12


def test_katz_takes_a_discount_per_head():
    q, k = CASES["several_heads"]
    rho = torch.tensor([0.3, 0.6, 0.9], dtype=torch.float64)
    each = [katz_limit(q[:, i : i + 1], k[:, i : i + 1], float(rho[i]), tolerance=1e-12)[0] for i in range(3)]
    assert relative_error(katz_limit(q, k, rho, tolerance=1e-12)[0], torch.cat(each, 1)) <= 1e-11


@pytest.mark.parametrize("case", sorted(path.stem for path in GOLDEN.glob("attention_*.safetensors")))
def test_scores_are_the_reference_packages(case):
    tensors = load_file(GOLDEN / f"{case}.safetensors")
    expected = tensors["linear_infsa.scores"]
    found = tensors["rho"] * linear_scores(tensors["q"], tensors["k"])
    assert (found[..., None] - expected).norm() <= 5e-6 * expected.norm()


@pytest.mark.parametrize(("common", "left", "right"), [(0.0, 0.825, 0.483), (0.6, 0.985, 0.742), (1.0, 0.999, 0.842)])
def test_scores_are_nearest_to_the_left_eigenvector(common, left, right):
    """Test the paper's 0.985 for "structured" tokens: it depends on a direction common to queries and keys.

    Tokens in four clusters, with noise as large as these, lengths that vary by a third, and the common direction 0.6
    as large. Lengths and clusters move the left cosine by 0.01; equal lengths bring the right one to 0.82.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tokens, width, heads = 197, 32, 16
    cluster = torch.randint(4, (tokens,), generator=generator)
    direction = common * normal(1, heads, 1, width)
    q, k = (
        (normal(1, heads, 4, width)[:, :, cluster] + normal(1, heads, tokens, width) + direction)
        * torch.exp(0.3 * normal(1, heads, tokens, 1))
        for _ in range(2)
    )
    scores = linear_scores(q, k)
    for side, cosine in (("left", left), ("right", right)):
        found = torch.cosine_similarity(scores, principal(q, k, side, 1e-8).vector, dim=-1).mean()
        assert found.item() == pytest.approx(cosine, abs=0.005)


def exact_visits(scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Visits of the chain D⁻¹SD, by its dense fundamental matrix."""
    chain = scores * weights / weights[:, None]
    identity = np.eye(len(chain))
    return weights / weights.sum() @ (np.linalg.inv(identity - chain) - identity)


KINDS = {
    "random": "literal",
    "in_common": "perron",
    "zero_columns": "perron",
    "zero_rows": "katz",
    "zero_rows_and_columns": "katz",
    "bipartite": "literal",
    "lopsided": "perron",
    "cycle": "literal",
    "triangular": "katz",
    "one_token": "literal",
}
"""Kind of chain expected for each case."""


def chain_in(case: str, rho: float = RHO):
    q, k = (tokens[0, 0] for tokens in CASES[case])
    chain = make_chain(q, k, rho, principal(q[None, None], k[None, None], "right").vector.flatten())
    return q, k, chain


@pytest.mark.parametrize("case", KINDS)
def test_the_chain_is_one_and_visits_are_katz(case):
    q, k, chain = chain_in(case)
    scores, weights = S_OF[case], chain.weights.numpy()
    assert chain.kind == KINDS[case]
    assert (weights > 0).all()
    rows = (scores * weights / weights[:, None]).sum(1)
    assert rows.max() < 1
    if chain.kind == "perron":
        assert np.ptp(rows) <= 1e-8
    visits = exact_visits(scores, weights)
    assert relative_error(expected_visits(q, k, RHO, chain.weights), visits) <= 1e-5
    # mapped back: column Katz
    column = katz_limit(q[None, None], k[None, None], RHO, tolerance=1e-12)[0].flatten()
    assert relative_error(visits * weights.sum() / weights, column) <= 1e-7


@pytest.mark.parametrize("case", KINDS)
def test_the_walk_visits_as_often_as_the_inverse_says(case):
    q, k, chain = chain_in(case)
    visits = simulate(q, k, RHO, chain.weights, WALKERS, np.random.default_rng(0))
    assert visits.shape == (BATCHES, len(q))
    found = compare_visits(visits, exact_visits(S_OF[case], chain.weights.numpy()), WALKERS)
    assert found
    assert found.errors <= 4
    assert found.relative <= 3 * found.chance


@pytest.mark.parametrize("case", ["random", "in_common", "zero_rows"])
def test_another_chain_is_noticed(case):
    q, k, chain = chain_in(case)
    scores, weights = S_OF[case], chain.weights.numpy()
    visits = simulate(q, k, RHO, chain.weights, WALKERS, np.random.default_rng(0))
    right = exact_visits(scores, weights)
    by_rows = exact_visits(scores.T, weights)
    others = {
        "those that attend": by_rows * right.sum() / by_rows.sum(),
        "another discount": exact_visits(scores * 0.98, weights),
        "one term": weights / weights.sum() @ (scores * weights / weights[:, None]),
        "the start counted": right + weights / weights.sum(),
        "tokens in another order": np.roll(right, 1),
        "other weights": exact_visits(scores, weights * np.linspace(1, 1.5, len(weights))),
    }
    passed = [name for name, expected in others.items() if compare_visits(visits, expected, WALKERS)]
    assert passed == []


def test_errors_are_what_chance_makes():
    """Squared deviations average 1 over many seeds: chance is not overestimated and the allowance is effective."""
    q, k, chain = chain_in("in_common")
    expected = exact_visits(S_OF["in_common"], chain.weights.numpy())
    found = [
        compare_visits(simulate(q, k, RHO, chain.weights, 2048, np.random.default_rng(seed)), expected, 2048)
        for seed in range(200)
    ]
    assert 0.8 <= np.mean([one.distance**2 for one in found]) <= 1.2
    assert 0.7 <= np.mean([one.total**2 for one in found]) <= 1.3
    assert max(one.errors for one in found) <= ALLOWANCE


def test_rare_visits_are_not_missed_and_not_overrated():
    nothing = np.zeros((BATCHES, 3))
    assert compare_visits(nothing, np.zeros(3), WALKERS)
    assert compare_visits(nothing, np.full(3, 1e-6), WALKERS)
    assert not compare_visits(nothing, np.full(3, 1e-2), WALKERS)
    once = nothing.copy()
    once[0, 0] = BATCHES / WALKERS
    assert compare_visits(once, np.full(3, 1e-9), WALKERS)


def test_the_walk_is_the_same_every_time():
    q, k, chain = chain_in("in_common")
    first, again, other = (simulate(q, k, RHO, chain.weights, 1000, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any()


def test_no_chain_is_refused():
    q, k, chain = chain_in("in_common")
    assert row_sums(q[None, None], k[None, None], RHO).max() > 1
    with pytest.raises(ValueError, match="no absorbing chain"):
        simulate(q, k, RHO, torch.ones_like(chain.weights), 1000, np.random.default_rng(0))


def test_all_pairs_are_never_in_memory():
    tokens = 4097
    q, k = (x[0, 0] for x in random_tokens(tokens, 4))
    tracemalloc.start()
    try:
        simulate(q, k, 0.5, torch.ones(tokens, dtype=torch.float64), 1000, np.random.default_rng(0))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < tokens**2 * 8 / 3


def test_a_series_without_a_limit_is_refused():
    q = torch.rand(1, 1, 5, 3, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="no limit"):
        katz_limit(q, q, 1.0)
