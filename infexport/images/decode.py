"""Pixels in: find image files and read them as a person would see them, uint8 RGB arrays [H, W, 3]."""

import logging
import os
import stat
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, UnidentifiedImageError

from infexport.errors import InfexportError
from infexport.system.untrusted_files import check_ordinary

log = logging.getLogger("infexport")

MAX_PIXELS = 2**30  # height x width accepted from a header; the environment variable below overrides it
MAX_PIXELS_VARIABLE = "INFEXPORT_MAX_PIXELS"

Pixels = NDArray[np.uint8]
T = TypeVar("T")

# Decoders that know their own files and stay inside this process (the EPS reader starts Ghostscript).
_FORMATS = ("PNG", "JPEG", "TIFF", "WEBP", "BMP", "GIF", "PPM", "JPEG2000", "AVIF", "QOI")
SUFFIXES = frozenset(s for s, name in Image.registered_extensions().items() if name in _FORMATS)

# What Pillow's decoders raise on damaged files.
_DECODER_ERRORS = (
    *(OSError, SyntaxError, ValueError, EOFError, TypeError, LookupError, AttributeError, AssertionError),
    *(ArithmeticError, RuntimeError, struct.error, zlib.error),
)
_TOO_LARGE = (Image.DecompressionBombError, Image.DecompressionBombWarning)

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_EXIF_ORIENTATION, _TIFF_BITS, _TIFF_PHOTOMETRIC = 0x0112, 258, 262


def find_images(paths: Sequence[Path]) -> list[Path]:
    """Find images as `expand_folders` does, without the heat maps of earlier runs.

    Raises:
        InfexportError: see `expand_folders`; or there are only heat maps.
    """
    return without_drawn(expand_folders(paths))


def expand_folders(paths: Sequence[Path]) -> list[Path]:
    """Files as given, folders expanded: recursive, links followed, sorted, by suffix, hidden ones left out.

    Each file is found once. What has an image's suffix but cannot be read, such as a pipe, is found, too: reading it
    says why.

    Raises:
        InfexportError: a path that does not exist, a folder without images, or a folder, or a link that may be one,
            that cannot be looked into. An answer about fewer images than were asked for would be another answer.
    """
    found: dict[str, Path] = {}  # by real path, the spelling met first
    for path in map(Path, paths):
        try:
            for file in _expand(path):
                # not Path.resolve(), which raises RuntimeError for a link to itself
                found.setdefault(os.path.realpath(file), file)
        except (OSError, ValueError) as error:  # ValueError: a null byte
            reason = (getattr(error, "strerror", None) or str(error)).replace("\n", " ")
            at = getattr(error, "filename", None)
            inside = f": {os.fsdecode(at)}" if at and os.fsdecode(at) != str(path) else ""
            hint = "check the spelling of the path and that you may read it, or name the images themselves"
            raise InfexportError(f"cannot find images: {path}", f"{reason}{inside}", hint) from error
    return list(found.values())


DRAWN_BY = "infexport heat map"
"""The `Software` that pictures name which infexport has drawn; matplotlib writes it before the pixels."""


def is_drawn(path: Path) -> bool:
    """Tell whether a file is a heat map that infexport has drawn, which is no image to be labelled."""
    try:
        check_ordinary(path)
        with path.open("rb") as file:
            begin = file.read(512)
    except (OSError, InfexportError):
        return False
    return begin.startswith(b"\x89PNG\r\n\x1a\n") and b"tEXtSoftware\0" + DRAWN_BY.encode() in begin


def without_drawn(files: Sequence[T]) -> list[T]:
    """Leave out the heat maps of earlier runs, and say so.

    Raises:
        InfexportError: nothing else is there.
    """
    drawn = [file for file in files if isinstance(file, Path) and is_drawn(file)]
    if drawn and len(drawn) == len(files):
        raise InfexportError(
            "no images, only heat maps that infexport drew",
            f"received {len(drawn)}, such as {drawn[0]}",
            "name the images that they are of",
        )
    if drawn:
        log.warning("left out %d heat maps that infexport drew, such as %s", len(drawn), drawn[0])
    left = {*drawn}
    return [file for file in files if file not in left]


