"""Preprocessing of images in training, as far as a config states it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from infvit.checkpoint.settings import Setting, Source, equal
from infvit.errors import CheckpointError

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")
RESIZE_MODES = ("shortest", "exact")
# A config with one of these is Hugging Face's image processor.
_IMAGE_PROCESSOR = ("image_mean", "image_std", "do_normalize", "do_resize", "image_processor_type")
# PIL.Image.Resampling, which Hugging Face stores as a number.
_RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}


def read_preprocessing(sources: Iterable[Source]) -> tuple[dict[str, Any], list[str]]:
    """Read the preprocessing stated by `sources`, the first source winning key by key.

    Returns:
        The values found: `mean` and `std` (3 floats each, for pixels in [0, 1]), `resize_mode`,
        `resize_size`, `crop_size`, `interpolation`. And a sentence for each that another source contradicts.

    Raises:
        CheckpointError: a value that cannot be used.
    """
    merged, overridden = _merge(sources)
    for key, setting in merged.items():
        accepts, expected = _CHECKS[key]
        if not accepts(setting.value):
            raise CheckpointError(f"cannot use {setting}", f"expected: {expected}", "Set it in --config FILE.")
    read = {
        key: tuple(float(x) for x in setting.value) if key in ("mean", "std") else setting.value
        for key, setting in merged.items()
    }
    return read, overridden


def _merge(sources: Iterable[Source]) -> tuple[dict[str, Setting], list[str]]:
    """Merge the statements of `sources`, not yet checked."""
    merged: dict[str, Setting] = {}
    overridden = []
    for source in sources:
        for read in (_under_our_names, _from_hugging_face, _from_timm):
            found = read(source.values)
            for key in _CHECKS:
                if found.get(key) is None:
                    continue
                setting = Setting(found[key], key, source)
                winner = merged.setdefault(key, setting)
                if not equal(winner.value, setting.value):
                    overridden.append(f"{winner.short} is used, not {setting.short}")
    return merged, overridden


def _under_our_names(values: Mapping[str, Any]) -> dict[str, Any]:
    found = {key: values.get(key) for key in _CHECKS}
    # Hugging Face has the same name, a switch for it, and since 4.21 an object.
    if isinstance(found["crop_size"], Mapping) or not values.get("do_center_crop", True):
        del found["crop_size"]
    return found


def _from_hugging_face(values: Mapping[str, Any]) -> dict[str, Any]:
    """Read the fields of an image processor (`preprocessor_config.json`)."""
    found: dict[str, Any] = {}
    if not any(key in values for key in _IMAGE_PROCESSOR):
        return found  # `size` and `resample` may mean anything elsewhere
    mean, std = values.get("image_mean"), values.get("image_std")
    if values.get("do_normalize") is False:
        mean, std = (0.0,) * 3, (1.0,) * 3
    # Theirs is (pixel · factor - mean) / std for pixels in 0…255; ours takes pixel / 255.
    factor = values.get("rescale_factor")
    if values.get("do_rescale") is False:
        factor = 1.0
    elif factor is None:
        factor = 1 / 255
    scale = 255 * factor if type(factor) in (int, float) and 1e-9 < factor < 1e9 else math.nan
    if mean is not None and std is not None:
        exact = math.isclose(scale, 1.0)
        found["mean"] = mean if exact else _scaled(mean, scale)
        found["std"] = std if exact else _scaled(std, scale)
    if values.get("do_resize") is not False:  # null is "not set", and then it is done
        size = values.get("size")
        if isinstance(size, Mapping) and "shortest_edge" in size:
            found |= {"resize_mode": "shortest", "resize_size": size["shortest_edge"]}
        elif size is not None:
            found |= {"resize_mode": "exact", "resize_size": _side(size)}
        resample = values.get("resample")
        found["interpolation"] = _RESAMPLE.get(resample, resample) if isinstance(resample, int) else resample
    if isinstance(values.get("crop_size"), Mapping) and values.get("do_center_crop", True):
        found["crop_size"] = _side(values["crop_size"])
    return found


def _from_timm(values: Mapping[str, Any]) -> dict[str, Any]:
    """Read the `pretrained_cfg` of a timm `config.json` (`timm.data.create_transform`)."""
    values = values.get("pretrained_cfg", {})
    if not isinstance(values, Mapping):
        return {}
    found = {"mean": values.get("mean"), "std": values.get("std")}
    found["interpolation"] = values.get("interpolation") or None  # timm's default is ""
    size, share = values.get("input_size"), values.get("crop_pct")
    modes = {"center": "shortest", "squash": "exact"}
    mode = modes.get(str(values.get("crop_mode", "center")))
    if mode is None or not isinstance(size, list) or not isinstance(share, int | float):
        return found
    if len(size) == 3 and _positive(size[1]) and size[1] == size[2] and 0.01 < share <= 1:
        found |= {"resize_mode": mode, "resize_size": math.floor(size[1] / share), "crop_size": size[1]}
    return found


def _side(size: Any) -> Any:
    """The side of a square `{"height": n, "width": n}`; anything else as it is, to be judged later."""
    square = isinstance(size, Mapping) and size.get("height") == size.get("width")
    return size.get("height") if square else size


def _scaled(values: Any, scale: float) -> Any:
    return [value / scale for value in values] if _three(values) else values


def _three(values: Any) -> bool:
    return (
        isinstance(values, list | tuple)
        and len(values) == 3
        and all(type(value) in (int, float) and abs(value) < 1e9 for value in values)
    )


def _three_positive(values: Any) -> bool:
    return _three(values) and min(values) > 1e-9  # what is divided by less is not finite in float32


def _positive(value: Any) -> bool:
    return type(value) is int and 0 < value < 1_000_000


_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "mean": (_three, "3 numbers"),
    "std": (_three_positive, "3 numbers above 1e-9"),
    "resize_mode": (lambda value: value in RESIZE_MODES, f"one of {', '.join(RESIZE_MODES)}"),
    "resize_size": (_positive, "a whole number of pixels above 0; images are trained square"),
    "crop_size": (_positive, "a whole number of pixels above 0; images are trained square"),
    "interpolation": (lambda value: value in INTERPOLATIONS, f"one of {', '.join(INTERPOLATIONS)}"),
}
