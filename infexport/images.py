"""Pixels in: find image files, read them as a person would see them, fit them to whole patches.

Images are uint8 RGB arrays [H, W, 3] throughout; normalisation belongs to the graph.
"""

import logging
import math
import os
import struct
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, UnidentifiedImageError

from infexport.errors import InfexportError

log = logging.getLogger("infexport")

MAX_PIXELS = 2**30  # height x width accepted from a header; the environment variable below overrides it
MAX_PIXELS_VARIABLE = "INFEXPORT_MAX_PIXELS"

Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]
ResizeMode = Literal["shortest", "exact"]
Edge = Literal["pad", "crop"]
Pixels = NDArray[np.uint8]

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


@dataclass(frozen=True)
class EvalTransform:
    """The evaluation transform a network was trained with: resize, then centre crop to crop_size².

    "shortest" resizes the shorter side to resize_size and keeps the aspect; "exact" resizes to resize_size².
    """

    resize_mode: ResizeMode
    resize_size: int
    crop_size: int
    interpolation: Interpolation

    def __post_init__(self) -> None:
        for name, allowed in (("resize_mode", ResizeMode), ("interpolation", Interpolation)):
            if getattr(self, name) not in get_args(allowed):
                raise _bad_transform(f"{name} {getattr(self, name)!r}", f"one of {get_args(allowed)}")
        for name in ("resize_size", "crop_size"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise _bad_transform(f"{name} {value!r}", "a whole number, at least 1")

    def at(self, size: int) -> "EvalTransform":
        """The same transform at another side: crop_size = size, resize_size scaled in proportion."""
        resize = round(self.resize_size * size / self.crop_size)
        return replace(self, crop_size=size, resize_size=max(1, resize))

    def to_dict(self) -> dict[str, str | int]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "EvalTransform":
        """Raises InfexportError on a missing or unexpected key and on a value out of range."""
        expected = {field.name for field in fields(cls)}
        if set(data) != expected:
            missing, extra = sorted(expected - set(data)), sorted(set(data) - expected)
            raise _bad_transform(f"missing {missing}, unexpected {extra}", f"the keys {sorted(expected)}")
        return cls(**data)


@dataclass(frozen=True, eq=False)
class Fitted:
    """An image whose sides are multiples of the patch."""

    pixels: Pixels  # uint8 [H', W', 3]
    padded_share: float  # replicated pixels / all pixels, in [0, 1)


def find_images(paths: Sequence[Path]) -> list[Path]:
    """Files as given, folders expanded: recursive, sorted, by suffix, hidden files left out. Each file once.

    Raises InfexportError for a path that does not exist and for a folder without images.
    """
    found: dict[Path, Path] = {}  # by resolved path, the spelling met first
    for path in map(Path, paths):
        try:
            for file in _expand(path):
                found.setdefault(file.resolve(), file)
        except OSError as error:
            hint = "check the spelling of the path and that you may read it"
            raise InfexportError(f"cannot find images: {path}", error.strerror or str(error), hint) from error
    return list(found.values())


def _expand(path: Path) -> list[Path]:
    if not path.is_dir():
        path.stat()  # raises the reason if there is no such file
        return [path]
    files = sorted(file for file in path.rglob("*") if _is_visible_image(file, path))
    if not files:
        details = f"suffixes looked for: {' '.join(sorted(SUFFIXES))}"
        hint = "name the files themselves if they end otherwise"
        raise InfexportError(f"no images in folder: {path}", details, hint)
    return files


def _is_visible_image(file: Path, folder: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    return not hidden and file.suffix.lower() in SUFFIXES and file.is_file()


def read_image(path: Path | str) -> Pixels:
    """The image as a person would see it: upright, transparency over white. uint8 RGB [H, W, 3], contiguous.

    Of several frames the first is read, and the log says so. Colour profiles are applied to CMYK only:
    for RGB, training pipelines ignore them. Sets Pillow's own pixel limit to ours.
    Raises InfexportError, and nothing else, for whatever cannot be read or has no 8-bit equivalent.
    """
    limit = _pixel_limit()
    if limit != Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = limit
        # Pillow warns above the limit and refuses above twice that; we refuse above it, once and with a hint.
        warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    try:
        with Image.open(path, formats=[name for name in _FORMATS if name in Image.OPEN]) as image:
            if image.width * image.height > limit:
                raise _too_large(path, f"{image.height}x{image.width}", limit)
            # In an MPO what follows the photograph are its previews.
            if image.format != "MPO" and getattr(image, "is_animated", False):
                log.warning("%s has more than one frame; the first is used", path)
            image.load()
            rgb = _to_rgb(image, path)
            method = _UPRIGHT.get(_orientation(image, path))  # after load: Pillow turns TIFF upright itself
            return np.array(rgb if method is None else rgb.transpose(method))
    except _TOO_LARGE as error:
        raise _too_large(path, str(error), limit) from error
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


def fit(
    image: Pixels,
    patch_size: int,
    size: Literal["trained", "native"] | int,
    transform: EvalTransform,
    edge: Edge,
) -> Fitted:
    """Bring an image uint8 [H, W, 3] to sides that are multiples of patch_size.

    "native" keeps its resolution, "trained" applies the transform, a number applies transform.at(number).
    A side that is not whole patches is completed by replicating its last row or column (edge "pad", bottom
    and right), or cut down ("crop"). With nothing to do, the pixels are the caller's own array.
    Raises InfexportError if cutting leaves nothing, and for an array or a size it cannot take.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        details = f"received {image.dtype} {list(image.shape)}; expected uint8 [H, W, 3], not empty"
        raise InfexportError("not an RGB image array", details, "read files with read_image")
    height, width = image.shape[:2]
    if size != "native":
        transform = transform if size == "trained" else transform.at(size)
        height = width = transform.crop_size
        if height * width > _pixel_limit():
            raise _too_large("the resized image", f"{height}x{width}", _pixel_limit())
        image = _resize_and_crop(image, transform)
    patches = [(side + patch_size - 1 if edge == "pad" else side) // patch_size for side in (height, width)]
    if 0 in patches:
        details = f"received {height}x{width}; cropping needs at least {patch_size}x{patch_size}"
        raise InfexportError("image smaller than one patch", details, "use edge padding")
    return _complete(image, patches[0] * patch_size, patches[1] * patch_size)


def _complete(image: Pixels, height: int, width: int) -> Fitted:
    """Cut bottom and right, or replicate the last row and column, to exactly height x width."""
    image = np.ascontiguousarray(image[:height, :width])
    rows, columns = height - image.shape[0], width - image.shape[1]
    padded = height * width - image.shape[0] * image.shape[1]
    if padded:
        image = np.pad(image, ((0, rows), (0, columns), (0, 0)), mode="edge")
    return Fitted(image, padded / (height * width))


def _resize_and_crop(image: Pixels, transform: EvalTransform) -> Pixels:
    """torchvision's Resize and CenterCrop. A side that resizes to less than the crop stays shorter."""
    height, width = image.shape[:2]
    resize, crop = transform.resize_size, transform.crop_size
    if transform.resize_mode == "exact":
        new_h = new_w = resize
    else:
        long = int(resize * max(height, width) / min(height, width))
        new_h, new_w = (resize, long) if height <= width else (long, resize)
    kept_h, kept_w = min(new_h, crop), min(new_w, crop)
    top, left = round((new_h - kept_h) / 2), round((new_w - kept_w) / 2)
    resample = Image.Resampling[transform.interpolation.upper()]
    if new_h * new_w <= 4 * resize * resize:
        resized = Image.fromarray(image).resize((new_w, new_h), resample)
        return np.array(resized)[top : top + kept_h, left : left + kept_w]
    # A long strip: resized whole it may not fit in memory (1x5000 becomes 224x1120000), so only the part
    # the crop needs is. Always columns first: Pillow's own order of the two passes, which shows where the
    # first one clips, depends on the sizes and on its version.
    rows, from_y, to_y = _needed(height, new_h, top, kept_h)
    columns, from_x, to_x = _needed(width, new_w, left, kept_w)
    part = Image.fromarray(np.ascontiguousarray(image[rows, columns]))
    part = part.resize((kept_w, part.height), resample, box=(from_x, 0, to_x, part.height))
    return np.array(part.resize((kept_w, kept_h), resample, box=(0, from_y, kept_w, to_y)))


def _needed(length: int, new_length: int, start: int, kept: int) -> tuple[slice, float, float]:
    """What decides [start, start + kept) of a side resized to new_length: source pixels, a box in them."""
    scale = length / new_length
    first, last = start * scale, (start + kept) * scale
    reach = 4 * max(scale, 1)  # Lanczos, the widest filter, sees 3 source pixels, or 3 output pixels' worth
    low, high = max(0, math.floor(first - reach)), min(length, math.ceil(last + reach))
    return slice(low, high), first - low, last - low


def _to_rgb(image: Image.Image, path: Path | str) -> Image.Image:
    if image.mode == "F":
        raise _no_8_bit(path, "floating-point pixels")
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _grey_16_bit(image, path).convert("RGB")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    if image.mode == "CMYK" and image.info.get("icc_profile"):
        try:
            inks = ImageCms.ImageCmsProfile(BytesIO(image.info["icc_profile"]))
            transform = ImageCms.buildTransform(inks, ImageCms.createProfile("sRGB"), "CMYK", "RGB")
            return transform.apply(image)
        except (ImageCms.PyCMSError, OSError) as error:
            log.warning("%s: its colour profile cannot be used (%s); converted without", path, error)
    return image.convert("RGB")


def _grey_16_bit(image: Image.Image, path: Path | str) -> Image.Image:
    """To 8 bits by scaling; Pillow's own convert clips at 255."""
    values = np.asarray(image)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise _no_8_bit(path, f"32-bit integers from {low} to {high}")
    tags = getattr(image, "tag_v2", {})
    white = 4095 if tags.get(_TIFF_BITS) == (12,) else 65535  # Pillow unpacks 12-bit TIFF without scaling it
    grey = ((values.astype(np.uint32) * 255 + white // 2) // white).astype(np.uint8)
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


def _pixel_limit() -> int:
    text = os.environ.get(MAX_PIXELS_VARIABLE)
    if text is None:
        return MAX_PIXELS
    if not text.isdecimal() or int(text) < 1:
        details = f"received {text!r}; expected a whole number, at least 1"
        raise InfexportError(f"{MAX_PIXELS_VARIABLE} is not a number of pixels", details)
    return int(text)


def _too_large(what: Path | str, received: str, limit: int) -> InfexportError:
    details = f"received {received}; expected at most {limit} pixels"
    hint = f"set {MAX_PIXELS_VARIABLE} higher if you trust it and have the memory"
    return InfexportError(f"too many pixels: {what}", details, hint)


def _no_8_bit(path: Path | str, received: str) -> InfexportError:
    details = f"received {received}; expected 8-bit or 16-bit integers"
    hint = "scale the image to 8 or 16 bits and save it again"
    return InfexportError(f"pixel values without a known range: {path}", details, hint)


def _bad_transform(received: str, expected: str) -> InfexportError:
    details = f"received {received}; expected {expected}"
    hint = "see preprocessing in the bundle's infexport.json"
    return InfexportError("evaluation transform not understood", details, hint)
