"""Images of any size in bounded memory: chunks of tokens, swept through the stages of a bundle."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass

from infexport.bundle import Bundle
from infexport.centrality import Centrality
from infexport.stream.driver import (
    Array,
    Driver,
    Observer,
    Position,
    Progress,
    StageRunner,
    Tokens,
    layout_of,
    stages_of,
)
from infexport.stream.maps import Maps
from infexport.stream.scratch import Scratch
from infexport.stream.source import Source
from infexport.stream.stores import Stores

CHUNK = 1024
"""Tokens at a time: their hidden layer stays in a CPU's cache, and a matrix product loses nothing."""


@dataclass(frozen=True)
class Streamed:
    """What came of an image.

    Attributes:
        logits: `[classes]`.
        features: `[E]`.
        rounding: relative error of one rounding of the tokens to float16; 0 where they were kept in float32.
        centrality: of the tokens, where it was asked for.
    """

    logits: Array
    features: Array
    rounding: float
    centrality: Centrality | None = None


def stream(
    bundle: Bundle,
    runner: StageRunner,
    source: Source,
    scratch: Scratch | None = None,
    chunk: int = CHUNK,
    half: bool = False,
    progress: Progress = lambda stage, done, total: None,
    centrality: bool = False,
    observe: Observer = lambda stage, tokens, sums: None,
) -> Streamed:
    """Run one image, chunk by chunk.

    Args:
        bundle: one that has stages.
        runner: of its stages.
        source: the image.
        scratch: entered; tokens are kept in its folder, and the run goes on where it was interrupted. None keeps
            them in memory.
        chunk: tokens at a time.
        half: keep them in float16.
        progress: told of every chunk; stages are counted as `driver.stages_of` gives them.
        centrality: of the tokens, too: for Pure InfSA, as much work again as its attention.
        observe: as of `Driver`, where centrality is not asked for.

    Raises:
        InfexportError: no room for the tokens, a damaged image, or a stage that fails.
    """
    assert bundle.manifest.stages is not None, "the caller checks that there are stages"
    stages = stages_of(bundle.manifest.stages, centrality)
    config = bundle.manifest.config
    position = Position() if scratch is None or scratch.position is None else scratch.position
    stores = Stores(config, runner.precision, half, None if scratch is None else scratch.folder, position.squares)
    maps = Maps(stages, config, source.grid, None if scratch is None else scratch.folder) if centrality else None
    layout = layout_of(stages, range(source.tokens), chunk, scratch is not None, centrality)
    with closing(Tokens(layout, stores)) as tokens:
        record = None if scratch is None else scratch.record
        driver = Driver(stages, runner, source, tokens, chunk, progress, record, maps or observe)
        outputs = driver.run(position)
    found = None if maps is None else maps.result()
    return Streamed(outputs["logits"][0], outputs["features"][0], stores.relative_error, found)
