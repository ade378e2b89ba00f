"""The shapes an engine takes, and what of them no GPU can hold. Known before anything is built."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from infexport.centrality import CENTRALITY
from infexport.errors import InfexportError
from infexport.execution import size_text
from infexport.manifest import Manifest, Stage
from infexport.stream.driver import BY_TOKEN, PAIR_CHUNKS
from infexport.targets import Target

Shapes = dict[str, list[list[int]]]
"""Input → its minimum, best and maximum shape."""

INT32_MAX = 2**31 - 1
"""TensorRT counts the elements of a tensor in 32 bits."""
TILE = 256
"""Queries at a time in Pure InfSA's body, as of `infsa_ops.common`."""
STRIP_ROWS = 8
"""Rows of patches of a strip, at most: the image stage's memory is what rows and columns may be at once."""

Side = tuple[int, int]
T = TypeVar("T")


@dataclass(frozen=True)
class Profile:
    """The images an engine takes: three sizes `(height, width)` in pixels and three batches, the second fastest."""

    sizes: tuple[Side, Side, Side]
    batches: tuple[int, int, int]

    def shapes(self, takes: str) -> Shapes:
        """Of the whole graph's input, which takes `uint8` or `float32`."""
        pairs = zip(self.batches, self.sizes, strict=True)
        if takes == "uint8":
            return {"image": [[batch, *size, 3] for batch, size in pairs]}
        return {"pixels": [[batch, 3, *size] for batch, size in pairs]}


