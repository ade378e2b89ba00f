"""The shapes an engine takes, and what of them no GPU can hold. Known before anything is built."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from infexport.bundle.engine_record import ShapeRange
from infexport.bundle.manifest import Manifest, Stage
from infexport.errors import InfexportError
from infexport.inference.centrality import CENTRALITY
from infexport.inference.planner import size_text
from infexport.inference.runners.tensorrt import STRIP_ROWS
from infexport.inference.streaming.driver import BY_TOKEN
from infexport.system.gpus import TARGETS, Target
from infvit.stage_scope import StageScope

Shapes = dict[str, ShapeRange]
"""Input → its shapes."""

INT32_MAX = 2**31 - 1
"""TensorRT counts the elements of a tensor in 32 bits."""
TILE = 256
"""Queries at a time in Pure InfSA's body, as of `infsa_ops.common`."""

Side = tuple[int, int]
T = TypeVar("T")


@dataclass(frozen=True)
class Profile:
    """Images that an engine takes: min, opt and max of sizes `(height, width)` in pixels and of batches."""

    sizes: tuple[Side, Side, Side]
    batches: tuple[int, int, int]

    def shapes(self, takes: str) -> Shapes:
        """Return the shapes of the whole graph's input, which takes `uint8` or `float32`."""
        pairs = zip(self.batches, self.sizes, strict=True)
        if takes == "uint8":
            return {"image": ShapeRange(*([batch, *size, 3] for batch, size in pairs))}
        return {"pixels": ShapeRange(*([batch, 3, *size] for batch, size in pairs))}


