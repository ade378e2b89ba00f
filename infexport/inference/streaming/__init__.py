"""Images of any size in bounded memory: chunks of tokens pass through the stages of a bundle."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass

from infexport.bundle import Bundle, Stage
from infexport.images.strips import Source
from infexport.inference.centrality import Centrality
from infexport.inference.options import TokenDtype
from infexport.inference.streaming.centrality import Maps
from infexport.inference.streaming.checksums import Checksums
from infexport.inference.streaming.driver import (
    Array,
    Driver,
    Observer,
    Position,
    Progress,
    RunsStages,
    Tokens,
    make_layout,
    select_stages,
)
from infexport.inference.streaming.resume import Scratch
from infexport.inference.streaming.token_store import Stores, Unproven

CHUNK = 1024
"""Tokens of a chunk: their hidden layer fits a CPU's cache, and matrix products run at full speed."""


@dataclass(frozen=True)
class Streamed:
    """Result of a streamed image.

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
    runner: RunsStages,
    source: Source,
    scratch: Scratch | None = None,
    chunk: int = CHUNK,
    token_dtype: TokenDtype = "float32",
    progress: Progress = lambda stage, done, total: None,
    centrality: bool = False,
    observe: Observer = lambda stage, tokens, sums: None,
) -> Streamed:
    """Run one image, chunk by chunk.

    Args:
        bundle: one that has stages.
        runner: of its stages.
        source: the image.
        scratch: entered; tokens are kept in its folder, and the run goes on where it was interrupted, if what that
            left is proven to be what it wrote. None keeps them in memory.
        chunk: tokens at a time.
        token_dtype: dtype in which tokens are kept.
        progress: called after every chunk; stages are counted as `driver.select_stages` gives them.
        centrality: of the tokens, too: for Pure InfSA, as much work again as its attention.
        observe: see `Driver`; not called where centrality is asked for.

    Raises:
        InfexportError: no room for the tokens, a damaged image, or a stage that fails.
    """
    assert bundle.manifest.stages is not None, "the caller checks that there are stages"
    stages = select_stages(bundle.manifest.stages, centrality)
    config, folder = bundle.manifest.config, None if scratch is None else scratch.folder
    layout = make_layout(stages, range(source.tokens), chunk, scratch is not None, centrality)

    def opened(position: Position, left: bool) -> tuple[Tokens, Stores, Maps | None]:
        stores = Stores(config, runner.precision, token_dtype, folder, position.squares, left)
        maps = Maps(stages, config, source.grid, folder, position.checksums) if centrality else None
        checksums = None if folder is None else Checksums(source.tokens, chunk, position.checksums)
        tokens = Tokens(layout, stores, checksums)
        if left:
            _verify(tokens, maps, stages, position)
        return tokens, stores, maps

    position, parts = Position(), None
    if scratch is not None and scratch.position is not None:
        try:
            parts = opened(scratch.position, left=True)
            position = scratch.position
            scratch.go_on()
        except Unproven as fault:
            scratch.start_anew(str(fault))
    tokens, stores, maps = parts or opened(position, left=False)
    with closing(tokens):
        record = None if scratch is None else scratch.record
        driver = Driver(stages, runner, source, tokens, chunk, progress, record, maps or observe)
        outputs = driver.run(position)
    found = None if maps is None else maps.result()
    # copies: an output of ONNX Runtime keeps the memory of its session, a megabyte
    logits, features = (outputs[name][0].copy() for name in ("logits", "features"))
    return Streamed(logits, features, stores.relative_error, found)


def _verify(tokens: Tokens, maps: Maps | None, stages: Sequence[Stage], position: Position) -> None:
    """Verify the stores of an interrupted run by their checksums; close them if that fails.

    Raises:
        Unproven: they are not what that run wrote.
    """
    try:
        tokens.check(stages, position)
        if maps is not None:
            maps.take_up()
    except BaseException:
        tokens.close()
        raise
