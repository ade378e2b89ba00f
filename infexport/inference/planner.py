"""Choice of an image's execution mode: whole, or streamed in chunks with its tokens in memory or on disk."""

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
"""Images of more tokens run faster in chunks, which stay in a CPU's cache."""


@dataclass(frozen=True)
class Image:
    """Size of an image, for estimates of its memory.

    Attributes:
        tokens: patches and the class token.
        width: in pixels, completed to whole patches.
        loaded: bytes of pixels that are in memory even when it is streamed.
    """

    tokens: int
    width: int
    loaded: int = 0


def usual_memory() -> int:
    """Return the bytes that a process may take by default: 80% of the memory that is free now."""
    return int(0.8 * available_memory())


def estimates(bundle: Bundle, options: InferenceOptions, image: Image, chunk: int = CHUNK) -> dict[ExecutionMode, int]:
    """Return the peak resident bytes of every mode that the bundle supports.

    Args:
        bundle: opened.
        options: of the run.
        image: one image; `options.batch_size` of them are run at once in the mode `whole`.
        chunk: tokens at a time, streamed.
    """
    manifest = bundle.manifest
    drawing = memory.drawing(manifest, options.drawing) + image.loaded if options.drawing else 0
    found: dict[ExecutionMode, int] = {
        "whole": memory.whole(manifest, bundle.weights, image.tokens, options.batch_size)
    }
    if manifest.stages is not None:
        for mode in ("memory", "disk"):
            found[mode] = image.loaded + memory.streamed(
                manifest, image.tokens, image.width, chunk, options.tokens, mode == "disk", options.centrality
            )
    return {mode: size + drawing for mode, size in found.items()}


def choose(
    bundle: Bundle,
    options: InferenceOptions,
    image: Image,
    room: int,
    chunk: int = CHUNK,
    execution: Execution | None = None,
) -> ExecutionMode:
    """Choose the mode in which an image is run.

    Args:
        bundle, options, image, chunk: see `estimates`.
        room: bytes that the process may take.
        execution: replaces that of the options.

    Raises:
        InfexportError: no mode fits, and names the smallest amount that would do; or the bundle has no stages.
    """
    found = estimates(bundle, options, image, chunk)
    execution = execution or options.execution
    if execution == "stream" and bundle.manifest.stages is None:
        raise no_stages()
    modes: list[ExecutionMode] = ["whole"]
    if execution != "whole" and bundle.manifest.stages is not None:
        modes = ["memory", "disk"] if options.scratch is None else ["disk"]
        if execution == "auto" and options.scratch is None:
            modes.insert(0 if image.tokens <= WHOLE_TOKENS + 1 else 1, "whole")
    for mode in modes:
        if found[mode] <= room:
            return mode
    least = min(found, key=lambda mode: found[mode])
    batch = options.batch_size
    how = {
        "whole": "--execution whole" + (f" with --batch-size {batch}" if batch > 1 else ""),
        "memory": "--execution stream",
        "disk": "--execution stream with tokens on disk",
    }
    images = f"a batch of {batch} images" if batch > 1 and modes == ["whole"] else "an image"
    raise InfexportError(
        f"{images} of {image.tokens:,} tokens does not fit into {size_text(room)}",
        "\n".join(f"{how[mode]} needs about {size_text(found[mode])}" for mode in modes),
        f"the smallest that would do: --memory {size_text(found[least], up=True)}"
        + ("" if least in modes else f" and {how[least]}")
        + ("; or a smaller --batch-size" if batch > 1 and "whole" in modes else ""),
    )


def no_stages() -> InfexportError:
    """Build the error of a bundle that cannot be streamed."""
    return InfexportError(
        "this bundle has no stages to stream through",
        "it was converted with --no-fold, or by an earlier infexport",
        "convert the checkpoint again",
    )


def size_text(size: int, up: bool = False) -> str:
    """Format bytes for people and in the syntax of `--memory`; `up` rounds up."""
    unit, name, step = next(each for each in _UNITS if size >= each[0] or each[0] == 1)
    number = size / unit * step
    return f"{(math.ceil(number) if up else round(number)) / step:.2f}".rstrip("0").rstrip(".") + name


_UNITS = ((2**30, "GiB", 100), (2**20, "MiB", 1), (2**10, "KiB", 1), (1, "B", 1))
"""Least size, name of its unit, and steps in one unit."""
