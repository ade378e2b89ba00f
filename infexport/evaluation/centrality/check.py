"""Bundle and checkpoint → what its attention means: do scores rank tokens as the principal eigenvector does, and does a
walk over the tokens visit them as the absorbing chain says?"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import infsa_ops
from infexport.bundle import Bundle
from infexport.conversion.image_model import ImageModel
from infexport.errors import InfexportError
from infexport.evaluation.recorded_checkpoint import load_recorded
from infexport.evaluation.synthetic_images import synthetic_image
from infexport.images.decode import read_image
from infexport.images.preprocess import check_whole_patches, fit
from infexport.system.progress import (
    SILENT,
    ItemsDone,
    ProgressListener,
    Status,
)
from infvit.absorbing import ALLOWANCE, Deviation, Kind, compare_visits, expected_visits, make_chain, simulate
from infvit.centrality import linear_scores, principal, row_sums
from infvit.checkpoint import build_network
from infvit.config import InfViTConfig
from infvit.network import Layer

PAPER = 0.985
"""The cosine of scores with the principal eigenvector that arXiv 2603.00175 reports."""

RESIDUAL = 1e-8
MAX_STEPS = 2000

PAIRS_PER_SECOND = 1.5e6
"""Pairs of tokens a core sees through all of it: 2.0e6 at 4,097 tokens of head_dim 64, 1.3e6 at 16,385."""


@dataclass(frozen=True)
class HeadReport:
    """One head of one layer on one image: true where the iterations converged and the walk went as expected.

    Cosines are measurements, not part of the verdict; NaN where all scores are zero or there is no eigenvector.

    Attributes:
        layer, head: counted from 0.
        cosine_left, cosine_right: of the scores of Linear-InfSA with the left and right principal eigenvector of
            relu(q̂k̂ᵀ); in a pure model, of those that the linear approximation would give from its queries and keys.
        katz_cosine_left: of the column Katz limit with the left one.
        eigenvalue: λ of Â, its spectral radius.
        steps, residual: of the power iterations, the larger of both sides.
        row_sum: the largest of ρÂ; S is a chain as it stands where it is below 1.
        chain: how it is read as one, see `infvit.absorbing`.
        walk: how far simulated visits are from those expected.
    """

    layer: int
    head: int
    cosine_left: float
    cosine_right: float
    katz_cosine_left: float
    eigenvalue: float
    steps: int
    residual: float
    row_sum: float
    chain: Kind
    walk: Deviation

    def __bool__(self) -> bool:
        return self.residual <= RESIDUAL and bool(self.walk)

    def to_dict(self) -> dict[str, Any]:
        walk = dataclasses.asdict(self.walk) | {"errors": self.walk.errors, "passed": bool(self.walk)}
        return dataclasses.asdict(self) | {"walk": walk, "passed": bool(self)}


@dataclass(frozen=True)
class ImageReport:
    """All heads of all layers asked for, on one image of so many tokens."""

    name: str
    tokens: int
    heads: tuple[HeadReport, ...]


@dataclass(frozen=True)
class CentralityResult:
    """The verdict: true where there are heads, every one's is, and every image could be read.

    Attributes:
        bundle, checkpoint: what was looked at.
        variant, terms: of its attention, and T of a pure one; the chain is of T = ∞.
        walkers, seed: of the simulation.
        images: sizes, then files, in the order given.
        failed: images that could not be read, and why.
    """

    bundle: Path
    checkpoint: Path
    variant: str
    terms: int
    walkers: int
    seed: int
    images: tuple[ImageReport, ...]
    failed: tuple[tuple[Path, InfexportError], ...]

    @property
    def heads(self) -> list[HeadReport]:
        return [head for image in self.images for head in image.heads]

    def __bool__(self) -> bool:
        return bool(self.heads) and not self.failed and all(self.heads)

    def mean(self, cosine: str) -> float:
        """The mean of a cosine over heads and images, of those that have one."""
        values = np.array([getattr(head, cosine) for head in self.heads])
        return float(values[np.isfinite(values)].mean()) if np.isfinite(values).any() else float("nan")

    def chains(self) -> dict[Kind, int]:
        """Return kind of chain → number of heads."""
        return dict(Counter(head.chain for head in self.heads))

    def to_dict(self) -> dict[str, Any]:
        return {
            "bundle": str(self.bundle),
            "checkpoint": str(self.checkpoint),
            "passed": bool(self),
            "variant": self.variant,
            "neumann_terms": self.terms,
            "walkers": self.walkers,
            "seed": self.seed,
            "allowance": ALLOWANCE,
            "residual_tolerance": RESIDUAL,
            "paper_cosine": PAPER,
            "mean_cosine_left": self.mean("cosine_left"),
            "mean_cosine_right": self.mean("cosine_right"),
            "mean_katz_cosine_left": self.mean("katz_cosine_left"),
            "chains": self.chains(),
            "images": [
                {"name": image.name, "tokens": image.tokens, "heads": [head.to_dict() for head in image.heads]}
                for image in self.images
            ],
            "failed": [{"file": str(path), **error.to_dict()} for path, error in self.failed],
        }


def validate_centrality(
    bundle: Bundle,
    checkpoint_path: Path,
    sizes: Sequence[tuple[int, int]],
    images: Sequence[Path],
    layers: Sequence[int] | None = None,
    walkers: int = 100_000,
    seed: int = 0,
    listener: ProgressListener = SILENT,
) -> CentralityResult:
    """Look at the attention of every layer and head, in float64, on the CPU, with no N×N anywhere.

    Args:
        bundle: opened; its checkpoint's network is what is looked at.
        checkpoint_path: its checkpoint, or another of the same network.
        sizes: `(height, width)` of synthetic images, multiples of the patch.
        images: files, each at its own resolution, completed to whole patches. One that cannot be read is reported.
        layers: numbers from 0; None takes all.
        walkers: of every head.
        seed: of chance, the same for a layer and head of an input whichever other layers are looked at.
        listener: told of every head that is done, and beforehand of an image that takes minutes.

    Raises:
        InfexportError: a checkpoint that cannot be read, a size that is no multiple of the patch, a layer that there is
            not, or tokens that are not finite.
    """
    config = bundle.manifest.config
    layers = _checked_layers(layers, config.depth)
    for height, width in sizes:
        check_whole_patches(height, width, config.patch_size)
    checkpoint = load_recorded(checkpoint_path, bundle)
    preprocessing = bundle.manifest.preprocessing
    model = ImageModel(build_network(checkpoint).double(), preprocessing.mean, preprocessing.std).eval()
    found: list[ImageReport] = []
    failed: list[tuple[Path, InfexportError]] = []

    def look(name: str, pixels: NDArray[np.uint8]) -> None:
        _tell_of_long_work(name, config, len(layers), config.tokens(*pixels.shape[:2]), listener)
        reports = _look_at_heads(model, pixels, layers, walkers, [seed, len(found)], listener)
        found.append(ImageReport(name, config.tokens(*pixels.shape[:2]), reports))

    for height, width in sizes:
        look(f"{height}x{width}", synthetic_image(height, width))
    for path in images:
        try:
            pixels = fit(read_image(path), config.patch_size, "native", preprocessing.transform, "pad").pixels
        except InfexportError as error:
            failed.append((path, error))
            listener.on_event(ItemsDone(count_heads(bundle, layers)))
        else:
            look(str(path), pixels)
    return CentralityResult(
        bundle=bundle.path,
        checkpoint=checkpoint_path,
        variant=config.variant,
        terms=checkpoint.config.neumann_terms,
        walkers=walkers,
        seed=seed,
        images=tuple(found),
        failed=tuple(failed),
    )


def _checked_layers(layers: Sequence[int] | None, depth: int) -> list[int]:
    chosen = sorted(set(range(depth) if layers is None else layers))
    if chosen[-1] >= depth:
        raise InfexportError(f"there is no layer {chosen[-1]}", f"the network has {depth} layers, counted from 0")
    return chosen


def _tell_of_long_work(name: str, config: InfViTConfig, layers: int, tokens: int, listener: ProgressListener) -> None:
    heads = layers * config.num_heads
    minutes = tokens**2 * heads / PAIRS_PER_SECOND / 60
    if minutes > 1:
        message = f"{name}: {heads} heads of {tokens:,} tokens take about {minutes:,.0f} minutes of a core"
        listener.on_event(Status(message))


def _look_at_heads(
    model: ImageModel,
    pixels: NDArray[np.uint8],
    layers: Sequence[int],
    walkers: int,
    seeds: Sequence[int],
    listener: ProgressListener,
) -> tuple[HeadReport, ...]:
    """Check every head of these layers on an image; `seeds` are those of the image."""
    reports = []
    with torch.inference_mode():
        for layer, q, k, rho in _projections(model, pixels, layers):
            for head in range(len(q)):
                random = np.random.default_rng([*seeds, layer, head])
                try:
                    reports.append(_look_at(layer, head, q[head], k[head], float(rho[head]), walkers, random))
                except ValueError as error:
                    problem = f"no limit of the series in layer {layer}, head {head}"
                    raise InfexportError(problem, f"{error}; rho is {float(rho[head]):.17g}") from error
                listener.on_event(ItemsDone(1))
    return tuple(reports)


def count_heads(bundle: Bundle, layers: Sequence[int] | None) -> int:
    """Heads of an image that will be looked at."""
    config = bundle.manifest.config
    return config.num_heads * (config.depth if layers is None else len(set(layers)))


def _projections(
    model: ImageModel, pixels: NDArray[np.uint8], layers: Sequence[int]
) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """(layer, q, k, ρ) of the layers asked for; q and k `[H, N, d]`, ρ `[H]`, float64."""
    network = model.network
    tokens = network.embed(model.normalise(torch.from_numpy(pixels[None])))
    for number, layer in enumerate(network.encoder.layers):
        assert isinstance(layer, Layer)
        if number in layers:
            q, k, _ = layer.attn.project(layer.norm1(tokens))
            if not (q.isfinite().all() and k.isfinite().all()):
                raise InfexportError(
                    f"queries or keys of layer {number} are not finite", hint="check the weights: validate parity"
                )
            yield number, q[0], k[0], layer.attn.rho.expand(len(q[0]))
        if number == layers[-1]:
            return
        tokens = layer(tokens)


def _look_at(
    layer: int, head: int, q: Tensor, k: Tensor, rho: float, walkers: int, random: np.random.Generator
) -> HeadReport:
    one = q[None, None], k[None, None]
    left, right = (principal(*one, side, RESIDUAL, MAX_STEPS) for side in ("left", "right"))
    scores = linear_scores(*one)
    norm = infsa_ops.affinity_squared_norm(*one).sqrt().item() + infsa_ops.EPSILON
    chain = make_chain(q, k, rho, right.vector.flatten())
    expected = expected_visits(q, k, rho, chain.weights)
    visits = simulate(q, k, rho, chain.weights, walkers, random)
    # visits mapped back, each weighed by 1/h, are column Katz
    return HeadReport(
        layer=layer,
        head=head,
        cosine_left=_cosine(scores, left.vector),
        cosine_right=_cosine(scores, right.vector),
        katz_cosine_left=_cosine(torch.from_numpy(expected) / chain.weights, left.vector),
        eigenvalue=right.eigenvalue.item() / norm,
        steps=int(max(left.steps.item(), right.steps.item())),
        residual=float(np.max([left.residual.item(), right.residual.item()])),  # not a number if either is none
        row_sum=row_sums(*one, rho).max().item(),
        chain=chain.kind,
        walk=compare_visits(visits, expected, walkers),
    )


def _cosine(x: Tensor, y: Tensor) -> float:
    """NaN where one of them is all zero."""
    x, y = x.flatten(), y.flatten()
    return (x @ y / (torch.linalg.vector_norm(x) * torch.linalg.vector_norm(y))).item()
