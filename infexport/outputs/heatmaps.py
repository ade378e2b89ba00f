"""Heat maps: the centrality of tokens drawn over their image."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from infexport.errors import InfexportError
from infexport.images.decode import DRAWN_BY, Pixels, is_drawn
from infexport.images.fetch import local_copy
from infexport.images.preprocess import window
from infexport.images.strips import open_rows
from infexport.images.transform import EvalTransform
from infexport.inference.centrality import Centrality
from infexport.inference.options import Detail, Size
from infexport.outputs.files import check_apart, check_folder, drawing_errors, written
from infexport.system.dependencies import require
from infexport.system.urls import name_of_url

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from infexport.bundle import Bundle
    from infexport.inference.prediction import Prediction

OVERVIEW = 1024
"""Maximum side, in pixels, of the image under a map."""
COLOURS = "viridis"
"""Colour map: perceptually uniform, and safe for colour-blind readers."""
ELSEWHERE = "choose another --heatmaps folder"
DPI, LAYERS_PER_ROW = 150, 4
GREY = np.array([0.299, 0.587, 0.114])
"""Weights of red, green and blue in grey (ITU-R BT.601)."""
ALPHA = 0.6
"""Opacity of a map over its image."""
ASPECT = 12
"""Ratio of sides above which the shorter side is drawn larger, since it would look like a line."""


def overview(file: Path) -> tuple[Pixels, tuple[int, int]]:
    """Reduce an image of any size, by averaging, to at most OVERVIEW pixels a side.

    Returns:
        The overview, uint8 `[h, w, 3]`, and the image's height and width.

    Raises:
        InfexportError: it cannot be read.
    """
    rows = open_rows(file)
    factor = -(-max(rows.height, rows.width) // OVERVIEW)
    # equal parts, as they are drawn: a last part of a few pixels would shift all others in a narrow image
    edges, columns = (_edges(side, -(-side // factor)) for side in (rows.height, rows.width))
    counts = np.diff(columns)[:, None]
    found = []
    for start, stop in itertools.pairwise(edges.tolist()):
        strip = rows.read(start, stop)
        sums = np.add.reduceat(strip.sum(0, dtype=np.float64), columns[:-1], axis=0)
        found.append(np.round(sums / (counts * len(strip))).astype(np.uint8))
    return np.stack(found), (rows.height, rows.width)


def _edges(side: int, parts: int) -> NDArray[np.intp]:
    """Return the `parts + 1` edges, in whole pixels, of equal parts of a side."""
    return np.arange(parts + 1) * side // parts


def region(
    image: tuple[int, int],
    grid: tuple[int, int],
    patch: int,
    size: Literal["trained", "native"] | int,
    transform: EvalTransform,
) -> tuple[float, float, float, float]:
    """Return the region of an image that a grid of patches covers, as matplotlib's extent.

    Args:
        image: height and width of the image in pixels.
        grid: patches, `(height, width)`; a padded grid extends beyond the image.
        patch: side of a patch, in pixels of the resized image.
        size, transform: how the image was resized.

    Returns:
        Left, right, bottom and top, in pixels of the image.
    """
    (top, left), scales = window(image, size, transform)
    height, width = (side * patch * scale for side, scale in zip(grid, scales, strict=True))
    return left, left + width, top + height, top


def draw_figure(
    centrality: Centrality,
    pixels: Pixels,
    image: tuple[int, int],
    extent: tuple[float, float, float, float],
    title: str,
    detail: Detail = "mean",
) -> Figure:
    """Draw maps over the image in grey.

    Args:
        centrality: centrality of the image's tokens.
        pixels: the image, or an overview of it, uint8 `[h, w, 3]`.
        image: height and width of the full image in pixels.
        extent: extent of the grid, see `region`.
        title: title of the figure.
        detail: `mean` draws one map of all layers and heads next to the image; `layers` draws a map per layer; `heads`
            draws a map per head.
    """
    from matplotlib.figure import Figure

    maps = _maps(centrality, detail)
    with_image = detail == "mean"
    columns = 2 if with_image else min(len(maps), LAYERS_PER_ROW if detail == "layers" else centrality.cells.shape[1])
    rows, side = -(-len(maps) // columns), 4.5 if with_image else 2.4
    tall, wide = (side * max(length / max(image), 1 / ASPECT) for length in image)
    # no finer than the panel, whose pixels would not show it
    height, width = (min(length, round(side * DPI / 2)) for length in centrality.grid)
    figure = Figure((columns * (wide + 0.75), rows * (tall + 0.45) + 0.5), dpi=DPI, layout="constrained")
    figure.suptitle(title, fontsize=10, parse_math=False)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    if with_image:
        axes[0].imshow(pixels, extent=(0, image[1], image[0], 0))
        _bare(axes.pop(0), image)
    grey = np.round(pixels @ GREY).astype(np.uint8)
    if fine := int(max(grey.shape) // (side * DPI)):
        grey = grey[::fine, ::fine]  # every panel holds a copy
    for one, (name, cells) in zip(axes, maps, strict=False):
        values = centrality.raster(cells, (height, width))
        one.imshow(grey, extent=(0, image[1], image[0], 0), cmap="gray", vmin=0, vmax=255)
        look: Any = {"cmap": COLOURS, "alpha": ALPHA, "interpolation": "nearest", "vmin": 0, "vmax": _top(values)}
        bar = figure.colorbar(one.imshow(values, extent=extent, **look), ax=one, shrink=0.85, pad=0.02)
        bar.ax.tick_params(labelsize=8 if with_image else 7)
        bar.set_label("times the average patch" if with_image else "", fontsize=8)
        one.set_title(name, fontsize=8)
        _bare(one, image)
    for one in axes[len(maps) :]:
        one.remove()
    return figure


def overlay(centrality: Centrality, pixels: Pixels) -> tuple[Pixels, float]:
    """Draw the map of all layers and heads over a picture in grey.

    Args:
        centrality: centrality of the image's tokens.
        pixels: the region that the grid covers, at any size, uint8 `[h, w, 3]`.

    Returns:
        The picture, uint8 `[h, w, 3]`, and the map's largest value, which has the last colour.
    """
    from matplotlib import colormaps

    ((_, cells),) = _maps(centrality, "mean")
    values = centrality.raster(cells, (pixels.shape[0], pixels.shape[1]))
    top = _top(values)
    colours = colormaps[COLOURS](values / top)[..., :3] * 255
    mixed = ALPHA * colours + (1 - ALPHA) * (pixels @ GREY)[..., None]
    return np.round(mixed).astype(np.uint8), top


def save(figure: Figure, file: Path) -> None:
    """Write a figure as PNG; the same figure gives the same bytes.

    Raises:
        InfexportError: it cannot be written.
    """
    with written(file, "heat map", ELSEWHERE) as stream:
        figure.savefig(stream, format="png", metadata={"Software": DRAWN_BY})


class HeatmapWriter:
    """Draws the heat map of every prediction, as `<name>.png` in a folder.

    Args:
        bundle: the bundle that is run.
        files: the images, as files or URLs.
        size: size of the images in the run's options.
        folder: folder for the heat maps.
        detail: see `draw_figure`.

    Attributes:
        failed: an error for every heat map that could not be drawn; its prediction is valid.
        drawn: number of heat maps drawn.

    Raises:
        InfexportError: the folder cannot be written to, or a heat map would replace an image, or a file that is not a
            heat map.
    """

    def __init__(
        self, bundle: Bundle, files: Sequence[Path | str], size: Size, folder: Path, detail: Detail = "mean"
    ) -> None:
        require("matplotlib", extra="plot")
        check_folder(folder, "heat map", ELSEWHERE)
        self._bundle, self._images, self._size, self._detail = bundle, files, size, detail
        names = file_names([file if isinstance(file, Path) else Path(name_of_url(file)) for file in files])
        self._pictures = [folder / f"{name}.png" for name in names]
        check_apart(dict.fromkeys(self._pictures, "heat map"), files, ELSEWHERE)
        for picture in self._pictures:
            if os.path.lexists(picture) and not is_drawn(picture):
                raise InfexportError(f"the heat map would replace another kind of file: {picture}", hint=ELSEWHERE)
        self.failed: list[InfexportError] = []
        self.drawn = 0

    def on_prediction(self, index: int, prediction: Prediction) -> None:
        """Draw the heat map of the image at this index."""
        try:
            with drawing_errors(self._pictures[index], "heat map"):
                self._draw(index, prediction)
            self.drawn += 1
        except InfexportError as error:
            self.failed.append(error)

    def _draw(self, index: int, prediction: Prediction) -> None:
        assert prediction.centrality is not None, "the run computes it"
        (top,) = prediction.top_k(1, self._bundle.labels)
        image = self._images[index]
        name = Path(prediction.file if isinstance(image, Path) else name_of_url(image)).stem
        title = f"{name}: {top['label']}, {top['probability']:.1%}"
        with local_copy(image) as file:
            pixels, sides = overview(file)
        transform = self._bundle.manifest.preprocessing.transform
        extent = region(sides, prediction.grid, self._bundle.manifest.config.patch_size, self._size, transform)
        figure = draw_figure(prediction.centrality, pixels, sides, extent, title, self._detail)
        save(figure, self._pictures[index])
        figure.clear()  # frees it now: its parts refer to each other


def file_names(files: Sequence[Path]) -> list[str]:
    """Return a unique name without suffix for every image: its own, with a number if it is taken."""
    names: dict[str, None] = {}  # in order
    for file in files:
        others = (f"{file.stem}-{number}" for number in itertools.count(2))
        names[next(name for name in itertools.chain([file.stem], others) if name not in names)] = None
    return list(names)


def _maps(centrality: Centrality, detail: Detail) -> list[tuple[str, NDArray[Any]]]:
    """Return names and maps of cells, `[rows, columns]`, in units of the average patch."""
    shares, times = centrality.shares, centrality.times_average
    if detail == "mean":
        return [("", times(shares.mean((0, 1))))]
    if detail == "layers":
        return [(f"layer {layer}", values) for layer, values in enumerate(times(shares.mean(1)))]
    heads = (((layer, head), values) for layer, of in enumerate(times(shares)) for head, values in enumerate(of))
    return [(f"layer {layer}, head {head}", values) for (layer, head), values in heads]


def _top(values: NDArray[Any]) -> float:
    return float(values.max()) or 1.0


def _bare(axes: Axes, image: tuple[int, int]) -> None:
    thin = max(image) > ASPECT * min(image)
    axes.set(xlim=(0, image[1]), ylim=(image[0], 0), xticks=[], yticks=[], aspect="auto" if thin else "equal")
    if thin:
        axes.set_xlabel(f"not to scale: the image is {image[1]} x {image[0]} pixels", fontsize=6)
