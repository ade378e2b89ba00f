"""Items that a caller names as images: their check, their display name, and their pixels."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as PillowImage

from infexport.bundle import Bundle
from infexport.errors import InfexportError
from infexport.images.decode import Pixels, pixels_from, read_image
from infexport.images.fetch import is_url, shown
from infexport.images.preprocess import resized
from infexport.images.strips import ArrayRows, Rows, Source, open_rows
from infexport.inference.options import InferenceOptions


def check_item(item: object) -> Path | str | Pixels:
    """Return a caller's item as a file, a URL or pixels uint8 `[H, W, 3]`.

    Raises:
        InfexportError: it is none of them.
    """
    if isinstance(item, PillowImage.Image):
        return pixels_from(item, "an image of Pillow")
    if isinstance(item, np.ndarray):
        if item.dtype == np.uint8 and item.ndim == 3 and item.shape[2] == 3 and item.size:
            return item
        received = f"received {item.dtype} {list(item.shape)}, expected uint8 [height, width, 3]"
        raise InfexportError("an array that is no image", received)
    path = os.fspath(item) if isinstance(item, os.PathLike) else item
    if not isinstance(path, str):
        raise InfexportError(
            "an item that is no image",
            f"received {type(item).__name__}, expected a file, a URL, uint8 [height, width, 3], or an image of Pillow",
        )
    try:
        if b"\0" in os.fsencode(path):
            raise ValueError("it has a NUL character")
    except ValueError as error:  # halves of surrogate pairs, too
        raise InfexportError(f"no name of a file: {_text(path)}", str(error)) from error
    return path if is_url(path) else Path(path)


def display_name(images: Sequence[Any], index: int) -> str:
    """Return the name under which messages and results show an image."""
    item = images[index]
    if isinstance(item, PillowImage.Image):
        item = getattr(item, "filename", "")
    if is_url(item):
        return shown(item)
    path = os.fspath(item) if isinstance(item, os.PathLike) else item
    return _text(path) if isinstance(path, str) and path else f"image {index}"


def _text(path: str) -> str:
    """Return a path that can be written in UTF-8: a file name in another encoding must not end the run."""
    try:
        return os.fsencode(path).decode("utf-8", "replace")
    except UnicodeEncodeError:
        return path.encode("utf-8", "replace").decode()


def open_source(image: Path | Pixels, bundle: Bundle, options: InferenceOptions) -> Source:
    """Open an image at the size that the options ask for.

    Raises:
        InfexportError: it cannot be read, or cutting leaves nothing of it.
    """
    rows: Rows
    if options.size == "native":
        rows = open_rows(image) if isinstance(image, Path) else ArrayRows(image)
    else:
        rows = ArrayRows(resized(load_pixels(image), options.size, bundle.manifest.preprocessing.transform))
    return Source(rows, bundle.manifest.config.patch_size, options.edge)


def load_pixels(image: Path | Pixels) -> Pixels:
    """Return the pixels of a file, or those given."""
    return read_image(image) if isinstance(image, Path) else image
