"""Pass chunks of tokens through the stages of a bundle, and add up their sums.

Independent of the runner of a stage, the store of the tokens and the reader of the image.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from infexport.bundle.manifest import Stage
from infexport.errors import LastingError
from infexport.images.strips import Source
from infexport.inference.centrality import CENTRALITY
from infexport.inference.streaming.checksums import Checksums, Tables
from infexport.inference.streaming.token_store import Ring, Rows, Store
from infvit.stage_scope import StageScope

Array = NDArray[Any]
Sums = dict[str, NDArray[np.float64]]

BY_TOKEN = ("tokens", "q", "k", "v", "mixed", CENTRALITY)
"""Values that are kept with one row per token; all other values that stages exchange are sums."""
RECORD_CHUNKS, RECORD_SECONDS = 16, 5.0
"""A run that can be resumed is recorded after so many chunks or seconds; the ring of tokens allows the chunks."""


class RunsStages(Protocol):
    """Interface of a runner of stages, as far as streaming uses it.

    Attributes:
        precision: of the layers that meet every token.
        max_rows: rows of patches in a strip of the image, at most; None for any.
    """

    precision: str
    max_rows: int | None

    def run(self, stage: Stage, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """The stage's outputs by name."""
        ...


@dataclass
class Position:
    """Progress of a run, from which it can resume.

    Attributes:
        stage: index of the stage.
        done: rows (strips: patches) of it that are done.
        sums: what the stages before gave, float64.
        added: what this stage has given so far, float64.
        squares: of every store that rounds, see `token_store.HalfStore.squares`.
        checksums: of all that a resumed run reads, see `checksums.Checksums` and `centrality.Maps`.
    """

    stage: int = 0
    done: int = 0
    sums: Sums = field(default_factory=dict)
    added: Sums = field(default_factory=dict)
    squares: Sums = field(default_factory=dict)
    checksums: Tables = field(default_factory=dict)


class Progress(Protocol):
    def __call__(self, stage: int, done: int, total: int) -> None:
        """Report that `done` of a stage's `total` rows are done."""
        ...


@dataclass(frozen=True)
class Layout:
    """Which rows are kept, and how often they are written.

    Attributes:
        rows: of the image's tokens, the class token first: all, or those of a shard.
        spare: name → spare rows of its `Ring`.
        generations: for every stage, name → by how many stages before it the rows were written.
    """

    rows: range
    spare: dict[str, int]
    generations: list[dict[str, int]]


def select_stages(stages: Sequence[Stage], centrality: bool) -> list[Stage]:
    """Return the stages that are run, with or without centrality."""
    return [stage for stage in stages if centrality or not stage.optional]


def make_layout(stages: Sequence[Stage], rows: range, chunk: int, resumable: bool, centrality: bool = False) -> Layout:
    """Return which rows of the tokens `rows` have to be kept."""
    spare: dict[str, int] = {}
    generations: list[dict[str, int]] = []
    written: dict[str, int] = {}
    for stage in stages:
        generations.append(dict(written))
        for name in stage.outputs:
            if name not in BY_TOKEN or (name == CENTRALITY and not centrality):
                continue
            needed = 0
            if name in stage.inputs:
                # pairs read all rows until the last is written
                needed = len(rows) if stage.over.is_pairwise else min(len(rows), RECORD_CHUNKS * chunk * resumable)
            spare[name] = max(spare.get(name, 0), needed)
            # the class token and the image are written as one
            written[name] = written.get(name, 0) + (stage.over is not StageScope.ONCE)
    return Layout(rows, spare, generations)


