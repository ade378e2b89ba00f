"""Everything a run writes: its output file, the centrality in it, and heat maps."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from infexport.bundle import Bundle
from infexport.bundle.summary import bundle_warnings
from infexport.errors import InfexportError
from infexport.inference.options import Detail, Size
from infexport.inference.prediction import ImageResult, Prediction
from infexport.outputs.files import check_apart
from infexport.outputs.heatmaps import HeatmapWriter
from infexport.outputs.results import CentralityFile, Results, check_output, keep_elsewhere


@dataclass(frozen=True)
class OutputOptions:
    """Options of the files that a run writes.

    Attributes:
        output: a .json, .csv, .npz or .parquet file; None writes none.
        top_k: classes per image.
        features: write the features, too.
        centrality: write the centrality of tokens, too; `output` must be an .npz file.
        heatmaps: folder for the heat maps; None draws none.
        detail: layers and heads that one heat map combines.
    """

    output: Path | None = None
    top_k: int = 5
    features: bool = False
    centrality: bool = False
    heatmaps: Path | None = None
    detail: Detail = "mean"


class ResultsWriter:
    """Writes centrality and heat maps while a run is in progress, and its results when it ends.

    The constructor checks that everything can be written. Use as a context manager around the run: leaving it deletes
    an output that is not complete.

    Args:
        bundle: the bundle that is run.
        files: the images, as files or URLs.
        size: size of the images in the run's options.
        options: the files to write.

    Attributes:
        drawn: number of heat maps drawn.
        undrawn: an error for every heat map that could not be drawn.

    Raises:
        InfexportError: a place cannot be written to, or an output would replace an input.
    """

    def __init__(self, bundle: Bundle, files: Sequence[Path | str], size: Size, options: OutputOptions) -> None:
        self._bundle, self._options = bundle, options
        self._heatmaps: HeatmapWriter | None = None
        if options.heatmaps is not None:
            self._heatmaps = HeatmapWriter(bundle, files, size, options.heatmaps, options.detail)
        if options.output is not None:
            check_output(options.output)
            check_apart({options.output: "output"}, files, "choose another --output")
        self._centrality: CentralityFile | None = None
        self._stack = ExitStack()

    def __enter__(self) -> ResultsWriter:
        if self._options.centrality and self._options.output is not None:
            self._centrality = self._stack.enter_context(closing(CentralityFile(self._options.output)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def drawn(self) -> int:
        return self._heatmaps.drawn if self._heatmaps else 0

    @property
    def undrawn(self) -> list[InfexportError]:
        return self._heatmaps.failed if self._heatmaps else []

    def on_prediction(self, index: int, prediction: Prediction) -> None:
        """Draw and write the centrality of the image at this index."""
        for writer in (self._heatmaps, self._centrality):
            if writer is not None:
                writer.on_prediction(index, prediction)

    def results(self, rows: Sequence[ImageResult]) -> Results:
        """Return the results of a run from a prediction or a failure for every image, in order."""
        config = self._bundle.manifest.config
        return Results(
            rows,
            self._bundle.labels,
            bundle_warnings(self._bundle.manifest),
            self._options.top_k,
            self._options.features,
            (config.num_classes, config.embed_dim),
        )

    def write(self, results: Results) -> InfexportError | None:
        """Write the output, if there is one; where that fails, keep a copy in a temporary folder.

        Returns:
            The error, whose hint names the copy; None if nothing failed.
        """
        output = self._options.output
        if output is None:
            return None
        try:
            results.write(output) if self._centrality is None else self._centrality.write(results)
            return None
        except InfexportError as error:
            copy = keep_elsewhere(output, results)
            without = " without centrality" if self._centrality else ""
            hint = f"the predictions{without} are in {copy}" if copy else error.hint
            return InfexportError(error.summary, error.details, hint)