def profile_of(manifest: Manifest, sizes: list[Side] | None, batches: list[int] | None) -> Profile:
    """The profile that was asked for.

    Args:
        manifest: of the bundle.
        sizes: one for all three, two for the first and the other two, or three. By default one patch, the trained size
            and 4 times that, at least 1024.
        batches: likewise; by default 1, 1 and 8.

    Raises:
        InfexportError: a size that is no whole number of patches, or an order that isn't minimum, best, maximum.
    """
    size, patch = manifest.config["image_size"], manifest.config["patch_size"]
    if sizes is None:
        largest = max(4 * size, -(-1024 // patch) * patch)
        sizes = [(patch, patch), (size, size), (largest, largest)]
    for height, width in sizes:
        if height % patch or width % patch:
            near = "x".join(str(max(1, round(side / patch)) * patch) for side in (height, width))
            raise InfexportError(
                f"{height}x{width} is not a whole number of patches",
                f"expected multiples of the model's patch, {patch}",
                f"for example --sizes {near}",
            )
    low, best, high = _three(sizes, "--sizes")
    if any(not a <= b <= c for a, b, c in zip(low, best, high, strict=True)):
        raise InfexportError("--sizes are not in order", _text(sizes), "expected the smallest, the best, the largest")
    low_batch, best_batch, high_batch = _three(batches or [1, 1, 8], "--batch")
    if not low_batch <= best_batch <= high_batch:
        raise InfexportError("--batch is not in order", f"received {batches}", "expected least, best, most")
    return Profile((low, best, high), (low_batch, best_batch, high_batch))


def _three(values: Sequence[T], option: str) -> tuple[T, T, T]:
    if not 1 <= len(values) <= 3:
        raise InfexportError(
            f"{option} takes one to three values", f"received {len(values)}", "minimum, best and maximum"
        )
    return values[0], values[len(values) // 2], values[-1]


def _text(sizes: list[Side]) -> str:
    return "received " + ", ".join(f"{height}x{width}" for height, width in sizes)


@dataclass(frozen=True)
class Tensor:
    """A tensor of a run: its name, and the shape it has for a batch of images of so many tokens."""

    name: str
    shape: Callable[[int, int], list[int]]

    def elements(self, batch: int, tokens: int) -> int:
        return math.prod(self.shape(batch, tokens))


def tensors_of(manifest: Manifest) -> list[Tensor]:
    """The large tensors of the whole graph."""
    config = manifest.config
    width, hidden, patch = config["embed_dim"], config["mlp_dim"], config["patch_size"]
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
        InfexportError: names the tensor, and the largest square that fits at this batch.
    """
    patch, batch = manifest.config["patch_size"], profile.batches[2]
    height, width = profile.sizes[2]
    tokens = (height // patch) * (width // patch) + 1
    tensors = tensors_of(manifest)
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

    def fits(side: int) -> bool:
        count = (side // patch) ** 2 + 1
        counted = max(tensor.elements(batch, count) for tensor in tensors) <= INT32_MAX
        return counted and (room is None or peak(manifest, weights, batch, count) <= room)

    side = patch
    while fits(2 * side):
        side *= 2
    while fits(side + patch):
        side += patch
    best = f"the largest that fits at batch {batch} is {side}x{side}" if fits(patch) else "no size fits at this batch"
    shape = largest.shape(batch, tokens)
    raise InfexportError(
        problem,
        f"at {height}x{width}, batch {batch}: {largest.name}, {shape}\n{best}",
        "give smaller --sizes or --batch; or --execution stream, which builds engines that take images of any size",
    )


def peak(manifest: Manifest, weights: int, batch: int, tokens: int) -> int:
    """Bytes on the GPU at the worst moment, about: around the GELU, or with a tile of affinities, in float32."""
    config = manifest.config
    widest = 2 * config["mlp_dim"]
    if config["variant"] == "pure_infsa":  # a tile of queries of all heads: float32, its squares, and half precision
        widest = max(widest, 4 * TILE * config["num_heads"])
    return weights + 4 * batch * tokens * (widest + 4 * config["embed_dim"])


def check_stages(manifest: Manifest, chunk: int, target: Target, weights: int, memory: int | None = None) -> None:
    """Refuse a chunk whose tensors TensorRT cannot count or the GPU cannot hold, all stages being on it.

    Raises:
        InfexportError: names the tensor, and the largest chunk that fits.
    """
    config, room = manifest.config, memory or target.memory
    stages = {stage.graph: stage for stage in manifest.stages or ()}

    def largest(chunk: int) -> Tensor:
        pixels, block = STRIP_ROWS * chunk + 1, PAIR_CHUNKS * chunk
        tensors = [*tensors_of(manifest)[:2], Tensor("a block's queries", lambda b, n: [b, block, config["embed_dim"]])]
        strip = Tensor("a strip's pixels", lambda b, n: tensors_of(manifest)[2].shape(b, pixels))
        return max([*tensors, strip], key=lambda tensor: tensor.elements(1, chunk))

    def needed(chunk: int) -> int:
        rows = {"nothing": 1, "class_token": 1, "pairs": PAIR_CHUNKS * chunk}
        return weights + sum(peak(manifest, 0, 1, rows.get(stage.over, chunk)) for stage in stages.values())

    def fits(chunk: int) -> bool:
        return largest(chunk).elements(1, chunk) <= INT32_MAX and (room is None or needed(chunk) <= room)

    if fits(chunk):
        return
    best = 1
    while fits(2 * best):
        best *= 2
    tensor = largest(chunk)
    raise InfexportError(
        f"--chunk {chunk} is too large for {target.name}",
        f"{tensor.name}, {tensor.shape(1, chunk)}, has {tensor.elements(1, chunk):,} elements, TensorRT counts "
        f"{INT32_MAX:,}; the stages would need about {size_text(needed(chunk))}"
        + ("" if room is None else f" of {size_text(room)}"),
        f"a chunk that fits: --chunk {best}",
    )


def stage_shapes(manifest: Manifest, stage: Stage, chunk: int) -> Shapes:
    """Of the inputs of a stage that differ from chunk to chunk; the others are always the same.

    Args:
        manifest: of the bundle.
        stage: one of its.
        chunk: tokens at a time, at most.
    """
    patch, width = manifest.config["patch_size"], manifest.config["embed_dim"]
    shapes: Shapes = {}
    for name in stage.inputs:
        if name == "image":
            sides = [(patch * rows, patch * columns) for rows, columns in ((1, 1), (1, chunk), (STRIP_ROWS, chunk))]
            last = manifest.input == "uint8"
            shapes[name] = [[1, *side, 3] if last else [1, 3, *side] for side in sides]
        elif name in BY_TOKEN and stage.over in ("tokens", "pairs"):
            most = chunk * (PAIR_CHUNKS if stage.over == "pairs" else 1)
            columns = manifest.config["num_heads"] if name == CENTRALITY else width
            shapes[name] = [[1, 1, columns], [1, most, columns], [1, most, columns]]
    return shapes
