"""One image in several places: each has a range of its rows, and all that they exchange are the sums.

A sweep is run by every shard over its own rows; what they give is added and told to all before the next: for
Linear-InfSA two small messages a layer, whatever the size of the image. Pure InfSA needs every key and value with every
query: these travel in blocks, one after another.

Knows nothing of processes or machines (`infexport.integrations.ray`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, Protocol

import numpy as np

from infexport.bundle.manifest import Stage
from infexport.errors import InfexportError
from infexport.images.strips import Source
from infexport.inference.options import TokenDtype
from infexport.inference.streaming.driver import (
    BY_TOKEN,
    Array,
    Driver,
    Position,
    Progress,
    RunsStages,
    Sums,
    Tokens,
    make_layout,
    ranges,
    told,
)
from infexport.inference.streaming.token_store import Stores
from infvit.config import InfViTConfig
from infvit.stage_scope import StageScope

AHEAD = 2
"""Blocks of keys and values that are on their way while one is used."""
RESTARTS = 3
"""Times that a shard may be lost before the run is given up."""
MEMORY_HINT = "see their machines' memory: more workers have smaller shards each"


def split_rows(grid: tuple[int, int], count: int) -> list[range]:
    """Rows of tokens of every shard: whole rows of patches, as many as the next has or one more; the first has the
    class token, too.

    Args:
        grid: patches of the image, `(height, width)`.
        count: of shards.

    Raises:
        InfexportError: more shards than rows of patches.
    """
    height, width = grid
    if count > height:
        raise InfexportError(
            f"{count} shards of an image with {height} rows of patches",
            "every shard has a whole row of patches at least",
            f"use at most {height} workers",
        )
    ends = [1 + width * (height * shard // count) for shard in range(count + 1)]
    return [range(start if start > 1 else 0, stop) for start, stop in pairwise(ends)]


class Shard:
    """A range of an image's rows, and their tokens.

    Args:
        config: of the bundle.
        stages: those that are run.
        runner: of these.
        source: the image, of which no more than the range is read.
        rows: the range, see `split_rows`.
        chunk, token_dtype: see `infexport.inference.streaming.stream`.

    Attributes:
        done: rows of the stage that it is at.
        received: bytes of other shards' blocks.
    """

    def __init__(
        self,
        config: InfViTConfig,
        stages: Sequence[Stage],
        runner: RunsStages,
        source: Source,
        rows: range,
        chunk: int,
        token_dtype: TokenDtype = "float32",
    ) -> None:
        self._stages, self._runner, self._rows, self._chunk = stages, runner, rows, chunk
        self._stores = Stores(config, runner.precision, token_dtype, None, {})
        self._tokens = Tokens(make_layout(stages, rows, chunk, resumable=False), self._stores)
        self._driver = Driver(stages, runner, source, self._tokens, chunk)
        self.done = 0
        self.received = 0

    def sweep(self, index: int, sums: Mapping[str, Array]) -> dict[str, Array]:
        """Run a stage over the rows: its sums, float64, or what it gives of the class token.

        Args:
            index: of the stage.
            sums: what it takes besides tokens.
        """
        self.done = 0
        position = Position(index, 0, dict(sums))
        outputs: dict[str, Array] = {}
        for done, outputs in self._driver.units(index, position):  # noqa: B007
            self.done = done - self._rows.start
        self.done = len(self._rows)
        return outputs if self._stages[index].over is StageScope.CLASS_TOKEN else position.added

    def block(self, index: int, start: int, stop: int) -> dict[str, Array]:
        """Return the rows that other shards need before a stage over pairs; before others, the first row's query."""
        stage = self._stages[index]
        names = [name for name in stage.inputs[1:] if name in BY_TOKEN] if stage.over.is_pairwise else ["q"]
        return {name: self._tokens.read(index, name, start, stop).copy() for name in names}

    def attend(self, index: int, block: Mapping[str, Array], sums: Mapping[str, Array], own: bool, first: bool) -> Sums:
        """Meet a block of some rows with all of this shard: what the stage gives of these is added to what it gave.

        Args:
            index: of the stage, which is over pairs.
            block: see `block`.
            sums: see `sweep`.
            own: the block is of this shard.
            first: nothing was given before.
        """
        self.received += 0 if own else _size(block)
        stage = self._stages[index]
        added: Sums = {}
        for start, stop in ranges(self._rows.start, self._rows.stop, StageScope.PAIRS.max_rows(self._chunk)):
            here = {stage.inputs[0]: self._tokens.read(index, stage.inputs[0], start, stop)}
            for name, value in self._runner.run(stage, {**here, **block, **sums}).items():
                if name not in BY_TOKEN:
                    added[name] = added.get(name, 0.0) + value.astype(np.float64)
                    continue
                if not first:
                    value = value + self._tokens.read(index + 1, name, start, stop)
                self._tokens.write(index, name, start, value[0])
        return added

    @property
    def rounding(self) -> float:
        """Relative error of rounding; see `infexport.inference.streaming.Streamed`."""
        return self._stores.relative_error

    def close(self) -> None:
        self._tokens.close()


