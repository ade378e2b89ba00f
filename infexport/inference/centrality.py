"""Maps of the attention that each token receives."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Map = NDArray[np.float32]

CENTRALITY = "centrality"
"""Its name, among the outputs of graphs and stages."""
MOST_NUMBERS = 2**24
"""Most numbers in one image's maps, over all layers and heads; patches of larger grids are summed in cells."""


@dataclass(frozen=True)
class Centrality:
    """Centrality maps: normalised scores in Linear-InfSA, column sums of the Neumann series (Katz) in Pure InfSA.

    Attributes:
        cells: float32 `[layers, heads, rows, columns]`, summed over the patches of a cell.
        class_token: float32 `[layers, heads]`.
        grid: patches, `(height, width)`.
        step: patches along a side of a cell, 1 where every patch is one. Cell (i, j) has those from row i·step and
            column j·step on; the last cells have fewer where the grid is no multiple of it.
    """

    cells: Map
    class_token: Map
    grid: tuple[int, int]
    step: int

    @property
    def shares(self) -> Map:
        """Share of each cell in all that a layer and head attends to, `[layers, heads, rows, columns]`.

        The class token counts in the total. Zero where a head attends to nothing.
        """
        total = self.cells.sum((-2, -1), dtype=np.float64) + self.class_token
        return (self.cells / np.where(total > 0, total, 1)[..., None, None]).astype(np.float32)

    def times_average(self, shares: Map) -> Map:
        """Shares `[…, rows, columns]` in units of what a cell would have, were all patches alike: 1 is the average."""
        patches = np.outer(*(np.minimum(self.step, side - np.arange(0, side, self.step)) for side in self.grid))
        inside = shares.sum((-2, -1), keepdims=True, dtype=np.float64)
        return (shares * (math.prod(self.grid) / (np.where(inside > 0, inside, 1) * patches))).astype(np.float32)

    def raster(self, values: Map, shape: tuple[int, int]) -> Map:
        """Means of the values of cells `[…, rows, columns]` over `shape` equal parts of the grid.

        Cells are no equal parts where the last ones have fewer patches: drawn as if they were, all is misplaced.

        Args:
            values: of an average patch of each cell, see `times_average`.
            shape: number of parts of the grid's height and width.
        """
        down, across = (_overlaps(side, self.step, parts) for side, parts in zip(self.grid, shape, strict=True))
        return (down @ values @ across.T).astype(np.float32)


def _overlaps(side: int, step: int, parts: int) -> NDArray[np.float64]:
    """Share of each of `parts` equal parts of a side that lies in each cell, `[parts, cells]`."""
    edges = np.arange(parts + 1) * side / parts
    cells = np.minimum(np.arange(-(-side // step) + 1) * step, side)
    inside = np.minimum(edges[1:, None], cells[1:]) - np.maximum(edges[:-1, None], cells[:-1])
    return np.maximum(inside, 0) / np.diff(edges)[:, None]


def map_step(grid: tuple[int, int], maps: int) -> int:
    """The least step at which `maps` maps of a grid have at most MOST_NUMBERS cells."""
    step = 1
    while maps * math.prod(-(-side // step) for side in grid) > MOST_NUMBERS:
        step += 1
    return step


def summed(rows: Map, step: int) -> Map:
    """Rows of patches `[rows, columns, heads]`, at most `step` of them, as one row of cells `[cells, heads]`."""
    starts = np.arange(0, rows.shape[1], step)
    return np.add.reduceat(rows.sum(0, dtype=np.float64), starts, axis=0).astype(np.float32)


def centrality_from_tokens(tokens: Map, grid: tuple[int, int]) -> Centrality:
    """Build the maps from the centrality of every token, `[layers, heads, 1 + h·w]`, the class token first."""
    return Centrality(tokens[..., 1:].reshape(*tokens.shape[:2], *grid), tokens[..., 0], grid, 1)