class Tokens:
    """The kept rows of a run.

    Args:
        layout: of the run.
        make: name and number of rows → a store for them.
        checksums: of the rows, where the run can be resumed.
    """

    def __init__(self, layout: Layout, make: Callable[[str, int], Store], checksums: Checksums | None = None) -> None:
        self.layout, self._checksums = layout, checksums
        self._rings: dict[str, Ring] = {}
        try:
            for name, spare in layout.spare.items():
                self._rings[name] = Ring(make(name, len(layout.rows) + spare), len(layout.rows), spare)
        except BaseException:
            self.close()  # the first ones fitted
            raise

    def read(self, stage: int, name: str, start: int, stop: int) -> Array:
        """Rows `[1, stop − start, E]` as they were before the stage; counted as in the image."""
        first, generation = self.layout.rows.start, self.layout.generations[stage][name] - 1
        return self._rings[name].read(start - first, stop - first, generation)[None]

    def write(self, stage: int, name: str, start: int, values: Rows) -> None:
        if name not in self._rings:
            return
        generation = self.layout.generations[stage].get(name, 0)
        for kept in self._rings[name].write(start - self.layout.rows.start, values, generation):
            if self._checksums is not None:
                self._checksums.add(name, generation, start, kept)
            start += len(kept)

    def check(self, stages: Sequence[Stage], position: Position) -> None:
        """Prove that what a run reads after a position is what it wrote before.

        Raises:
            Unproven: some of it is not.
        """
        assert self._checksums is not None, "only a run with checksums is recorded"
        for name, ring in self._rings.items():
            generation = self.layout.generations[position.stage].get(name, 0)
            start, stop = still_read(stages, name, position, len(self.layout.rows))
            # what the stage itself has written so far, and what the last one before it did
            for rows in ((generation, 0, self._checksums.written(name, generation)), (generation - 1, start, stop)):
                if rows[1] < rows[2]:
                    self._checksums.check(name, *rows, partial(ring.kept, generation=rows[0]))

    def close(self) -> None:
        for ring in self._rings.values():
            ring.store.close()


class Observer(Protocol):
    def __call__(self, stage: int, tokens: Tokens, sums: Mapping[str, Array]) -> None:
        """A stage is done: `tokens` can be read as they are before the stage after it, and `sums` are its own."""
        ...