class Lost(Exception):
    """A shard is gone, with its tokens."""


class Team(Protocol):
    """The shards of an image. Each runs its calls in order, concurrently with the others.

    Attributes:
        rows: range of every shard.
        waiting: called by `value` now and then, with the number of rows that all shards have done of their stage.
    """

    rows: Sequence[range]
    waiting: Callable[[int], None]

    def share(self, value: Any) -> Any:
        """Return a handle of a value for many shards, as an argument of `tell`."""
        ...

    def tell(self, shard: int, method: str, *arguments: Any) -> Any:
        """Start a method of a shard; return a handle of its result, which may be an argument, too."""
        ...

    def value(self, result: Any) -> Any:
        """Wait for the result behind a handle of `tell`, and return it.

        Raises:
            Lost: the shard, or one that an argument came from, is gone.
        """
        ...

    def replace(self, shard: int) -> None:
        """Make a shard anew.

        Raises:
            Lost: that one is gone, too.
            InfexportError: there is no place for it.
        """
        ...


class Sharded:
    """Runs the stages over one image in shards, and mends those that are lost.

    Args:
        stages: those that are run.
        team: of the shards.
        chunk: that of the shards.
        progress: called for every stage; see `Driver`.
        status: told of a shard that is made anew.

    Attributes:
        exchanged: bytes of sums that were told to shards and given by them.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        team: Team,
        chunk: int,
        progress: Progress = lambda stage, done, total: None,
        status: Callable[[str], None] = lambda message: None,
    ) -> None:
        self._stages, self._team, self._chunk = stages, team, chunk
        self._progress, self._status = progress, status
        self._total = sum(map(len, team.rows))
        self._restarts = 0
        self.exchanged = 0

    def run(self) -> dict[str, Array]:
        """Return the outputs of the last stage; see `Driver.run`.

        Raises:
            InfexportError: a shard was lost again and again, or what one met.
        """
        anew: Sequence[int] = ()
        while True:
            try:
                for shard in anew:
                    self._team.replace(shard)
                return self._run()
            except Lost:
                # the others' keys and values of earlier layers, which the shard would need, are no more
                self._again("a worker was lost: starting anew")
                anew = range(len(self._team.rows))

    def _run(self) -> dict[str, Array]:
        sums: Sums = {}
        begun: Sums = {}
        history: list[dict[str, Array]] = []
        for index, stage in enumerate(self._stages):
            self._team.waiting = partial(self._progress, index, total=self._total)
            history.append(told(stage, sums))
            if "query" in stage.inputs:
                history[-1]["query"] = self._team.value(self._team.tell(0, "block", index, 0, 1))["q"]
            parts = self._pairs(index, history[-1]) if stage.over.is_pairwise else self._sweep(index, history)
            self._progress(index, self._total, self._total)
            if index + 1 == len(self._stages):
                return parts[0]
            added = _added([begun, *parts])
            # the image goes on with the sums that the class token began
            begun = added if stage.over is StageScope.ONCE else {}
            sums |= added
        raise AssertionError("a run has stages")

    def _shards(self, stage: Stage) -> Sequence[int]:
        """Those that a stage concerns."""
        return [0] if stage.over.runs_once else range(len(self._team.rows))

    def _sweep(self, index: int, history: Sequence[dict[str, Array]]) -> list[Sums]:
        """Return every shard's sums of a stage, in their order; `history` has the inputs of this and earlier stages."""
        shards, shared = self._shards(self._stages[index]), self._team.share(history[index])
        results = [self._team.tell(shard, "sweep", index, shared) for shard in shards]
        parts: list[Sums] = []
        while len(parts) < len(shards):
            try:
                parts.append(self._team.value(results[len(parts)]))
            except Lost:
                shard = shards[len(parts)]
                results[len(parts)] = self._mend(shard, index, history)
        self.exchanged += len(shards) * _size(history[index]) + sum(map(_size, parts))
        return parts

    def _mend(self, shard: int, index: int, history: Sequence[dict[str, Array]]) -> Any:
        """Make a shard anew, up to a stage; what it will give of that.

        Raises:
            Lost: it cannot be made by itself.
        """
        if any(stage.over.is_pairwise for stage in self._stages[: index + 1]):
            raise Lost
        self._again(f"worker {shard + 1} was lost: doing its rows again")
        self._team.replace(shard)
        for before, sums in enumerate(history[:index]):
            if shard in self._shards(self._stages[before]):
                self._team.value(self._team.tell(shard, "sweep", before, sums))
        return self._team.tell(shard, "sweep", index, history[index])

    def _pairs(self, index: int, sums: Mapping[str, Array]) -> list[Sums]:
        """Return every shard's sums over every block of the others, block by block, for a stage over pairs."""
        team, shared, shards = self._team, self._team.share(sums), range(len(self._team.rows))
        coming: deque[list[Any]] = deque()
        parts: list[Sums] = []
        first = True
        for owner, start, stop in self._blocks():
            block = team.tell(owner, "block", index, start, stop)
            coming.append([team.tell(shard, "attend", index, block, shared, shard == owner, first) for shard in shards])
            first = False
            if len(coming) > AHEAD:
                parts += map(team.value, coming.popleft())
        for results in coming:
            parts += map(team.value, results)
        self.exchanged += len(shards) * _size(sums) + sum(map(_size, parts))
        return parts

    def _blocks(self) -> Iterator[tuple[int, int, int]]:
        """Yield blocks of all rows: their shard, start and stop."""
        for owner, rows in enumerate(self._team.rows):
            for start, stop in ranges(rows.start, rows.stop, StageScope.PAIRS.max_rows(self._chunk)):
                yield owner, start, stop

    def _again(self, message: str) -> None:
        self._restarts += 1
        if self._restarts > RESTARTS:
            raise InfexportError(
                f"workers were lost {self._restarts} times",
                "each time what they had done was done again",
                MEMORY_HINT,
            )
        self._status(message)


def _size(arrays: Mapping[str, Array]) -> int:
    return sum(array.nbytes for array in arrays.values())


def _added(parts: Sequence[Sums]) -> Sums:
    """Return the sum of parts, added in their order: the order of arrival must not change the last bit."""
    total: Sums = {}
    for part in parts:
        for name, value in part.items():
            total[name] = total.get(name, 0.0) + value
    return total


def exchanged_bytes(config: InfViTConfig, workers: int) -> int:
    """Bytes of the sums of Linear-InfSA that workers are told and give, whatever the size of the image.

    Per layer and worker the energies, H + E numbers, and the scores', H + H·E, given in float64 and told in float32;
    the last layer's go to one worker, which alone has the class token: its energies, the head, the answer.
    """
    heads, width, depth = config.num_heads, config.embed_dim, config.depth
    energies, scores = heads + width, heads + heads * width
    layers = workers * (12 * depth * (energies + scores) - 4 * scores)
    return layers + 8 * energies + 4 * (scores + config.num_classes + width)
