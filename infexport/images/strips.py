"""Images strip by strip, in whole patches."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, Protocol

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import Image

from infexport.errors import InfexportError, LastingError
from infexport.images.decode import Pixels, grey_to_8_bits, over_white, read_image
from infexport.images.preprocess import patch_grid
from infexport.system.dependencies import importable
from infexport.system.untrusted_files import check_ordinary

Array = NDArray[Any]


class Rows(Protocol):
    """An image whose rows are read from top to bottom.

    Attributes:
        height, width: in pixels.
        loaded: bytes of it that are in memory before anything is read.
        reader: what reads it, and its version.
    """

    height: int
    width: int
    loaded: int
    reader: str

    def read(self, start: int, stop: int) -> Pixels:
        """uint8 RGB `[stop − start, width, 3]`; `start` is not before where an earlier read ended.

        Raises:
            InfexportError: the file is damaged.
        """
        ...


class ArrayRows:
    """Rows of an image in memory, uint8 `[H, W, 3]`."""

    reader = f"Pillow {PIL.__version__}"

    def __init__(self, pixels: Pixels) -> None:
        self.height, self.width = pixels.shape[:2]
        self.pixels, self.loaded = pixels, pixels.nbytes

    def read(self, start: int, stop: int) -> Pixels:
        return self.pixels[start:stop]


class Source:
    """An image as strips of whole patches.

    Args:
        rows: the image.
        patch: side of a patch, in pixels.
        edge: the last patch is completed by replicating the edge (`pad`), or cut off (`crop`).

    Attributes:
        rows: the image.
        grid: patches, `(height, width)`.
        padded_share: share of the pixels that are not the image's.

    Raises:
        InfexportError: cutting leaves nothing.
    """

    def __init__(self, rows: Rows, patch: int, edge: Literal["pad", "crop"]) -> None:
        self.rows, self._patch = rows, patch
        self.grid = patch_grid(rows.height, rows.width, patch, edge)
        height, width = (patch * side for side in self.grid)
        self.padded_share = 1 - min(height, rows.height) * min(width, rows.width) / (height * width)

    @property
    def tokens(self) -> int:
        """Patches and the class token."""
        return self.grid[0] * self.grid[1] + 1

    def strips(self, patches: range, chunk: int, max_rows: int | None = None) -> Iterator[tuple[int, dict[str, Array]]]:
        """Yield the inputs of the `image` stage, in order; the next strip is read while one is used.

        Args:
            patches: from where an earlier call was done, to the end of a row.
            chunk: patches at a time, at most: whole rows of them, or a part of one.
            max_rows: rows at a time, at most.

        Yields:
            Patches that are done with this strip, and the strip: `image [1, r·p, c·p, 3]`, and where it is.
        """
        done, width = patches.start, self.grid[1]
        height = patches.stop // width
        step = max(1, chunk // width)
        step = step if max_rows is None else min(step, max_rows)
        grid = {
            f"grid_{name}": np.array([n], np.float32) for name, n in zip(("height", "width"), self.grid, strict=True)
        }
        with ThreadPoolExecutor(1) as reader:
            first = done // width
            coming = reader.submit(self._read, first, min(height, first + step))
            for row in range(first, height, step):
                pixels, stop = coming.result(), min(height, row + step)
                if stop < height:
                    coming = reader.submit(self._read, stop, min(height, stop + step))
                for column in range(done % width if row == first else 0, width, max(chunk, 1)):
                    here = min(width, column + chunk)
                    image = pixels[None, :, column * self._patch : here * self._patch]
                    where = {"row": np.array([row], np.float32), "column": np.array([column], np.float32)}
                    whole = here == width
                    yield stop * width if whole else row * width + here, {"image": image, **where, **grid}

    def _read(self, start: int, stop: int) -> Pixels:
        """Rows of patches, completed."""
        pixels = self.rows.read(start * self._patch, min(stop * self._patch, self.rows.height))
        pixels = pixels[:, : self.grid[1] * self._patch]
        missing = (stop - start) * self._patch - pixels.shape[0], self.grid[1] * self._patch - pixels.shape[1]
        if any(missing):
            pixels = np.pad(pixels, ((0, missing[0]), (0, missing[1]), (0, 0)), mode="edge")
        return pixels


@cache
def _vips() -> ModuleType:
    """pyvips, with libvips remembering nothing.

    It keeps the last hundred operations by the names of their files, and up to 100 MB with them: a file that was
    written anew would be answered with the pixels of the old one.
    """
    import pyvips

    pyvips.cache_set_max(0)
    return pyvips


class VipsRows:
    """Rows of a file, read by libvips: TIFF (BigTIFF, tiled, pyramidal), PNG, JPEG and WebP.

    Upright, transparency over white, 16 bits scaled to 8, as `infexport.images.decode.read_image` has it.

    Raises:
        InfexportError: it cannot be opened, or its pixels have no 8-bit equivalent.
    """

    loaded = 0

    def __init__(self, path: Path) -> None:
        pyvips = _vips()
        self._path, self._error = path, pyvips.Error
        self.reader = "libvips " + ".".join(str(pyvips.version(part)) for part in range(3))
        loader = _find_loader(path)
        # a tile that is not there is a warning of TIFF's reader; warnings of others are harmless
        fail_on = "warning" if loader.startswith("tiff") else "truncated"

        def load(**access: str) -> Any:
            # not by its name: in it libvips looks for options, as in a.tif[page=1]
            return getattr(pyvips.Image, loader)(pyvips.Source.new_from_file(str(path)), fail_on=fail_on, **access)

        try:
            image = load(access="sequential")
            if image.get_typeof("orientation") and image.get("orientation") != 1:
                # turning needs all of it: libvips decodes to a temporary file what is large
                image = load().autorot()
            known = image.format in ("uchar", "ushort") and image.bands <= 4
            if known and image.interpretation not in ("srgb", "rgb", "b-w", "rgb16", "grey16", "multiband"):
                image = image.colourspace("srgb")
        except pyvips.Error as error:
            raise self._damaged(error) from error
        if not known:
            raise InfexportError(
                f"pixel values without a known range: {path}",
                f"received {image.bands} bands of {image.format}; expected up to 4 of 8-bit or 16-bit integers",
                "scale the image to 8 or 16 bits and save it again",
            )
        self._region = pyvips.Region.new(image)
        self._dtype = np.uint8 if image.format == "uchar" else np.uint16
        self.height, self.width = image.height, image.width

    def read(self, start: int, stop: int) -> Pixels:
        try:
            part = self._region.fetch(0, start, self.width, stop - start)
        except self._error as error:
            raise self._damaged(error) from error
        return to_rgb(np.frombuffer(part, self._dtype).reshape(stop - start, self.width, -1))

    def _damaged(self, error: Exception) -> InfexportError:
        text = str(error).strip().splitlines()
        return _unreadable(
            f"damaged or truncated image, or none that can be streamed: {self._path}",
            text[-1] if text else "",
            "fetch or save the file again",
        )


ELSEWHERE = [os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ENOMEM, errno.EMFILE)]


def _unreadable(summary: str, reason: str, hint: str) -> InfexportError:
    """Error of an image that a library cannot read: lasting, but where a disk or memory is the reason."""
    passing = "out of memory" in reason.lower() or any(text in reason for text in ELSEWHERE)
    return (InfexportError if passing else LastingError)(summary, reason, hint)


_LOADERS = (
    (rb"\x89PNG\r\n\x1a\n", "pngload_source"),
    (rb"\xff\xd8\xff", "jpegload_source"),
    (rb"II[*+]\0|MM\0[*+]", "tiffload_source"),
    (rb"RIFF....WEBP", "webpload_source"),
)
"""First bytes of a file → its loader. Others of libvips' loaders run programs or read further files."""


