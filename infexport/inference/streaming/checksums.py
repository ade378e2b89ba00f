"""Checksums of kept rows: an interrupted run goes on only with rows that are proven to be those it wrote."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

from infexport.inference.streaming.token_store import Rows, Unproven

Tables = dict[str, NDArray[np.uint32]]


class Checksums:
    """CRC-32 of every block of rows, for the generations of rows that can still be read.

    Args:
        rows: number of rows of the image.
        block: rows of a block; a resumed pass over tokens begins at a multiple of it.
        tables: "name/generation" → number of rows written so far, then the CRC-32 of every block; added to.
    """

    def __init__(self, rows: int, block: int, tables: Tables) -> None:
        self._block, self._blocks, self._tables = block, -(-rows // block), tables

    def add(self, name: str, generation: int, start: int, rows: Rows) -> None:
        """Add rows, as they are kept; within a generation they come in order."""
        key = f"{name}/{generation}"
        if key not in self._tables:
            self._tables.pop(f"{name}/{generation - 2}", None)  # which is overwritten now
            self._tables[key] = np.zeros(1 + self._blocks, np.uint32)
        table = self._tables[key]
        while len(rows):
            index, inside = divmod(start, self._block)
            part = rows[: self._block - inside]
            table[1 + index] = zlib.crc32(part.data, int(table[1 + index]) if inside else 0)
            start, rows = start + len(part), rows[len(part) :]
        table[0] = start

    def written(self, name: str, generation: int) -> int:
        """Number of rows of a generation that were written."""
        table = self._tables.get(f"{name}/{generation}")
        return 0 if table is None else int(table[0])

    def check(
        self, name: str, generation: int, start: int, stop: int, kept: Callable[[int, int], Iterable[Rows]]
    ) -> None:
        """Compare rows with those that were written.

        Args:
            name, generation: of the rows.
            start, stop: which rows; `start` is a multiple of the block.
            kept: start and stop → the rows as they are kept, in order.

        Raises:
            Unproven: some differ.
        """
        written = self.written(name, generation)
        if written < stop:
            raise Unproven(f"its record has no checksums of {name}")
        for index in range(start // self._block, -(-stop // self._block)):
            first, last = index * self._block, min(written, (index + 1) * self._block)
            found = 0
            for part in kept(first, last):
                found = zlib.crc32(part.data, found)
            if found != self._tables[f"{name}/{generation}"][1 + index]:
                raise Unproven(f"rows {first} to {last - 1} of the file {name} are not those that were written")