class Driver:
    """Runs the stages over the rows that are kept: of one image, or of a shard of it (`stream.shards`).

    Args:
        stages: of the bundle, in order.
        runner: runs them.
        source: the image.
        tokens: where rows are kept.
        chunk: tokens at a time.
        progress: told of every chunk.
        record: given the position, often enough; None where the run cannot be resumed.
        observe: told of every stage but the last.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        runner: RunsStages,
        source: Source,
        tokens: Tokens,
        chunk: int,
        progress: Progress = lambda stage, done, total: None,
        record: Callable[[Position], None] | None = None,
        observe: Observer = lambda stage, tokens, sums: None,
    ) -> None:
        self.stages, self.runner, self.source, self.tokens = stages, runner, source, tokens
        self.chunk, self.progress, self.record, self.observe = chunk, progress, record, observe
        self.rows = tokens.layout.rows

    def run(self, position: Position | None = None) -> dict[str, Array]:
        """The outputs of the last stage, `logits [1, classes]` and `features [1, E]`.

        Args:
            position: as recorded, to go on from; None for the beginning.
        """
        position = position or Position()
        outputs: dict[str, Array] = {}
        recorded, chunks = time.monotonic(), 0
        for index in range(position.stage, len(self.stages)):
            stage = self.stages[index]
            stop = self.rows.stop
            total = 1 if stage.over.runs_once else stop - (stage.over is StageScope.IMAGE)
            for done, outputs in self.units(index, position):  # noqa: B007  (the last are the result)
                position.done = done
                self.progress(index, done, total)
                chunks += 1
                late = chunks == RECORD_CHUNKS or time.monotonic() - recorded > RECORD_SECONDS
                if self.record is not None and late and done < total:
                    self.record(position)
                    recorded, chunks = time.monotonic(), 0
            if index + 1 < len(self.stages):
                self.observe(index, self.tokens, position.added)
            # the image goes on with the sums that the class token began
            begun = position.added if stage.over is StageScope.ONCE else {}
            position = Position(
                index + 1, 0, position.sums | position.added, begun, position.squares, position.checksums
            )
            if self.record is not None and index + 1 < len(self.stages):
                self.record(position)
                recorded, chunks = time.monotonic(), 0
        return outputs

    def units(self, index: int, position: Position) -> Iterator[tuple[int, dict[str, Array]]]:
        """Run a stage from where the position is, unit by unit: rows that are done, and the unit's outputs."""
        stage, begin = self.stages[index], max(position.done, self.rows.start)
        sums = told(stage, position.sums)
        if stage.over.runs_once:
            feeds = {name: self.tokens.read(index, name, 0, 1) for name in stage.inputs if name in BY_TOKEN}
            yield 1, self._finish(index, position, 0, self.runner.run(stage, feeds | sums))
        elif stage.over is StageScope.IMAGE:
            patches = range(max(position.done, self.rows.start - 1), self.rows.stop - 1)
            for done, strip in self.source.strips(patches, self.chunk, self.runner.max_rows):
                values = self.runner.run(stage, strip)
                if values["tokens"].ndim != 3:
                    raise _graph_mismatch(stage, "tokens", values["tokens"])
                yield done, self._finish(index, position, 1 + done - values["tokens"].shape[1], values)
        elif stage.over is StageScope.TOKENS:
            if "query" in stage.inputs and "query" not in sums:
                sums["query"] = self.tokens.read(index, "q", 0, 1).copy()
            for start, stop in ranges(begin, self.rows.stop, self.chunk):
                feeds = {name: self.tokens.read(index, name, start, stop) for name in stage.inputs if name in BY_TOKEN}
                yield stop, self._finish(index, position, start, self.runner.run(stage, feeds | sums))
        else:
            for start, stop in ranges(begin, self.rows.stop, stage.over.max_rows(self.chunk)):
                yield stop, self._finish(index, position, start, self._pairs(index, start, stop, sums))

    def _pairs(self, index: int, start: int, stop: int, sums: Mapping[str, Array]) -> dict[str, Array]:
        """A block of queries with all keys, or of keys with all queries: what the stage takes first."""
        stage = self.stages[index]
        outer = stage.inputs[0]
        block = self.tokens.read(index, outer, start, stop).copy()
        total: dict[str, Array] = {}
        for first, last in ranges(self.rows.start, self.rows.stop, stage.over.max_rows(self.chunk)):
            others = {
                name: self.tokens.read(index, name, first, last)
                for name in stage.inputs
                if name in BY_TOKEN and name != outer
            }
            for name, value in self.runner.run(stage, {outer: block} | others | dict(sums)).items():
                exact = value if name in BY_TOKEN else value.astype(np.float64)
                total[name] = total[name] + exact if name in total else exact
        return total

    def _finish(self, index: int, position: Position, start: int, outputs: dict[str, Array]) -> dict[str, Array]:
        stage = self.stages[index]
        for name, value in outputs.items():
            if name in BY_TOKEN:
                if value.ndim != 3 or len(value) != 1 or start < 0 or start + value.shape[1] > self.rows.stop:
                    raise _graph_mismatch(stage, name, value)
                self.tokens.write(index, name, start, value[0])
            elif stage.over is not StageScope.CLASS_TOKEN:
                before = position.added.get(name)
                if before is not None and before.shape != value.shape:
                    raise _graph_mismatch(stage, name, value)
                exact = value.astype(np.float64)
                position.added[name] = exact if before is None else before + exact
        return outputs


def _graph_mismatch(stage: Stage, name: str, value: Array) -> LastingError:
    """Error of a graph that is not the one its bundle was made with."""
    return LastingError(
        f"{stage.graph} gives {name} in another shape than the run is made for",
        f"received {list(value.shape)}",
        "convert the checkpoint again",
    )


def still_read(stages: Sequence[Stage], name: str, position: Position, rows: int) -> tuple[int, int]:
    """Start and stop of the rows that are read after a position, as they were before its stage."""
    stop = 0
    for stage in stages[position.stage :]:
        if name in stage.inputs:
            stop = max(stop, 1 if stage.over is StageScope.CLASS_TOKEN else rows)
        elif name == "q" and "query" in stage.inputs:
            stop = max(stop, 1)
        if name in stage.outputs:
            break
    here = stages[position.stage]
    # a pass over tokens may overwrite rows that it has read
    return position.done if here.over is StageScope.TOKENS and name in here.outputs else 0, stop


def told(stage: Stage, sums: Mapping[str, Array]) -> dict[str, Array]:
    """Return the sums that a stage takes; sums are added in float64 and used in float32."""
    taken = {name: total for name, total in sums.items() if name in stage.inputs}
    return {name: total.astype(np.float32) if total.dtype == np.float64 else total for name, total in taken.items()}


def ranges(start: int, stop: int, step: int) -> Iterator[tuple[int, int]]:
    for first in range(start, stop, step):
        yield first, min(stop, first + step)
