"""Which way an image is run: the whole graph, or in chunks with its tokens in memory or on disk."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from infexport import memory
from infexport.bundle import Bundle
from infexport.errors import InfexportError
from infexport.machine import available_memory
from infexport.stream import CHUNK

Execution = Literal["auto", "whole", "stream"]
Way = Literal["whole", "memory", "disk"]

WHOLE_TOKENS = 4096
"""With more, chunks are the faster way, too: they stay in a CPU's cache."""


@dataclass(frozen=True)
class Policy:
    """What the user said.

    Attributes:
        execution: `auto` takes the fastest way that fits.
        memory: bytes the process may take; None for `usual_memory`.
        scratch: folder for tokens; None keeps them in memory where they fit.
        chunk: tokens at a time; None for what suits what runs them.
        half: keep tokens in float16.
        batch: images at once, where they are run whole.
        centrality: of tokens is asked for.
    """

    execution: Execution
    memory: int | None
    scratch: Path | None
    chunk: int | None
    half: bool
    batch: int = 1
    centrality: bool = False


@dataclass(frozen=True)
class Image:
    """What an image costs before it is run.

    Attributes:
        tokens: patches and the class token.
        width: in pixels, completed.
        loaded: bytes of pixels that are in memory even when it is streamed.
    """

    tokens: int
    width: int
    loaded: int = 0


def usual_memory() -> int:
    """Bytes that a process may take where the user does not say: 80% of what is free now."""
    return int(0.8 * available_memory())


def estimates(bundle: Bundle, policy: Policy, image: Image) -> dict[Way, int]:
    """Peak resident bytes of every way that the bundle has."""
    manifest = bundle.manifest
    found: dict[Way, int] = {"whole": memory.whole(manifest, bundle.weights, image.tokens, policy.batch)}
    if manifest.stages is not None:
        for way in ("memory", "disk"):
            found[way] = image.loaded + memory.streamed(
                manifest,
                image.tokens,
                image.width,
                policy.chunk or CHUNK,
                policy.half,
                way == "disk",
                policy.centrality,
            )
    return found


def choose(bundle: Bundle, policy: Policy, image: Image) -> Way:
    """The way to run an image.

    Raises:
        InfexportError: none fits, with the smallest that would do; or the bundle has no stages.
    """
    found = estimates(bundle, policy, image)
    room = usual_memory() if policy.memory is None else policy.memory
    if policy.execution == "stream" and bundle.manifest.stages is None:
        raise no_stages()
    ways: list[Way] = ["whole"]
    if policy.execution != "whole" and bundle.manifest.stages is not None:
        ways = ["memory", "disk"] if policy.scratch is None else ["disk"]
        if policy.execution == "auto" and policy.scratch is None:
            ways.insert(0 if image.tokens <= WHOLE_TOKENS + 1 else 1, "whole")
    for way in ways:
        if found[way] <= room:
            return way
    least = min(found, key=lambda way: found[way])
    how = {
        "whole": "--execution whole",
        "memory": "--execution stream",
        "disk": "--execution stream with tokens on disk",
    }
    raise InfexportError(
        f"an image of {image.tokens:,} tokens does not fit into {size_text(room)}",
        "\n".join(f"{how[way]} needs about {size_text(found[way])}" for way in ways),
        f"the smallest that would do: --memory {size_text(found[least], up=True)}"
        + ("" if least in ways else f" and {how[least]}"),
    )


def no_stages() -> InfexportError:
    """The error of a bundle that cannot be streamed."""
    return InfexportError(
        "this bundle has no stages to stream through",
        "it was converted with --no-fold, or by an earlier infexport",
        "convert the checkpoint again",
    )


def size_text(size: int, up: bool = False) -> str:
    """Bytes as people write them, and as `--memory` reads them; `up` never says less than it is."""
    unit, name, step = (2**30, "GiB", 100) if size >= 2**30 else (2**20, "MiB", 1)
    number = size / unit * step
    return f"{(math.ceil(number) if up else round(number)) / step:.2f}".rstrip("0").rstrip(".") + name
