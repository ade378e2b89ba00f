"""`infsa::linear_state_update`, registered with torch: kernel, shapes, derivatives."""

from __future__ import annotations

import torch
from torch import Tensor

from infsa_ops.common import no_autocast
from infsa_ops.derivatives import register_derivatives


def _check(weights: Tensor, values: Tensor, mass: Tensor, moment: Tensor) -> None:
    torch._check(weights.dim() == 3, lambda: f"weights has {weights.dim()} dimensions, expected [B, H, N]")
    torch._check(values.dim() == 4, lambda: f"values has {values.dim()} dimensions, expected [B, G, N, d]")
    batch, heads, tokens = weights.shape
    groups, width = values.shape[1], values.shape[3]
    divides = heads == groups or (groups > 0 and heads % groups == 0)
    torch._check(
        values.shape[0] == batch and values.shape[2] == tokens and divides,
        lambda: (
            f"values has shape {list(values.shape)}, expected [{batch}, G, {tokens}, d] with G a divisor of {heads}, "
            f"to match weights {list(weights.shape)}"
        ),
    )
    for name, tensor, shape in (("mass", mass, (batch, heads)), ("moment", moment, (batch, heads, width))):
        torch._check(
            len(tensor.shape) == len(shape) and all(a == b for a, b in zip(tensor.shape, shape, strict=True)),
            lambda name=name, tensor=tensor, shape=shape: (
                f"{name} has shape {list(tensor.shape)}, expected {list(shape)} to match weights and values"
            ),
        )
    for name, state in (("mass", mass), ("moment", moment)):
        torch._check(
            state.dtype in (torch.float32, torch.float64),
            lambda name=name, state=state: f"{name} is {state.dtype}, expected a float32 or float64 state",
        )
    torch._check(
        mass.dtype == moment.dtype, lambda: f"moment is {moment.dtype}, expected the dtype of mass, {mass.dtype}"
    )


def _update(weights: Tensor, values: Tensor, mass: Tensor, moment: Tensor) -> tuple[Tensor, Tensor]:
    """Return the new mass and moment, by operations that torch differentiates."""
    w = weights.to(mass.dtype)
    x = values.to(moment.dtype)
    groups = x.shape[1]
    if groups == w.shape[1]:
        # a sum, because a product with one row adds token after token: 1e-5 off at 332k tokens
        return mass + w.sum(-1), moment + (w[..., None] * x).sum(-2)
    with no_autocast(w):
        shared = torch.matmul(w.unflatten(1, (groups, -1)), x)
    return mass + w.sum(-1), moment + shared.flatten(1, 2)


@torch.library.custom_op("infsa::linear_state_update", mutates_args=())
def linear_state_update(weights: Tensor, values: Tensor, mass: Tensor, moment: Tensor) -> tuple[Tensor, Tensor]:
    """Add weighted tokens to a state: mass + Σ wₙ and moment + Σ wₙ xₙ (ONNX `infsa::LinearInfSAStateUpdate`).

    States form a monoid: they add in any order and grouping. Tokens may therefore come in chunks, from disk or from
    other machines. The result is moment / (mass + ε).

    Args:
        weights: w, `[B, H, N]`, any floating dtype.
        values: x, `[B, G, N, d]`, any floating dtype; G divides H, and H/G heads in a row share the values of a group.
        mass: `[B, H]`, float32 or float64 (in half precision the sums overflow).
        moment: `[B, H, d]`, dtype of `mass`.

    Returns:
        The new mass and moment, in their own dtype.

    Raises:
        RuntimeError: shapes that don't fit together, or a state that is neither float32 nor float64.
    """
    _check(weights, values, mass, moment)
    return _update(weights, values, mass, moment)


@linear_state_update.register_fake
def _(weights: Tensor, values: Tensor, mass: Tensor, moment: Tensor) -> tuple[Tensor, Tensor]:
    _check(weights, values, mass, moment)
    return torch.empty_like(mass), torch.empty_like(moment)


register_derivatives(linear_state_update, _update)