def _find_loader(path: Path) -> str:
    with path.open("rb") as file:
        begin = file.read(16)
    for signature, loader in _LOADERS:
        if re.match(signature, begin, re.DOTALL):
            return loader
    raise InfexportError(f"none that libvips is asked to read: {path}")


class SlideRows:
    """Rows of a whole-slide image, level 0, read by OpenSlide."""

    loaded = 0

    def __init__(self, path: Path) -> None:
        import openslide

        self._path, self._error = path, openslide.OpenSlideError
        self.reader = f"OpenSlide {openslide.__library_version__}"
        try:
            self._slide = openslide.OpenSlide(path)
        except openslide.OpenSlideError as error:
            raise self._damaged(error) from error
        self.width, self.height = self._slide.dimensions

    @property
    def files(self) -> list[Path]:
        """All that the slide may be read from: some formats have more files, in a folder of its name or beside it."""
        folder: Path | None = None
        if self._path.suffix.lower() == ".mrxs":
            folder = self._path.with_suffix("")
        elif self._path.suffix.lower() in (".vms", ".vmu", ".dcm", ""):
            folder = self._path.parent
        others = (
            [] if folder is None or not folder.is_dir() else sorted(file for file in folder.iterdir() if file.is_file())
        )
        return [self._path, *(file for file in others if file != self._path)]

    def read(self, start: int, stop: int) -> Pixels:
        try:
            return to_rgb(np.asarray(self._slide.read_region((0, start), 0, (self.width, stop - start))))
        except self._error as error:
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> InfexportError:
        return _unreadable(f"a slide that cannot be read: {self._path}", str(error), "fetch the file again")


def to_rgb(pixels: Array) -> Pixels:
    """uint8 RGB over white of uint8 or uint16 `[h, w, bands]`, grey or RGB, with alpha or without."""
    bands = pixels.shape[2]
    if pixels.dtype == np.uint16:
        # as Pillow has it: grey is scaled, of colours the high byte taken
        pixels = grey_to_8_bits(pixels, 65535) if bands == 1 else (pixels >> 8).astype(np.uint8)
    if bands in (2, 4):
        pixels = np.asarray(over_white(Image.fromarray(pixels)))
    return np.ascontiguousarray(np.repeat(pixels, 3, axis=2) if bands == 1 else pixels)


def list_files(path: Path, rows: Rows) -> list[Path]:
    """The files that the rows of an image file are read from, itself first."""
    return rows.files if isinstance(rows, SlideRows) else [path]


def open_rows(path: Path) -> Rows:
    """An image file, to be read in rows: by OpenSlide where that is installed and knows it, else by libvips.

    What neither can open, or where neither is installed, Pillow reads whole (`infexport.images.decode.read_image`).

    Raises:
        InfexportError: it cannot be opened.
    """
    try:
        check_ordinary(path)
    except OSError:
        return ArrayRows(read_image(path))  # which says what is wrong
    if importable("openslide"):
        import openslide

        with suppress(OSError):
            if openslide.OpenSlide.detect_format(path) not in (None, "generic-tiff"):
                return SlideRows(path)
    if importable("pyvips"):
        # Pillow says best what is wrong with it, and takes names that are no UTF-8
        with suppress(InfexportError, UnicodeError, OSError):
            return VipsRows(path)
    return ArrayRows(read_image(path))
