"""Build an InfViTConfig from shapes and settings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from infvit.checkpoint.layout import Layout
from infvit.checkpoint.settings import Setting, integer, number
from infvit.checkpoint.supported import check_supported
from infvit.checkpoint.tensors import Named, shape_text
from infvit.config import InfViTConfig
from infvit.errors import CheckpointError

DEPLOYABLE = ("linear_infsa", "pure_infsa")
"""The variants a checkpoint can be deployed as; `softmax` is the network's twin for comparison only."""

_RHO_LOGIT = "encoder.layers.0.attn.rho_logit"


def resolve_config(
    tensors: Mapping[str, Named], settings: Mapping[str, Setting], layout: Layout
) -> tuple[InfViTConfig, dict[str, Any]]:
    """Build the config from canonical `tensors`, `settings`, and the `layout`'s epsilon of the norms.

    Returns:
        The config, and the settings among its own that were assumed.

    Raises:
        CheckpointError: a setting missing, unusable, or contradicting the shapes.
    """
    shapes = _read_shapes(tensors)
    check_supported(settings, bool(shapes["pooler"]), shapes)
    learned = _RHO_LOGIT in tensors
    if learned:
        shapes["rho_per_head"] = tensors[_RHO_LOGIT].tensor.dim() > 0
    _check_against(settings, shapes)
    assumed = {} if "norm_eps" in settings else {"norm_eps": layout.norm_eps}
    per_head = settings.get("rho_per_head")
    values = {
        "variant": _variant(settings),
        "num_heads": _num_heads(settings, shapes["embed_dim"]),
        "norm_eps": number(settings["norm_eps"]) if "norm_eps" in settings else layout.norm_eps,
        "neumann_terms": integer(settings["neumann_terms"]) if "neumann_terms" in settings else 1,
        "rho_per_head": not learned and per_head is not None and per_head.value is True,
        **shapes,
    }
    if values["variant"] == "linear_infsa" and values["neumann_terms"] != 1:
        raise CheckpointError(
            "linear_infsa has no Neumann series",
            f"received {settings['neumann_terms']}",
            "Leave the number of Neumann terms out, or give --variant pure_infsa.",
        )
    try:
        return InfViTConfig.from_dict(values), assumed
    except ValueError as error:
        raise CheckpointError("the checkpoint's shapes and settings make no InfViT", str(error)) from error


def _read_shapes(tensors: Mapping[str, Named]) -> dict[str, Any]:
    """Read the fields of InfViTConfig given by the tensors' shapes and names."""
    patch = _of_rank(tensors["patch_embed.weight"], 4, "[E, 3, P, P]")
    positions = _of_rank(tensors["pos_embed"], 3, "[1, 1 + g·g, E]")
    hidden = _of_rank(tensors["encoder.layers.0.ff.0.weight"], 2, "[MLP, E]")
    head = _of_rank(tensors["head.weight"], 2, "[classes, E]")
    grid = math.isqrt(max(positions[1] - 1, 0))
    if grid == 0 or 1 + grid * grid != positions[1]:
        raise CheckpointError(
            "the position embeddings are not of a class token and a square grid",
            f"tensor {tensors['pos_embed'].name!r}\nreceived: {positions[1]} positions\nexpected: 1 + g·g",
            "Non-square grids and models without a class token are not supported.",
        )
    return {
        "image_size": grid * patch[2],
        "patch_size": patch[2],
        "depth": sum(key.endswith(".norm1.weight") for key in tensors),
        "embed_dim": patch[0],
        "mlp_dim": hidden[0],
        "num_classes": head[0],
        "attention_dense": "encoder.layers.0.attn.dense.weight" in tensors,
        "pooler": "pooler.weight" in tensors,
        "qkv_bias": "encoder.layers.0.attn.q_proj.bias" in tensors,
    }


def _of_rank(named: Named, rank: int, expected: str) -> tuple[int, ...]:
    if named.tensor.dim() != rank or 0 in named.tensor.shape:
        raise CheckpointError(
            f"tensor {named.name!r} has a wrong shape",
            f"received: {shape_text(named.tensor)}\nexpected: {expected}",
        )
    return tuple(named.tensor.shape)


def _check_against(settings: Mapping[str, Setting], shapes: Mapping[str, Any]) -> None:
    """Fail on a setting that says something else than the shapes."""
    for name, actual in shapes.items():
        if name not in settings:
            continue
        stated = settings[name].value
        if name in ("image_size", "patch_size") and stated == [actual, actual]:
            continue
        if type(stated) is not type(actual) or stated != actual:
            raise CheckpointError(
                "a config and the weights contradict each other",
                f"{settings[name]}\n{name} by the tensors' shapes: {actual}",
                "Correct the config, or give the one that belongs to this checkpoint with --config.",
            )


def _variant(settings: Mapping[str, Setting]) -> str:
    setting = settings.get("variant")
    choice = f"--variant {DEPLOYABLE[0]} or --variant {DEPLOYABLE[1]}"
    if setting is None or setting.value == "softmax":
        details = "Neither its tensors nor a config say it." if setting is None else f"received {setting}"
        raise CheckpointError("the checkpoint does not say which InfSA attention it is for", details, f"Give {choice}.")
    if setting.value not in DEPLOYABLE:
        expected = f"expected: {' or '.join(DEPLOYABLE)}"
        raise CheckpointError("unknown variant", f"received {setting}\n{expected}", f"Give {choice}.")
    return str(setting.value)


def _num_heads(settings: Mapping[str, Setting], embed_dim: int) -> int:
    if "num_heads" not in settings:
        raise CheckpointError(
            "the checkpoint does not say how many attention heads it has",
            f"Shapes only tell the embedding of {embed_dim}; heads are often 64 wide.",
            "Give --num-heads, or --config with num_heads.",
        )
    heads = integer(settings["num_heads"])
    if embed_dim % heads:
        raise CheckpointError(
            "the number of heads does not divide the embedding",
            f"received {settings['num_heads']}\nexpected: a divisor of {embed_dim}",
            "Give --num-heads.",
        )
    return heads
