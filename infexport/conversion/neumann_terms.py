"""Error of the Neumann series after T terms, measured."""

from __future__ import annotations

import math
from typing import Any

import torch

from infexport.errors import InfexportError
from infsa_ops.neumann_kernel import bounds
from infvit.network import Attention, InfViT


def measure_truncation(network: InfViT) -> dict[str, Any]:
    """Return both bounds on the rest of the series after T terms, the largest over layers and heads.

    Returns:
        `a_priori_bound`: ρ^(T+1)/(1−ρ), relative to ‖V‖_F, for any image. `a_posteriori_bound`:
        ρ/(1−ρ)·‖S_T‖_F / ‖V‖_F, rigorous for the image it is computed on, which is noise of the trained size.

    Raises:
        InfexportError: the network's values are not finite on that image.
    """
    terms = network.config.neumann_terms
    measured: list[float] = []

    def hook(attention: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        assert isinstance(attention, Attention)
        q, k, v = attention.project(args[0])
        assert attention.rho_logit is not None
        rho = torch.sigmoid(attention.rho_logit.double())
        bound = bounds.a_posteriori_bound(rho, bounds.series_term(q, k, v, rho, terms))
        measured.append(float((bound / torch.linalg.vector_norm(v.double(), dim=(-2, -1)).clamp_min(1e-300)).max()))

    handles = [attention.register_forward_pre_hook(hook) for attention in network.attentions]
    size = network.config.image_size
    noise = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    try:
        with torch.no_grad():
            network(noise)
    finally:
        for handle in handles:
            handle.remove()
    finite = [math.isfinite(bound) for bound in measured]
    if not all(finite):
        raise InfexportError(
            "the network's values are not finite on an image of noise",
            f"received such values in layer {finite.index(False)}, expected finite ones",
            "check the checkpoint: its weights may be too large for float32",
        )
    return {
        "a_priori_bound": bounds.a_priori_bound(network.largest_rho(), terms),
        "a_posteriori_bound": max(measured),
    }
