"""Which way an image is run: the whole graph, or in chunks with its tokens in memory or on disk."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from infexport.bundle import Bundle
from infexport.errors import InfexportError
from infexport.inference import memory
from infexport.inference.options import Execution, InferenceOptions
from infexport.inference.streaming import CHUNK
from infexport.system.host import available_memory

ExecutionMode = Literal["whole", "memory", "disk"]

WHOLE_TOKENS = 4096
"""With more, chunks are the faster way, too: they stay in a CPU's cache."""


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


def estimates(bundle: Bundle, options: InferenceOptions, image: Image, chunk: int = CHUNK) -> dict[ExecutionMode, int]:
    """Peak resident bytes of every way that the bundle has.

    Args:
        bundle: opened.
        options: of the run.
        image: one of `options.batch_size` that are run at once, where they are run whole.
        chunk: tokens at a time, streamed.
    """
    manifest = bundle.manifest
    drawing = memory.drawing(manifest, options.drawing) + image.loaded if options.drawing else 0
    found: dict[ExecutionMode, int] = {
        "whole": memory.whole(manifest, bundle.weights, image.tokens, options.batch_size)
    }
    if manifest.stages is not None:
        for way in ("memory", "disk"):
            found[way] = image.loaded + memory.streamed(
                manifest, image.tokens, image.width, chunk, options.tokens, way == "disk", options.centrality
            )
    return {way: size + drawing for way, size in found.items()}


def choose(
    bundle: Bundle,
    options: InferenceOptions,
    image: Image,
    room: int,
    chunk: int = CHUNK,
    execution: Execution | None = None,
) -> ExecutionMode:
    """Choose the way to run an image.

    Args:
        bundle, options, image, chunk: as of `estimates`.
        room: bytes that the process may take.
        execution: in the place of that of the options.

    Raises:
        InfexportError: none fits, with the smallest that would do; or the bundle has no stages.
    """
    found = estimates(bundle, options, image, chunk)
    execution = execution or options.execution
    if execution == "stream" and bundle.manifest.stages is None:
        raise no_stages()
    ways: list[ExecutionMode] = ["whole"]
    if execution != "whole" and bundle.manifest.stages is not None:
        ways = ["memory", "disk"] if options.scratch is None else ["disk"]
        if execution == "auto" and options.scratch is None:
            ways.insert(0 if image.tokens <= WHOLE_TOKENS + 1 else 1, "whole")
    for way in ways:
        if found[way] <= room:
            return way
    least = min(found, key=lambda way: found[way])
    batch = options.batch_size
    how = {
        "whole": "--execution whole" + (f" with --batch-size {batch}" if batch > 1 else ""),
        "memory": "--execution stream",
        "disk": "--execution stream with tokens on disk",
    }
    raise InfexportError(
        f"{f'a batch of {batch} images' if batch > 1 and ways == ['whole'] else 'an image'} of {image.tokens:,} tokens "
        f"does not fit into {size_text(room)}",
        "\n".join(f"{how[way]} needs about {size_text(found[way])}" for way in ways),
        f"the smallest that would do: --memory {size_text(found[least], up=True)}"
        + ("" if least in ways else f" and {how[least]}")
        + ("; or a smaller --batch-size" if batch > 1 and "whole" in ways else ""),
    )


def no_stages() -> InfexportError:
    """The error of a bundle that cannot be streamed."""
    return InfexportError(
        "this bundle has no stages to stream through",
        "it was converted with --no-fold, or by an earlier infexport",
        "convert the checkpoint again",
    )


def size_text(size: int, up: bool = False) -> str:
    """Write bytes as people do them, and as `--memory` reads them; `up` never says less than it is."""
    unit, name, step = next(each for each in _UNITS if size >= each[0] or each[0] == 1)
    number = size / unit * step
    return f"{(math.ceil(number) if up else round(number)) / step:.2f}".rstrip("0").rstrip(".") + name


_UNITS = ((2**30, "GiB", 100), (2**20, "MiB", 1), (2**10, "KiB", 1), (1, "B", 1))
"""Least size, its unit's name, and the steps in which one unit is told."""