def make_profile(manifest: Manifest, sizes: list[Side] | None, batches: list[int] | None) -> Profile:
    """Make a profile of sizes and batches, or of their defaults.

    Args:
        manifest: of the bundle.
        sizes: one for all three, two for the first and the other two, or three. By default one patch, the trained size
            and 4 times that, at least 1024.
        batches: likewise; by default 1, 1 and 8.

    Raises:
        InfexportError: a size that is no whole number of patches, or an order that isn't min, opt, max.
    """
    size, patch = manifest.config.image_size, manifest.config.patch_size
    if sizes is None:
        largest = max(4 * size, -(-1024 // patch) * patch)
        sizes = [(patch, patch), (size, size), (largest, largest)]
    for height, width in sizes:
        if height % patch or width % patch:
            near = [(max(1, round(high / patch)) * patch, max(1, round(wide / patch)) * patch) for high, wide in sizes]
            raise InfexportError(
                f"{height}x{width} is not a whole number of patches",
                f"expected multiples of the model's patch, {patch}",
                f"for example --sizes {_listed(near)}",
            )
    low, best, high = _three(sizes, "--sizes")
    if any(not a <= b <= c for a, b, c in zip(low, best, high, strict=True)):
        ordered = list(zip(*(sorted(sides) for sides in zip(*sizes, strict=True)), strict=True))
        raise InfexportError(
            "--sizes are not in order",
            "received " + ", ".join(f"{height}x{width}" for height, width in sizes),
            f"expected the smallest, the best, the largest: --sizes {_listed(ordered)}",
        )
    low_batch, best_batch, high_batch = _three(batches or [1, 1, 8], "--batch")
    if not low_batch <= best_batch <= high_batch:
        ordered_batches = ",".join(map(str, sorted(batches or ())))
        hint = f"expected least, best, most: --batch {ordered_batches}"
        raise InfexportError("--batch is not in order", f"received {batches}", hint)
    return Profile((low, best, high), (low_batch, best_batch, high_batch))


def _three(values: Sequence[T], option: str) -> tuple[T, T, T]:
    if not 1 <= len(values) <= 3:
        raise InfexportError(f"{option} takes one to three values", f"received {len(values)}", "min, opt and max")
    return values[0], values[len(values) // 2], values[-1]


def _listed(sizes: Sequence[Side]) -> str:
    """Return sizes in the form that `--sizes` takes."""
    return ",".join(f"{height}x{width}" for height, width in sizes)


@dataclass(frozen=True)
class Tensor:
    """A tensor of a run: its name, and the shape it has for a batch of images of so many tokens."""

    name: str
    shape: Callable[[int, int], list[int]]

    def elements(self, batch: int, tokens: int) -> int:
        return math.prod(self.shape(batch, tokens))


def large_tensors(manifest: Manifest) -> list[Tensor]:
    """Return the large tensors of the whole graph."""
    config = manifest.config
    width, hidden, patch = config.embed_dim, config.mlp_dim, config.patch_size
    return [
        Tensor("the MLP's hidden layer", lambda batch, tokens: [batch, tokens, hidden]),
        Tensor("the tokens", lambda batch, tokens: [batch, tokens, width]),
        Tensor("the patches' pixels", lambda batch, tokens: [batch, tokens - 1, 3 * patch**2]),
    ]


def check_whole(manifest: Manifest, profile: Profile, target: Target, weights: int, memory: int | None = None) -> None:
    """Refuse a profile whose largest images TensorRT cannot count or the GPU cannot hold.

    Args:
        manifest: of the bundle.
        profile: of the whole graph.
        target: whose memory it must fit.
        weights: bytes.
        memory: bytes to fit instead of the target's.

    Raises:
        InfexportError: names the tensor, the largest square that fits at this batch, and options that are accepted.
    """
    patch, batch = manifest.config.patch_size, profile.batches[2]
    height, width = profile.sizes[2]
    tokens = (height // patch) * (width // patch) + 1
    tensors = large_tensors(manifest)
    room = memory or target.memory
    largest = max(tensors, key=lambda tensor: tensor.elements(batch, tokens))
    found = largest.elements(batch, tokens)
    needed = peak(manifest, weights, batch, tokens)
    if found > INT32_MAX:
        problem = (
            f"the largest tensor would have more elements than TensorRT counts: {found:,}, more than {INT32_MAX:,}"
        )
    elif room is not None and needed > room:
        problem = f"the largest images would need about {size_text(needed)} of the GPU's {size_text(room)}"
    else:
        return

    def fits(batch: int, tokens: int, room: int | None = room) -> bool:
        counted = max(tensor.elements(batch, tokens) for tensor in tensors) <= INT32_MAX
        return counted and (room is None or peak(manifest, weights, batch, tokens) <= room)

    sides = _largest(lambda count: fits(batch, count**2 + 1))
    side, most = patch * sides, _largest(lambda count: fits(count, tokens))
    best = f"the largest that fits at batch {batch} is {side}x{side}" if sides else "no size fits at this batch"
    remedies = []
    if sides:
        smaller = [(min(high, side), min(wide, side)) for high, wide in profile.sizes]
        remedies.append(f"smaller images: --sizes {_listed(smaller)}")
    if most:
        remedies.append(f"fewer at once: --batch {','.join(str(min(count, most)) for count in profile.batches)}")
    if chunk := _chunk(manifest, room, weights):
        remedies.append(f"engines that take images of any size: --execution stream --chunk {chunk}")
    least = f"with --sizes {patch}x{patch} --batch 1, "
    for options, count, seen in (("", batch, tokens), (least, 1, 2)):
        if not remedies and fits(count, seen, None):
            more = _room(peak(manifest, weights, count, seen), memory, target)
            remedies = [options + more] if more else []
    raise InfexportError(
        problem, f"at {height}x{width}, batch {batch}: {largest.name}, {largest.shape(batch, tokens)}\n{best}",
        "; or ".join(remedies or [NO_ROOM]),
    )  # fmt: skip


def _largest(fits: Callable[[int], bool]) -> int:
    """Return the largest number that fits, where all below it do; 0 where not even 1 does."""
    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _room(needed: int, memory: int | None, target: Target) -> str:
    """Return options that give an engine the memory it needs, in words; empty where none do."""
    if memory is not None and (target.memory is None or needed <= target.memory):
        return f"let it take more of the GPU: --memory {size_text(needed, up=True)}"
    larger = [each.name for each in TARGETS.values() if each.memory is not None and needed <= each.memory]
    less = "" if memory is None else " without --memory"
    return f"build for a GPU that has the room: --target {' or '.join(larger)}{less}" if larger else ""


NO_ROOM = "no GPU that is known here has the room"


def peak(manifest: Manifest, weights: int, batch: int, tokens: int) -> int:
    """Return the peak memory on the GPU in bytes, about: around the GELU, or with a tile of affinities, in float32."""
    config = manifest.config
    widest = 2 * config.mlp_dim
    if config.variant == "pure_infsa":  # a tile of queries of all heads: float32, its squares, and half precision
        widest = max(widest, 4 * TILE * config.num_heads)
    return weights + 4 * batch * tokens * (widest + 4 * config.embed_dim)


def check_stages(manifest: Manifest, chunk: int, target: Target, weights: int, memory: int | None = None) -> None:
    """Refuse a chunk whose tensors TensorRT cannot count or the GPU cannot hold, all stages being on it.

    Raises:
        InfexportError: names the tensor, and a chunk that fits; where none does, what has the room.
    """
    room = memory or target.memory
    if _fits_chunk(manifest, chunk, room, weights):
        return
    tensor, needed = _widest(manifest, chunk), _stages_peak(manifest, chunk, weights)
    least = _stages_peak(manifest, 1, weights)
    if best := _chunk(manifest, room, weights):
        remedy = f"a chunk that fits: --chunk {best}"
    else:
        more = _room(least, memory, target)
        remedy = f"with --chunk 1, {more}" if more else NO_ROOM
    raise InfexportError(
        f"--chunk {chunk} is too large for {target.name}",
        f"{tensor.name}, {tensor.shape(1, chunk)}, has {tensor.elements(1, chunk):,} elements, TensorRT counts "
        f"{INT32_MAX:,}; the stages would need about {size_text(needed)}"
        + ("" if room is None else f" of {size_text(room)}")
        + ("" if best else f", and {size_text(least)} with the smallest chunk"),
        remedy,
    )


def _chunk(manifest: Manifest, room: int | None, weights: int) -> int:
    """Return the largest chunk that fits; 0 where none does, or there are no stages."""
    return _largest(lambda chunk: _fits_chunk(manifest, chunk, room, weights)) if manifest.stages else 0


def _fits_chunk(manifest: Manifest, chunk: int, room: int | None, weights: int) -> bool:
    counted = _widest(manifest, chunk).elements(1, chunk) <= INT32_MAX
    return counted and (room is None or _stages_peak(manifest, chunk, weights) <= room)


def _widest(manifest: Manifest, chunk: int) -> Tensor:
    """Return the largest tensor of all stages."""
    pixels, block, width = STRIP_ROWS * chunk + 1, StageScope.PAIRS.max_rows(chunk), manifest.config.embed_dim
    tensors = [*large_tensors(manifest)[:2], Tensor("a block's queries", lambda b, n: [b, block, width])]
    strip = Tensor("a strip's pixels", lambda b, n: large_tensors(manifest)[2].shape(b, pixels))
    return max([*tensors, strip], key=lambda tensor: tensor.elements(1, chunk))


def _stages_peak(manifest: Manifest, chunk: int, weights: int) -> int:
    """Return bytes on the GPU with all stages on it."""
    stages = {stage.graph: stage for stage in manifest.stages or ()}
    return weights + sum(peak(manifest, 0, 1, stage.over.max_rows(chunk)) for stage in stages.values())


def stage_shapes(manifest: Manifest, stage: Stage, chunk: int) -> Shapes:
    """Return the shapes of a stage's inputs that differ from chunk to chunk; the others are always the same.

    Args:
        manifest: of the bundle.
        stage: one of its.
        chunk: tokens at a time, at most.
    """
    patch, width = manifest.config.patch_size, manifest.config.embed_dim
    shapes: Shapes = {}
    for name in stage.inputs:
        if name == "image":
            sides = [(patch * rows, patch * columns) for rows, columns in ((1, 1), (1, chunk), (STRIP_ROWS, chunk))]
            last = manifest.input == "uint8"
            shapes[name] = ShapeRange(*([1, *side, 3] if last else [1, 3, *side] for side in sides))
        elif name in BY_TOKEN and stage.over in (StageScope.TOKENS, StageScope.PAIRS):
            most = stage.over.max_rows(chunk)
            columns = manifest.config.num_heads if name == CENTRALITY else width
            shapes[name] = ShapeRange([1, 1, columns], [1, most, columns], [1, most, columns])
    return shapes