def _expand(path: Path) -> list[Path]:
    if not stat.S_ISDIR(path.stat().st_mode):
        return [path]
    files = list(_images_below(path))
    if not files:
        details = f"suffixes looked for: {' '.join(sorted(SUFFIXES))}"
        hint = "name the files themselves if they end otherwise"
        raise InfexportError(f"no images in folder: {path}", details, hint)
    return files


def _images_below(folder: Path) -> Iterator[Path]:
    """Yield the visible images in a folder and those in it, sorted.

    Raises:
        OSError: a folder or a link that cannot be looked into.
    """
    visited: set[tuple[int, int]] = set()  # links may lead back
    waiting = [folder]
    while waiting:
        path = waiting.pop()
        is_image = path.suffix.lower() in SUFFIXES
        try:
            status = path.stat()
        except OSError as error:
            if is_image:
                yield path
            elif path.is_symlink():  # a folder, perhaps, on a disk that is not there
                raise OSError(error.errno, "a link that leads nowhere", str(path)) from error
            elif not isinstance(error, FileNotFoundError):  # else it was deleted meanwhile
                raise
            continue
        if not stat.S_ISDIR(status.st_mode):
            if is_image:
                yield path
        elif (status.st_dev, status.st_ino) not in visited:
            visited.add((status.st_dev, status.st_ino))
            inside = (item for item in path.iterdir() if not item.name.startswith("."))
            waiting.extend(sorted(inside, reverse=True))


def read_image(path: Path | str) -> Pixels:
    """The image as a person would see it: upright, transparency over white. uint8 RGB [H, W, 3], contiguous.

    Of several frames the first is read, and the log says so. Colour profiles are applied to CMYK only:
    for RGB, training pipelines ignore them. Sets Pillow's own pixel limit to ours.

    Raises:
        InfexportError: and nothing else, for whatever cannot be read or has no 8-bit equivalent.
    """
    limit = _set_limit()
    with _decoder_errors(path, limit):
        check_ordinary(Path(path))
        with Image.open(path, formats=[name for name in _FORMATS if name in Image.OPEN]) as image:
            return _pixels(image, path, limit)


def pixels_from(image: Image.Image, name: str) -> Pixels:
    """Return the pixels of an image of Pillow, like `read_image` those of a file.

    Args:
        image: of any mode, loaded or not.
        name: how errors call it.

    Raises:
        InfexportError: see `read_image`.
    """
    limit = _set_limit()
    with _decoder_errors(name, limit):
        return _pixels(image, name, limit)


def _set_limit() -> int:
    limit = pixel_limit()
    if limit != Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = limit
        # Pillow warns above the limit and refuses above twice that; we refuse above it, once and with a hint.
        warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    return limit


def _pixels(image: Image.Image, path: Path | str, limit: int) -> Pixels:
    if image.width * image.height > limit:
        raise too_large(path, f"{image.height}x{image.width}", limit)
    # In an MPO what follows the photograph are its previews.
    if image.format != "MPO" and getattr(image, "is_animated", False):
        log.warning("%s has more than one frame; the first is used", path)
    image.load()
    rgb = _to_rgb(image, path)
    method = _UPRIGHT.get(_orientation(image, path))  # after load: Pillow turns TIFF upright itself
    return np.array(rgb if method is None else rgb.transpose(method))


