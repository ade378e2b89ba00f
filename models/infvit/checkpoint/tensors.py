"""Convert a layout's tensors to the network's: rename, split, check, cast to float32."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from infvit.checkpoint.layout import Match
from infvit.config import InfViTConfig
from infvit.errors import CheckpointError
from infvit.network import InfViT

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
MOST_SHARED = 4
"""Maximum ratio of the bytes of all tensors to the bytes of their storages."""
FUSED = ".attn.qkv."


@dataclass(frozen=True)
class Named:
    """A tensor and the name its file gives it, for errors."""

    tensor: Tensor
    name: str


def canonical_tensors(tensors: Mapping[str, Tensor], match: Match) -> dict[str, Named]:
    """Tensors under canonical names, fused projections split: rows 0…E-1 are queries, then keys, then values.

    Raises:
        CheckpointError: a tensor that holds no ordinary floats, or a fused one whose rows don't divide by 3; or tensors
            that have far more numbers than the file.
    """
    _check_storage([tensors[name] for name in match.renamed])
    named: dict[str, Named] = {}
    for name, canonical in match.renamed.items():
        tensor = tensors[name].detach()
        _check_kind(tensor, name)
        if FUSED not in canonical:
            # A scalar kept as [1] is a scalar.
            scalar = canonical.endswith(".rho_logit") and tensor.numel() == 1
            named[canonical] = Named(tensor.reshape(()) if scalar else tensor, name)
            continue
        if tensor.dim() == 0 or tensor.shape[0] % 3:
            raise CheckpointError(
                f"tensor {name!r} is no query-key-value projection",
                f"received: {shape_text(tensor)}\nexpected: a first dimension of 3 times the embedding",
            )
        for part, rows in zip("qkv", tensor.chunk(3), strict=True):
            named[canonical.replace(FUSED, f".attn.{part}_proj.")] = Named(rows, name)
    return named


def fill_discount(tensors: dict[str, Named], config: InfViTConfig, rho: float) -> None:
    """Give every layer the discount `rho` = sigmoid(rho_logit); rho_logit is a scalar or `[heads]`."""
    shape = (config.num_heads,) if config.rho_per_head else ()
    logit = torch.logit(torch.tensor(rho, dtype=torch.float64)).to(torch.float32)
    for layer in range(config.depth):
        name = f"encoder.layers.{layer}.attn.rho_logit"
        tensors[name] = Named(logit.expand(shape).clone(), name)


def network_tensors(tensors: Mapping[str, Named], config: InfViTConfig) -> dict[str, Tensor]:
    """The state dict of `InfViT(config)`, in its order, float32 and contiguous.

    Raises:
        CheckpointError: a shape other than the network's, or a value that is NaN or infinite in float32.
    """
    with torch.device("meta"):
        expected = InfViT(config).state_dict()
    for key, like in expected.items():
        if tensors[key].tensor.shape != like.shape:
            raise CheckpointError(
                f"tensor {tensors[key].name!r} does not fit the rest of the checkpoint",
                f"received: {shape_text(tensors[key].tensor)}\nexpected: {shape_text(like)} ({key})",
            )
    return {key: _as_float32(tensors[key]) for key in expected}


def shape_text(tensor: Tensor) -> str:
    return f"[{', '.join(str(size) for size in tensor.shape)}]"


def _check_storage(tensors: Sequence[Tensor]) -> None:
    """Refuse expanded views: tied weights may share a storage, but no storage may be repeated many times."""
    plain = [tensor for tensor in tensors if _is_ordinary(tensor)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in plain}
    used = sum(tensor.numel() * tensor.element_size() for tensor in plain)
    if used > MOST_SHARED * sum(storages.values()):
        raise CheckpointError(
            "the tensors have far more numbers than the file",
            f"received: {used:,} bytes of tensors in {sum(storages.values()):,} bytes of storages",
            "Save it again with tensors of their own: torch.save({k: v.clone() for k, v in state_dict.items()}, ...).",
        )


def _is_ordinary(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_nested


def _check_kind(tensor: Tensor, name: str) -> None:
    ordinary = _is_ordinary(tensor)
    if not ordinary or tensor.dtype not in FLOATS:
        kind = "" if ordinary else f", {tensor.layout} on {tensor.device}"
        raise CheckpointError(
            f"tensor {name!r} does not hold ordinary floats",
            f"received: {tensor.dtype}{kind}\nexpected: {', '.join(str(dtype) for dtype in FLOATS)}",
            "Save the checkpoint unquantised.",
        )


def _as_float32(named: Named) -> Tensor:
    tensor = named.tensor.to(torch.float32).contiguous()
    if not torch.isfinite(tensor).all():
        raise CheckpointError(
            f"tensor {named.name!r} has values that are NaN or infinite",
            f"received: {int((~torch.isfinite(tensor)).sum())} such values of {tensor.numel()}, in float32",
            "Training may have diverged: use an earlier checkpoint.",
        )
    return tensor
