"""The evaluation transform, and images brought to whole patches."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from infexport.errors import InfexportError
from infexport.images.decode import Pixels, pixel_limit, too_large
from infexport.images.transform import EvalTransform, Preprocessing

Edge = Literal["pad", "crop"]


@dataclass(frozen=True, eq=False)
class Fitted:
    """An image whose sides are multiples of the patch."""

    pixels: Pixels  # uint8 [H', W', 3]
    padded_share: float  # replicated pixels / all pixels, in [0, 1)


def normalise(images: NDArray[np.uint8], preprocessing: Preprocessing) -> NDArray[np.float32]:
    """Return normalised pixels `[B, 3, H, W]` of images `[B, H, W, 3]`, as the graph does it for uint8 input."""
    mean = np.asarray(preprocessing.mean, np.float32)
    std = np.asarray(preprocessing.std, np.float32)
    pixels = (images.astype(np.float32) / 255 - mean) / std
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))


def check_whole_patches(height: int, width: int, patch: int) -> None:
    """Refuse a size asked for by `--sizes` whose sides are no multiples of the patch, in pixels.

    Raises:
        InfexportError: names the nearest that would do.
    """
    if height % patch or width % patch:
        nearest = (max(1, round(side / patch)) * patch for side in (height, width))
        raise InfexportError(
            f"size {height}x{width} is not a whole number of patches",
            f"the patch is {patch} pixels",
            f"for example --sizes {'x'.join(map(str, nearest))}",
        )


def fit(
    image: Pixels,
    patch_size: int,
    size: Literal["trained", "native"] | int,
    transform: EvalTransform,
    edge: Edge,
) -> Fitted:
    """Bring an image uint8 [H, W, 3] to sides that are multiples of patch_size.

    With nothing to do, the pixels are the caller's own array.

    Args:
        image: uint8 RGB, `[H, W, 3]`.
        patch_size: side of a patch, in pixels.
        size: `native` keeps the resolution, `trained` applies the transform, a number applies `transform.at(number)`.
        transform: the recorded evaluation transform.
        edge: a side that is not whole patches is completed by replicating its last row or column (`pad`, bottom and
            right), or cut down (`crop`).

    Raises:
        InfexportError: cutting leaves nothing, or an array or a size it cannot take.
    """
    image = resized(image, size, transform)
    height, width = image.shape[:2]
    rows, columns = patch_grid(height, width, patch_size, edge)
    return _complete(image, rows * patch_size, columns * patch_size)


def resized(image: Pixels, size: Literal["trained", "native"] | int, transform: EvalTransform) -> Pixels:
    """Apply the transform alone, the first half of `fit`; the sides need not be whole patches.

    Raises:
        InfexportError: an array or a size it cannot take.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        details = f"received {image.dtype} {list(image.shape)}; expected uint8 [H, W, 3], not empty"
        raise InfexportError("not an RGB image array", details, "read files with read_image")
    if size == "native":
        return image
    transform = transform if size == "trained" else transform.at(size)
    side = transform.crop_size
    if side * side > pixel_limit():
        raise too_large("the resized image", f"{side}x{side}", pixel_limit())
    return _resize_and_crop(image, transform)


def patch_grid(height: int, width: int, patch_size: int, edge: Edge) -> tuple[int, int]:
    """Return the patches along both sides of an image, the last ones completed (`pad`) or cut off (`crop`).

    Raises:
        InfexportError: cutting leaves nothing.
    """
    rows, columns = ((side + patch_size - 1 if edge == "pad" else side) // patch_size for side in (height, width))
    if not rows or not columns:
        details = f"received {height}x{width}; cropping needs at least {patch_size}x{patch_size}"
        raise InfexportError("image smaller than one patch", details, "--edge pad completes it")
    return rows, columns


def window(
    image: tuple[int, int], size: Literal["trained", "native"] | int, transform: EvalTransform
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return the part of an image that `resized` keeps: top and left, and source pixels per pixel of the result.

    Args:
        image: height and width in pixels.
        size, transform: see `fit`.
    """
    if size == "native":
        return (0, 0), (1, 1)
    new, start, _ = _resize(*image, transform if size == "trained" else transform.at(size))
    down, across = (old / made for old, made in zip(image, new, strict=True))
    return (start[0] * down, start[1] * across), (down, across)


def _complete(image: Pixels, height: int, width: int) -> Fitted:
    """Cut bottom and right, or replicate the last row and column, to exactly height x width."""
    image = np.ascontiguousarray(image[:height, :width])
    rows, columns = height - image.shape[0], width - image.shape[1]
    padded = height * width - image.shape[0] * image.shape[1]
    if padded:
        image = np.pad(image, ((0, rows), (0, columns), (0, 0)), mode="edge")
    return Fitted(image, padded / (height * width))


def _resize(
    height: int, width: int, transform: EvalTransform
) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Return the sides of the resized image, top and left of the crop, and the sides of the crop."""
    resize, crop = transform.resize_size, transform.crop_size
    if transform.resize_mode == "exact":
        new_h = new_w = resize
    else:
        long = int(resize * max(height, width) / min(height, width))
        new_h, new_w = (resize, long) if height <= width else (long, resize)
    kept_h, kept_w = min(new_h, crop), min(new_w, crop)
    return (new_h, new_w), (round((new_h - kept_h) / 2), round((new_w - kept_w) / 2)), (kept_h, kept_w)


def _resize_and_crop(image: Pixels, transform: EvalTransform) -> Pixels:
    """torchvision's Resize and CenterCrop. A side that resizes to less than the crop stays shorter."""
    height, width = image.shape[:2]
    (new_h, new_w), (top, left), (kept_h, kept_w) = _resize(height, width, transform)
    resize = transform.resize_size
    resample = Image.Resampling[transform.interpolation.upper()]
    if new_h * new_w <= min(4 * resize * resize, pixel_limit()):
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
    """Return the source pixels that decide [start, start + kept) of a side resized to new_length, and a box in them."""
    scale = length / new_length
    first, last = start * scale, (start + kept) * scale
    reach = 4 * max(scale, 1)  # Lanczos, the widest filter, sees 3 source pixels, or 3 output pixels' worth
    low, high = max(0, math.floor(first - reach)), min(length, math.ceil(last + reach))
    return slice(low, high), first - low, last - low