@contextmanager
def _decoder_errors(path: Path | str, limit: int) -> Iterator[None]:
    """Turn what Pillow raises into our error."""
    try:
        yield
    except _TOO_LARGE as error:
        raise too_large(path, str(error), limit) from error
    except MemoryError as error:
        hint = "use a machine with more memory, or a smaller copy of the image"
        raise InfexportError(f"not enough memory for image: {path}", "its pixels do not fit", hint) from error
    except UnidentifiedImageError as error:
        details = f"expected one of {', '.join(_FORMATS)}"
        hint = "convert it to PNG, JPEG or TIFF"
        raise InfexportError(f"not an image that can be read: {path}", details, hint) from error
    except _DECODER_ERRORS as error:
        if isinstance(error, OSError) and error.errno:  # from the file system, not from a decoder
            hint = "check that the file exists and that you may read it"
            raise InfexportError(f"cannot open image: {path}", error.strerror or str(error), hint) from error
        details, hint = f"{type(error).__name__}: {error}", "fetch or save the file again"
        raise InfexportError(f"damaged or truncated image: {path}", details, hint) from error


def _to_rgb(image: Image.Image, path: Path | str) -> Image.Image:
    if image.mode == "F":
        raise _no_8_bit(path, "floating-point pixels")
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _grey_16_bit(image, path).convert("RGB")
    if image.has_transparency_data:
        return over_white(image)
    if image.mode == "CMYK" and image.info.get("icc_profile"):
        try:
            inks = ImageCms.ImageCmsProfile(BytesIO(image.info["icc_profile"]))
            transform = ImageCms.buildTransform(inks, ImageCms.createProfile("sRGB"), "CMYK", "RGB")
            return transform.apply(image)
        except (ImageCms.PyCMSError, OSError) as error:
            log.warning("%s: its colour profile cannot be used (%s); converted without", path, error)
    return image.convert("RGB")


def over_white(image: Image.Image) -> Image.Image:
    """An image with transparency, of any mode, over white: RGB."""
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def grey_to_8_bits(values: NDArray[Any], white: int) -> Pixels:
    """Whole numbers from 0 to `white`, scaled to 0 to 255 and rounded."""
    return ((values.astype(np.uint32) * 255 + white // 2) // white).astype(np.uint8)


def _grey_16_bit(image: Image.Image, path: Path | str) -> Image.Image:
    """To 8 bits by scaling; Pillow's own convert clips at 255."""
    values = np.asarray(image)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise _no_8_bit(path, f"32-bit integers from {low} to {high}")
    tags = getattr(image, "tag_v2", {})
    white = 4095 if tags.get(_TIFF_BITS) == (12,) else 65535  # Pillow unpacks 12-bit TIFF without scaling it
    grey = grey_to_8_bits(values, white)
    if tags.get(_TIFF_PHOTOMETRIC) == 0:  # "white is zero": Pillow inverts only 8 bits
        grey = 255 - grey
    if isinstance(image.info.get("transparency"), int):
        grey[values == image.info["transparency"]] = 255
    return Image.fromarray(grey)


def _orientation(image: Image.Image, path: Path | str) -> int:
    try:
        value = image.getexif().get(_EXIF_ORIENTATION, 1)
        return value if isinstance(value, int) else 1
    except _DECODER_ERRORS as error:  # the picture itself is fine
        log.warning("%s: its EXIF data is damaged (%s); orientation not applied", path, error)
        return 1


def pixel_limit() -> int:
    """The most pixels an image may have.

    Raises:
        InfexportError: the environment variable that sets it is no number.
    """
    text = os.environ.get(MAX_PIXELS_VARIABLE)
    if text is None:
        return MAX_PIXELS
    if not text.isdecimal() or int(text) < 1:
        details = f"received {text!r}; expected a whole number, at least 1"
        raise InfexportError(f"{MAX_PIXELS_VARIABLE} is not a number of pixels", details)
    return int(text)


def too_large(what: Path | str, received: str, limit: int) -> InfexportError:
    """The error for an image beyond the limit."""
    details = f"received {received}; expected at most {limit} pixels"
    hint = f"set {MAX_PIXELS_VARIABLE} higher if you trust it and have the memory"
    return InfexportError(f"too many pixels: {what}", details, hint)


def _no_8_bit(path: Path | str, received: str) -> InfexportError:
    details = f"received {received}; expected 8-bit or 16-bit integers"
    hint = "scale the image to 8 or 16 bits and save it again"
    return InfexportError(f"pixel values without a known range: {path}", details, hint)
