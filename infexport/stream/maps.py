"""The centrality of an image's tokens, summed up in cells, layer after layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from infexport.centrality import CENTRALITY, Centrality, step_of, summed
from infexport.errors import InfexportError
from infexport.manifest import Stage
from infexport.stream.driver import Array, Tokens
from infexport.stream.stores import scratch_errors

EPSILON = 1e-6
"""Of `infsa_ops`, added to every divisor."""


class Maps:
    """An observer of a `Driver`.

    Args:
        stages: those that are run.
        config: of the bundle.
        grid: patches of the image, `(height, width)`.
        folder: of a run that can be resumed; keeps the layers that are done.
    """

    def __init__(
        self, stages: Sequence[Stage], config: Mapping[str, Any], grid: tuple[int, int], folder: Path | None
    ) -> None:
        self._stages, self._config, self._grid, self._folder = stages, config, grid, folder
        self._step = step_of(grid, config["depth"] * config["num_heads"])
        self._layers: dict[int, Array] = {}

    def __call__(self, stage: int, tokens: Tokens, sums: Mapping[str, Array]) -> None:
        if CENTRALITY not in self._stages[stage].outputs:
            return
        layer = sum({"tokens"} <= {*done.inputs} & {*done.outputs} for done in self._stages[:stage])
        height, width = self._grid
        cells = [tokens.read(stage + 1, CENTRALITY, 0, 1)[0].copy()]
        for row in range(0, height, self._step):
            start, stop = 1 + row * width, 1 + min(height, row + self._step) * width
            band = tokens.read(stage + 1, CENTRALITY, start, stop)
            cells.append(summed(band.reshape(-1, width, band.shape[-1]), self._step))
        self._layers[layer] = np.concatenate(cells)
        if self._folder is not None:
            file = self._file(layer)
            with scratch_errors(file):
                partial = file.with_name(f"partial-{file.name}")
                np.save(partial, self._layers[layer])
                partial.replace(file)

    def result(self) -> Centrality:
        """Of all layers, once the run is done; those before it was interrupted come from its folder."""
        for layer in set(range(self._config["depth"])) - self._layers.keys():
            if self._folder is None:
                raise InfexportError(
                    f"the stages give no centrality of layer {layer}", hint="convert the checkpoint again"
                )
            with scratch_errors(self._file(layer)):
                self._layers[layer] = np.load(self._file(layer))
        # [layers, heads, the class token and every cell]
        found = np.stack([self._layers[layer].T for layer in range(self._config["depth"])])
        if self._config["variant"] == "linear_infsa":
            found /= found.sum(-1, keepdims=True, dtype=np.float64).astype(np.float32) + np.float32(EPSILON)
        rows, columns = (-(-side // self._step) for side in self._grid)
        cells = found[..., 1:].reshape(*found.shape[:2], rows, columns)
        return Centrality(cells, found[..., 0], self._grid, self._step)

    def _file(self, layer: int) -> Path:
        assert self._folder is not None, "without one, every layer is seen"
        return self._folder / f"centrality-{layer}.npy"
