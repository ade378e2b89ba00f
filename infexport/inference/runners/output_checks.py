"""Whether what a graph answers is what the manifest says: a bundle may come from anybody."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infexport.errors import LastingError
from infexport.inference.centrality import CENTRALITY
from infvit.config import InfViTConfig


def check_answer(graph: Path, found: Mapping[str, NDArray[Any]], config: InfViTConfig, images: int) -> None:
    """Refuse an answer that is not what the manifest's config says: whoever reads it takes it to be."""
    _check_shape(graph, found, "logits", (images, config.num_classes))
    _check_shape(graph, found, "features", (images, config.embed_dim))


def check_centrality(
    graph: Path, found: Mapping[str, NDArray[Any]], config: InfViTConfig, images: Sequence[int]
) -> None:
    tokens = images[1] * images[2] // config.patch_size**2 + 1
    _check_shape(graph, found, CENTRALITY, (images[0], config.depth, config.num_heads, tokens))


def _check_shape(graph: Path, found: Mapping[str, NDArray[Any]], name: str, shape: tuple[int, ...]) -> None:
    value = found.get(name)
    if not isinstance(value, np.ndarray) or value.shape != shape or value.dtype != np.float32:
        received = f"{value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else "none"
        raise graph_mismatch(graph.name, f"{name}: {received}, expected float32 {list(shape)}")


def graph_mismatch(graph: str, received: str) -> LastingError:
    return LastingError(
        f"{graph} is not the graph that the manifest describes", f"received {received}", "convert the checkpoint again"
    )
