"""The centrality of an image's tokens, summed up in cells, layer after layer."""

from __future__ import annotations

import io
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from infexport.bundle.manifest import Stage
from infexport.errors import LastingError
from infexport.inference.centrality import CENTRALITY, Centrality, map_step, summed
from infexport.inference.streaming.checksums import Tables
from infexport.inference.streaming.driver import Array, Tokens
from infexport.inference.streaming.token_store import Unproven, check_left, replace_file, scratch_errors
from infvit.config import InfViTConfig

EPSILON = 1e-6
"""Copy of `infsa_ops.EPSILON`, added to every divisor; importing that needs torch."""


class Maps:
    """An observer of a `Driver`.

    Args:
        stages: those that are run.
        config: of the bundle.
        grid: patches of the image, `(height, width)`.
        folder: of a run that can be resumed; keeps the layers that are done.
        checksums: file → its size and CRC-32, of the layers that are done; added to.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        config: InfViTConfig,
        grid: tuple[int, int],
        folder: Path | None,
        checksums: Tables,
    ) -> None:
        self._stages, self._config, self._grid, self._folder = stages, config, grid, folder
        self._checksums = checksums
        self._step = map_step(grid, config.depth * config.num_heads)
        self._layers: dict[int, Array] = {}

    def __call__(self, stage: int, tokens: Tokens, sums: Mapping[str, Array]) -> None:
        if CENTRALITY not in self._stages[stage].outputs:
            return
        layer = self._layer(stage)
        height, width = self._grid
        cells = [tokens.read(stage + 1, CENTRALITY, 0, 1)[0].copy()]
        for row in range(0, height, self._step):
            start, stop = 1 + row * width, 1 + min(height, row + self._step) * width
            band = tokens.read(stage + 1, CENTRALITY, start, stop)
            cells.append(summed(band.reshape(-1, width, band.shape[-1]), self._step))
        self._layers[layer] = np.concatenate(cells)
        if self._folder is not None:
            file, content = self._folder / _name(stage), io.BytesIO()
            np.save(content, self._layers[layer])
            replace_file(file, content.getvalue())
            self._checksums[file.name] = _checksum(content.getvalue())

    def take_up(self) -> None:
        """Read the layers that were done before the run was interrupted.

        Raises:
            Unproven: a file is not what was written.
        """
        assert self._folder is not None, "without one, no run is taken up"
        for stage in range(len(self._stages)):  # of several terms of a layer the last counts
            file = self._folder / _name(stage)
            if file.name in self._checksums:
                expected = self._checksums[file.name]
                with scratch_errors(file):
                    check_left(file, int(expected[0]))
                    content = file.read_bytes()
                if not np.array_equal(_checksum(content), expected):
                    raise Unproven(f"the file {file.name} is not what was written")
                self._layers[self._layer(stage)] = np.load(io.BytesIO(content))

    def _layer(self, stage: int) -> int:
        return sum({"tokens"} <= {*done.inputs} & {*done.outputs} for done in self._stages[:stage])

    def result(self) -> Centrality:
        """The centrality of all layers, once the run is done."""
        for layer in set(range(self._config.depth)) - self._layers.keys():
            raise LastingError(f"the stages give no centrality of layer {layer}", hint="convert the checkpoint again")
        # [layers, heads, the class token and every cell]
        found = np.stack([self._layers[layer].T for layer in range(self._config.depth)])
        if self._config.variant == "linear_infsa":
            found /= found.sum(-1, keepdims=True, dtype=np.float64).astype(np.float32) + np.float32(EPSILON)
        rows, columns = (-(-side // self._step) for side in self._grid)
        cells = found[..., 1:].reshape(*found.shape[:2], rows, columns)
        return Centrality(cells, found[..., 0], self._grid, self._step)


def _name(stage: int) -> str:
    """Name of a file, which no later stage overwrites: its record may not have been written yet."""
    return f"centrality-{stage}.npy"


def _checksum(content: bytes) -> NDArray[np.uint32]:
    return np.array([len(content), zlib.crc32(content)], np.uint32)
