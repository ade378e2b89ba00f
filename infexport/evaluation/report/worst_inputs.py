"""The inputs with the largest errors, as pictures: what is on them, both answers, and where the network looks."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from infexport.bundle import Bundle
from infexport.bundle.manifest import CENTRALITY_MODEL
from infexport.errors import InfexportError
from infexport.evaluation.parity.result import Case, Logits, ParityResult
from infexport.evaluation.report.order import worst_first
from infexport.evaluation.synthetic_images import MANY, synthetic_batch
from infexport.images.decode import Pixels, read_image
from infexport.images.preprocess import fit
from infexport.images.strips import ArrayRows, Source
from infexport.inference.centrality import CENTRALITY, Centrality, centrality_from_tokens
from infexport.inference.prediction import top_k
from infexport.inference.runners.factory import RunnerFactory
from infexport.inference.streaming import stream
from infexport.outputs.heatmaps import overlay

MOST, SIDE, ANSWERS = 4, 400, 3
"""Inputs, pixels along a picture, and classes of an answer."""
LOSSLESS = 2**14
"""Bytes: a picture that takes more as PNG is a photograph, which is smaller as JPEG."""


@dataclass(frozen=True)
class Example:
    """One image of an input.

    Attributes:
        case: the input.
        which: of its images, counted from 1.
        picture: as a `data:` address.
        small: its pixels are to be seen.
        heat: the same with its centrality over it; empty where there is none.
        top: the map's largest value, times the average patch.
        missing: why there is no map.
        answers: classes of the bundle and of the truth, the likeliest first; none where they are not finite.
        difference: the largest of a logit, and of which class.
    """

    case: Case
    which: int
    picture: str
    small: bool
    heat: str
    top: float
    missing: str
    answers: tuple[list[dict[str, Any]], list[dict[str, Any]]]
    difference: tuple[float, str]


def find_examples(report: ParityResult, bundle: Bundle, threads: int | None = None) -> list[Example]:
    """The worst inputs, of each the image that is off most.

    Args:
        report: what was found.
        bundle: what was judged: it is run again for centrality, in ONNX Runtime on the CPU.
        threads: of ONNX Runtime.
    """
    cases = worst_first(report.cases)[:MOST]
    rows = [int(np.nan_to_num(np.abs(case.logits - case.truth), nan=np.inf).max(-1).argmax()) for case in cases]
    pixels = [_pixels(case, row, bundle) for case, row in zip(cases, rows, strict=True)]
    maps = _centralities(bundle, pixels, threads)
    return [_example(*each, bundle.labels) for each in zip(cases, rows, pixels, maps, strict=True)]


def _pixels(case: Case, row: int, bundle: Bundle) -> Pixels:
    """Return the pixels that were run."""
    patch = bundle.manifest.config.patch_size
    if case.file is None:
        _, height, width, _ = case.shape
        return synthetic_batch(height, width, patch)[row]
    return fit(read_image(case.file), patch, "native", bundle.manifest.preprocessing.transform, "pad").pixels


def _centralities(bundle: Bundle, images: Sequence[Pixels], threads: int | None) -> list[Centrality | str]:
    """Return the centrality of every image, or the reason why there is none."""
    if CENTRALITY_MODEL not in bundle.manifest.files:
        return ["this bundle does not give centrality"] * len(images)
    patch, found = bundle.manifest.config.patch_size, list[Centrality | str]()
    opening, whole = RunnerFactory(bundle, "cpu", threads=threads, centrality=True), None
    with ExitStack() as stack:
        for pixels in images:
            grid = pixels.shape[0] // patch, pixels.shape[1] // patch
            try:
                if math.prod(grid) <= MANY:
                    whole = whole or stack.enter_context(opening.runner())
                    centrality = centrality_from_tokens(whole.run(pixels[None])[CENTRALITY][0], grid)
                elif bundle.manifest.stages:
                    source = Source(ArrayRows(pixels), patch, "pad")
                    with opening.stages() as stages:
                        streamed = stream(bundle, stages, source, centrality=True).centrality
                    assert streamed is not None, "it was asked for"
                    centrality = streamed
                else:
                    raise InfexportError("the image has many tokens, and the bundle has no stages to stream it through")
                found.append(centrality if np.isfinite(centrality.cells).all() else "its centrality is not finite")
            except InfexportError as error:
                found.append(error.summary)
    return found


def _example(case: Case, row: int, pixels: Pixels, centrality: Centrality | str, labels: list[str] | None) -> Example:
    picture = _scaled(pixels)
    heat, top = ("", 0.0) if isinstance(centrality, str) else _heat(centrality, picture)
    off = np.abs(case.logits[row] - case.truth[row])
    most = int(np.nan_to_num(off, nan=np.inf).argmax())
    return Example(
        case=case,
        which=row + 1,
        picture=_address(picture),
        small=max(pixels.shape) < SIDE,
        heat=heat,
        top=top,
        missing=centrality if isinstance(centrality, str) else "",
        answers=(_answer(case.logits[row], labels), _answer(case.truth[row], labels)),
        difference=(float(off[most]), labels[most] if labels else str(most)),
    )


def _answer(logits: Logits, labels: list[str] | None) -> list[dict[str, Any]]:
    return top_k(logits, ANSWERS, labels) if np.isfinite(logits).all() else []


def _heat(centrality: Centrality, picture: Pixels) -> tuple[str, float]:
    pixels, top = overlay(centrality, picture)
    return _address(pixels), top


def _scaled(pixels: Pixels) -> Pixels:
    image = Image.fromarray(np.ascontiguousarray(pixels))
    image.thumbnail((SIDE, SIDE), Image.Resampling.BOX)
    return np.array(image)


def _address(pixels: Pixels) -> str:
    image, buffer, kind = Image.fromarray(pixels), io.BytesIO(), "png"
    image.save(buffer, "PNG", optimize=True)
    if buffer.tell() > LOSSLESS:
        buffer, kind = io.BytesIO(), "jpeg"
        image.save(buffer, "JPEG", quality=85)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
