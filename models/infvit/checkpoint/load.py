"""Load a checkpoint file or folder: config, state dict, and other settings found with them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infvit.checkpoint.files import read_weights
from infvit.checkpoint.layout import choose_layout
from infvit.checkpoint.layouts import READERS
from infvit.checkpoint.preprocessing import read_preprocessing
from infvit.checkpoint.resolve import DEPLOYABLE, resolve_config
from infvit.checkpoint.settings import (
    Source,
    config_sources,
    merge_settings,
    number,
    read_labels,
)
from infvit.checkpoint.supported import SYNONYMS, WORDS, unread_words
from infvit.checkpoint.tensors import canonical_tensors, fill_discount, network_tensors
from infvit.config import InfViTConfig
from infvit.errors import CheckpointError
from infvit.network import InfViT

DEFAULT_RHO = 0.95
"""Discount with which the reference package starts training."""


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint.

    Attributes:
        config: configuration of the network.
        state_dict: of `InfViT(config)`: canonical names, float32, complete, finite.
        layout: the layout the file is in.
        finetuned: False for a softmax ViT's projections: no discount in the file, it was filled in.
        rho: the discount that was filled in; None where the checkpoint has its own.
        labels: class names, if a config has them.
        preprocessing: what a config says of it, of `mean`, `std`, `resize_mode`, `resize_size`, `crop_size`
            and `interpolation` (`infvit.checkpoint.preprocessing`).
        assumed: values that were neither found nor given.
        overridden: sentences, each naming a value that was used and a different one from a config.
        unread: words of the configs that are not used, with their sources.
        files: weight files read; what a config said is in `config`.
    """

    config: InfViTConfig
    state_dict: dict[str, Tensor]
    layout: str
    finetuned: bool
    rho: float | None
    labels: tuple[str, ...] | None
    preprocessing: dict[str, Any]
    assumed: dict[str, Any]
    overridden: tuple[str, ...]
    unread: tuple[str, ...]
    files: tuple[Path, ...]


def load_checkpoint(
    path: str | os.PathLike[str],
    *,
    variant: str | None = None,
    num_heads: int | None = None,
    layout: str = "auto",
    config_file: str | os.PathLike[str] | None = None,
    config: Mapping[str, Any] | None = None,
    labels: Sequence[Any] | Mapping[str, Any] | None = None,
    rho: float | None = None,
    norm_eps: float | None = None,
    neumann_terms: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Checkpoint:
    """Load a checkpoint from a file or a folder.

    Each setting comes from the first that has it: the argument, `config_file`, the config in the checkpoint,
    `config.json` beside it, the shapes or the layout's default.

    Args:
        path: `.pt`, `.pth`, `.bin`, `.safetensors`, or a folder in Hugging Face's form.
        variant: `linear_infsa` or `pure_infsa`.
        num_heads: attention heads of a layer.
        layout: one of `LAYOUTS`, or `auto`.
        config_file: JSON object with what the shapes don't tell, in our names or Hugging Face's.
        config: the same as values; then no file is looked at, neither `config_file` nor those beside the weights.
        labels: class names, one for every class, in any form that a config may have them in.
        rho: the discount, in (0, 1), for a checkpoint that has none of its own; 0.95 where nothing says.
        norm_eps: epsilon of every LayerNorm.
        neumann_terms: T of `pure_infsa`; 1, the reference package's, where nothing says.
        mean, std: of the pixels in [0, 1], per channel.

    Raises:
        CheckpointError: anything wrong with the files or the arguments.
    """
    if variant is not None and variant not in DEPLOYABLE:
        expected = " or ".join(DEPLOYABLE)
        raise CheckpointError(f"unknown variant {variant!r}", f"expected: {expected}", "See --variant.")
    given = {
        "variant": variant,
        "num_heads": num_heads,
        "layout": None if layout == "auto" else layout,
        "rho": rho,
        "norm_eps": norm_eps,
        "neumann_terms": neumann_terms,
        "labels": list(labels) if isinstance(labels, tuple) else labels,
    }
    weights = read_weights(Path(path))
    if config is not None:
        configs = [Source("the given config", config)]
    else:
        configs = config_sources(weights, None if config_file is None else Path(config_file))
    settings, overridden = merge_settings([Source("the options", given), *configs], WORDS, SYNONYMS)
    chosen_layout = settings["layout"].value if "layout" in settings else "auto"
    match = choose_layout(weights.tensors, READERS, chosen_layout)
    tensors = canonical_tensors(weights.tensors, match)
    resolved, assumed = resolve_config(tensors, settings, match.layout)

    finetuned = any(key.endswith(".rho_logit") for key in tensors)
    if finetuned and rho is not None:
        raise CheckpointError(
            "the checkpoint has its own learned discount",
            f"received rho: {rho}",
            "Leave --rho out to deploy it as trained.",
        )
    filled = None
    if not finetuned:
        filled = number(settings["rho"], below=1) if "rho" in settings else DEFAULT_RHO
        fill_discount(tensors, resolved, filled)
        if "rho" not in settings:
            assumed["rho"] = DEFAULT_RHO

    preprocessing, replaced = read_preprocessing([Source("the options", {"mean": mean, "std": std}), *configs])
    return Checkpoint(
        config=resolved,
        state_dict=network_tensors(tensors, resolved),
        layout=match.layout.name,
        finetuned=finetuned,
        rho=filled,
        labels=read_labels(settings.get("labels"), resolved.num_classes),
        preprocessing=preprocessing,
        assumed=assumed,
        overridden=(*overridden, *replaced),
        unread=unread_words(configs),
        files=weights.files,
    )


def build_network(checkpoint: Checkpoint) -> InfViT:
    """Build the network with the checkpoint's weights, in eval mode. It shares the tensors of `state_dict`."""
    with torch.device("meta"):  # no memory for initial values that are replaced at once
        network = InfViT(checkpoint.config)
    network.load_state_dict(checkpoint.state_dict, strict=True, assign=True)
    return network.eval()
