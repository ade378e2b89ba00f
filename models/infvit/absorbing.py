"""Absorbing-chain interpretation of Pure InfSA's limit, checked by simulating the chain.

With S = ρÂ of one head and h > 0 such that Sh < h in every entry, P = D⁻¹SD, D = diag(h), is a Markov chain: from token
n a walker goes to m with probability P_nm = S_nm·h_m/h_n and is absorbed with the rest. Expected visits to m, the start
not counted, of walkers that start at n with probability h_n/Σh:

    e_m = Σ_n (h_n/Σh) ((I − P)⁻¹ − I)_nm = h_m c_m / Σh,        cᵀ = 1ᵀ((I − S)⁻¹ − I)

so visits are the column Katz centrality, each weighed by its h_m. There is always such an h:

    literal   h = 1, where every row of S sums to less than 1: S is the chain.
    perron    the right Perron vector of S, where it is positive: every row of P sums to ρλ(Â).
    katz      (I − S)⁻¹1 ≥ 1, for which Sh = h − 1: rows of P sum to 1 − 1/h_n. It exists for every S.

This describes the limit of the series: a network that computes T = 1 uses its first term.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import infsa_ops
from infsa_ops import EPSILON
from infvit.centrality import katz_limit, row_sums

Kind = Literal["literal", "perron", "katz"]
Floats = NDArray[np.float64]

BATCHES = 64
"""Groups of walkers; the standard errors are computed from their means."""

ALLOWANCE = 5.0
"""Allowed deviation in standard errors; about one of 600,000 comparisons exceeds it by chance."""

SERIES = 1e-5
"""Relative tolerance of the series the visits are compared with: two orders below what a million walkers resolve."""

_POSITIVE = 1e-6  # of the largest entry; a Perron vector with less has zeros, as far as its iteration can tell
_ROWS = 256


@dataclass(frozen=True)
class Chain:
    """A way to read S as an absorbing chain: `kind` as above, and `weights` h, float64 `[N]`."""

    kind: Kind
    weights: Tensor


def make_chain(q: Tensor, k: Tensor, rho: float, perron: Tensor) -> Chain:
    """Return the first valid chain of literal, perron and katz.

    Args:
        q, k: of one head, float64 `[N, d]`, not yet scaled.
        rho: discount in (0, 1).
        perron: right principal eigenvector of relu(q̂k̂ᵀ), `[N]`; may have zeros, or be NaN.
    """
    q, k = q[None, None], k[None, None]
    if row_sums(q, k, rho).max() < 1:
        return Chain("literal", torch.ones_like(perron))
    if perron.min() > _POSITIVE * perron.max():
        image = infsa_ops.neumann_kernel(q, k, perron[None, None, :, None], rho).flatten()
        if (image < perron).all():
            return Chain("perron", perron)
    return Chain("katz", 1 + katz_limit(q, k, rho, "right", 1e-10)[0].flatten())


def expected_visits(q: Tensor, k: Tensor, rho: float, weights: Tensor) -> Floats:
    """Compute e `[N]` by the series of column Katz to a relative `SERIES`. Arguments as those of `simulate`."""
    limit, _ = katz_limit(q[None, None], k[None, None], rho, "left", SERIES)
    return (limit.flatten() * weights / weights.sum()).numpy()


def simulate(q: Tensor, k: Tensor, rho: float, weights: Tensor, walkers: int, random: np.random.Generator) -> Floats:
    """Visits per walker of the chain P, the start not counted, by Monte Carlo: `[BATCHES, N]`.

    Only rows where walkers stand are formed, 256 at a time.

    Args:
        q, k: of one head, float64 `[N, d]` on the CPU, not yet scaled.
        rho: discount in (0, 1).
        weights: h, float64 `[N]`, positive.
        walkers: how many, rounded up to whole batches. They start spread as evenly as h allows and are dealt to the
            batches at random, so errors taken from the batches are a little too large rather than too small.
        random: source of random numbers.

    Raises:
        ValueError: a row of P sums to 1 or more: with these weights it is no absorbing chain.
    """
    tokens, width = q.shape
    norm = math.sqrt(infsa_ops.affinity_squared_norm(q[None, None], k[None, None]).item())
    h = weights.numpy()
    queries = q.numpy() * (rho / (norm + EPSILON) / width) / h[:, None]
    keys = (k.numpy() * h[:, None]).T
    each = -(-walkers // BATCHES)
    ladder = (np.arange(each * BATCHES) + random.random()) / (each * BATCHES)
    at = np.minimum(np.searchsorted(np.cumsum(h) / h.sum(), ladder, side="right"), tokens - 1)
    batch = random.permutation(np.arange(each * BATCHES) % BATCHES)
    visits = np.zeros(BATCHES * tokens)
    while at.size:
        order = np.argsort(at, kind="stable")
        at, batch = _step(at[order], queries, keys, random), batch[order]
        alive = at < tokens
        at, batch = at[alive], batch[alive]
        visits += np.bincount(batch * tokens + at, minlength=visits.size)
    return visits.reshape(BATCHES, tokens) / each


def _step(at: NDArray[np.intp], queries: Floats, keys: Floats, random: np.random.Generator) -> NDArray[np.intp]:
    """Return the next tokens of walkers at tokens `at`, in ascending order; N means absorbed."""
    tokens = len(queries)
    stands, first = np.unique(at, return_index=True)
    ends = np.append(first, len(at))
    reached = np.empty_like(at)
    for low in range(0, len(stands), _ROWS):
        rows = stands[low : low + _ROWS]
        walkers = slice(ends[low], ends[low + len(rows)])
        ladder = np.cumsum(np.maximum(queries[rows] @ keys, 0), axis=1)
        if not ladder[:, -1].max() < 1:
            raise ValueError(f"a row sums to {ladder[:, -1].max()}, expected less than 1: no absorbing chain")
        # row r's ladder from r to r + 1: one search for the walkers of all rows
        row = np.searchsorted(rows, at[walkers])
        draws = row + random.random(len(row))
        rungs = (ladder + np.arange(len(rows))[:, None]).ravel()
        reached[walkers] = np.minimum(np.searchsorted(rungs, draws, side="right") - row * tokens, tokens)
    return reached


@dataclass(frozen=True)
class Deviation:
    """Deviation of simulated visits from expected ones.

    Attributes:
        visits, expected: visits of a walker to all tokens together, simulated and expected.
        total: their difference, in standard errors.
        weighed: the same of visits that each count e_m: are they where they are expected?
        distance: ‖v − e‖ divided by its root mean square under chance. Over the allowance is as rare as for one
            normal variable: no weighted sum of squares has heavier tails (Székely & Bakirov 2003).
        relative: ‖v − e‖ / ‖e‖; 0 where nothing is expected.
        chance: root mean square of `relative` expected by chance.
    """

    visits: float
    expected: float
    total: float
    weighed: float
    distance: float
    relative: float
    chance: float

    @property
    def errors(self) -> float:
        """The largest of the three, in standard errors; it is compared with `ALLOWANCE`."""
        return max(self.total, self.weighed, self.distance)

    def __bool__(self) -> bool:
        return all(error <= ALLOWANCE for error in (self.total, self.weighed, self.distance))  # false of NaN


def compare_visits(visits: Floats, expected: Floats, walkers: int) -> Deviation:
    """Compare visits `[BATCHES, N]` of `simulate` by `expected_visits` `[N]`.

    A variance is taken from the batches, but never below that of rare events, which batches may have missed, and one
    visit is always allowed for.
    """
    gap = visits.mean(0) - expected

    def error(sampled: Any, rare: Any, one: Any) -> float:
        return math.sqrt(max(float(sampled) / len(visits), float(rare) / walkers) + (float(one) / walkers) ** 2)

    total = error(visits.sum(1).var(ddof=1), expected.sum(), 1)
    weighed = error((visits @ expected).var(ddof=1), (expected**3).sum(), expected.max())
    distance = error(visits.var(0, ddof=1).sum(), expected.sum(), 1)
    length = float(np.linalg.norm(expected)) or math.inf
    return Deviation(
        visits=float(visits.mean(0).sum()),
        expected=float(expected.sum()),
        total=abs(float(gap.sum())) / total,
        weighed=abs(float(gap @ expected)) / weighed if expected.any() else 0.0,
        distance=float(np.linalg.norm(gap)) / distance,
        relative=float(np.linalg.norm(gap)) / length,
        chance=distance / length,
    )
