"""Checks of a graph's outputs against the manifest: a bundle may come from anybody."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infexport.errors import LastingError
from infexport.inference.centrality import CENTRALITY
from infvit.config import InfViTConfig


def check_answer(graph: str, found: Mapping[str, NDArray[Any]], config: InfViTConfig, images: int) -> None:
    """Refuse logits or features that do not fit the config; their readers rely on the shapes.

    Args:
        graph: name of the graph file, for the message.
        found: outputs by name.
        config: of the bundle.
        images: B, number of images; expected are float32 `logits [B, classes]` and `features [B, E]`.

    Raises:
        LastingError: an output is missing, or its shape or dtype is another.
    """
    _check_shape(graph, found, "logits", (images, config.num_classes))
    _check_shape(graph, found, "features", (images, config.embed_dim))


def check_centrality(graph: str, found: Mapping[str, NDArray[Any]], config: InfViTConfig, shape: Sequence[int]) -> None:
    """Refuse centrality that does not fit the config.

    Args:
        graph, found, config: see `check_answer`.
        shape: of the images, `[B, H, W, 3]`; expected is float32 `centrality [B, layers, heads, N]`.

    Raises:
        LastingError: the output is missing, or its shape or dtype is another.
    """
    expected = (shape[0], config.depth, config.num_heads, config.tokens(shape[1], shape[2]))
    _check_shape(graph, found, CENTRALITY, expected)


def _check_shape(graph: str, found: Mapping[str, NDArray[Any]], name: str, shape: tuple[int, ...]) -> None:
    value = found.get(name)
    if not isinstance(value, np.ndarray) or value.shape != shape or value.dtype != np.float32:
        received = f"{value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else "none"
        raise graph_mismatch(graph, f"{name}: {received}, expected float32 {list(shape)}")


def graph_mismatch(graph: str, received: str) -> LastingError:
    """Build the error of a graph that is not the one in the manifest."""
    return LastingError(
        f"{graph} is not the graph that the manifest describes", f"received {received}", "convert the checkpoint again"
    )
