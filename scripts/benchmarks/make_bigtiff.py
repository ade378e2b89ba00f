#!/usr/bin/env python3
"""Write a tiled BigTIFF of any size, strip by strip, from photographs.

    python scripts/benchmarks/make_bigtiff.py huge.tif --size 32768
    python scripts/benchmarks/make_bigtiff.py slide.tif --size 9216x20000 --compression deflate photo.jpg other.png

The photographs are laid side by side, each turned, mirrored and lightened by chance, so that no two places are alike.
Without any, scikit-image's are taken. Memory holds one row of tiles.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image

CELL = 512
"""Side of a photograph, in pixels; a multiple of the tile."""
TILE = 256


def photographs(paths: Sequence[Path]) -> list[NDArray[np.uint8]]:
    """uint8 RGB `[CELL, CELL, 3]` each."""
    if paths:
        images = [Image.open(path) for path in paths]
    else:
        import skimage.data

        arrays = (skimage.data.astronaut(), skimage.data.chelsea(), skimage.data.coffee(), skimage.data.rocket())
        images = [Image.fromarray(array) for array in arrays]
    return [np.asarray(image.convert("RGB").resize((CELL, CELL), Image.Resampling.BICUBIC)) for image in images]


def cells(photos: Sequence[NDArray[np.uint8]], count: int, row: int) -> NDArray[np.uint8]:
    """A row of cells `[CELL, count · CELL, 3]`, the same every time."""
    random = np.random.default_rng(row)
    line = np.empty((CELL, count * CELL, 3), np.uint8)
    for i in range(count):
        photo = np.rot90(photos[random.integers(len(photos))], random.integers(4))
        if random.integers(2):
            photo = photo[:, ::-1]
        light = random.uniform(0.6, 1.0)
        line[:, i * CELL : (i + 1) * CELL] = (photo * light).astype(np.uint8)
    return line


def tiles(photos: Sequence[NDArray[np.uint8]], height: int, width: int) -> Iterator[NDArray[np.uint8]]:
    """Tiles `[TILE, TILE, 3]` of the image, row by row, the last ones filled up."""
    across = -(-width // CELL)
    for top in range(0, height, CELL):
        line = cells(photos, across, top // CELL)
        for y in range(0, min(CELL, height - top), TILE):
            for x in range(0, width, TILE):
                yield np.ascontiguousarray(line[y : y + TILE, x : x + TILE])


def write(path: Path, height: int, width: int, photos: Sequence[NDArray[np.uint8]], compression: str = "none") -> None:
    """Write the image, uint8 RGB; `compression` is `none` or `deflate`."""
    with tifffile.TiffWriter(path, bigtiff=True) as file:
        file.write(
            tiles(photos, height, width),
            shape=(height, width, 3),
            dtype=np.uint8,
            tile=(TILE, TILE),
            photometric="rgb",
            compression=None if compression == "none" else compression,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="the .tif to write")
    parser.add_argument("photographs", type=Path, nargs="*", help="images of any size [scikit-image's]")
    parser.add_argument("--size", default="9216", metavar="N|HxW", help="in pixels [9216]")
    parser.add_argument("--compression", choices=("none", "deflate"), default="none")
    options = parser.parse_args()
    height, _, width = options.size.partition("x")
    try:
        size = int(height), int(width or height)
    except ValueError:
        size = 0, 0
    if min(size) < 1:
        parser.error(f"--size {options.size}: expected N or HEIGHTxWIDTH")
    write(options.output, *size, photographs(options.photographs), options.compression)


if __name__ == "__main__":
    main()
