"""`infexport run-engine`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from infexport.cli.console import Output
from infexport.cli.options import (
    Address,
    ImageName,
    batch_size_option,
    chunk_option,
    edge_option,
    execution_option,
    memory_option,
    pick,
    size_option,
    threads_option,
)
from infexport.cli.providers import engine_option, provider_option
from infexport.errors import InfexportError

if TYPE_CHECKING:
    from infexport.bundle import Bundle
    from infexport.inference.options import Detail, Edge, Execution, InferenceOptions, TokenDtype
    from infexport.inference.options import Size as ImageSize
    from infexport.inference.prediction import ImageResult, Prediction
    from infexport.outputs.results import Results
    from infexport.outputs.writer import OutputOptions, ResultsWriter
    from infexport.system.progress import ProgressListener

DETAILS = ("mean", "layers", "heads")


@dataclass(frozen=True, kw_only=True)
class RunArguments:
    """Arguments of `run-engine` as click has parsed them; each field is an option or argument of that name."""

    bundle: Path
    images: tuple[Path | str, ...]
    output: Path | None
    digest: str | None
    size: ImageSize
    edge: Edge
    top_k: int
    features: bool
    heatmaps: Path | None
    heatmap_detail: Detail | None
    centrality: bool
    execution: Execution
    memory: int | None
    chunk: int | None
    tokens: TokenDtype
    scratch: Path | None
    clean: bool
    provider: str
    engine: str | None
    batch_size: int
    threads: int | None
    address: str | None
    shard_image: bool
    workers: int | None
    as_json: bool

    def check(self) -> None:
        """Refuse options that contradict each other.

        Raises:
            click.UsageError: two options exclude each other, or one lacks the other that it needs.
        """
        if self.features and not (self.output or self.as_json):
            raise click.UsageError("--features needs --output FILE or --json: there is nowhere to write them")
        if self.centrality and (self.output is None or self.output.suffix.lower() != ".npz"):
            raise click.UsageError("--centrality needs --output FILE.npz: it is too much for text")
        if self.heatmap_detail is not None and self.heatmaps is None:
            raise click.UsageError("--heatmap-detail needs --heatmaps DIR: there is nowhere to draw")
        if not self.images and not self.clean:
            raise click.UsageError("missing argument 'IMAGES...': files, folders or URLs")
        if self.address is None and (self.shard_image or self.workers):
            raise click.UsageError("--shard-image and --workers need --ray")
        if self.address is not None and (self.heatmaps or self.centrality):
            raise click.UsageError("--heatmaps and --centrality need a single process: leave out --ray")
        if self.shard_image and (self.scratch is not None or self.execution == "whole"):
            raise click.UsageError(
                "--shard-image streams, with tokens in memory: leave out --scratch and --execution whole"
            )

    def inference_options(self) -> InferenceOptions:
        from infexport.inference.options import InferenceOptions

        return pick(
            InferenceOptions,
            vars(self),
            execution="stream" if self.shard_image else self.execution,
            centrality=self.centrality or self.heatmaps is not None,
            drawing=None if self.heatmaps is None else self.heatmap_detail or "mean",
        )

    def output_options(self) -> OutputOptions:
        from infexport.outputs.writer import OutputOptions

        return pick(OutputOptions, vars(self), detail=self.heatmap_detail or "mean")


@click.command("run-engine", short_help="Label images with BUNDLE.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("images", type=ImageName(), nargs=-1)
@click.option("--output", "-o", type=click.Path(path_type=Path), help="Write to a .json, .csv, .npz or .parquet file.")
@click.option("--digest", metavar="SHA256",
              help="Run only a bundle with this digest (see inspect), which doesn't cover engines.")  # fmt: skip
@size_option
@edge_option
@click.option("--top-k", type=click.IntRange(min=1), default=5, show_default=True, help="Classes shown per image.")
@click.option("--features", is_flag=True, help="Also write the features, [n, E], to --output or --json.")
@click.option("--heatmaps", type=click.Path(path_type=Path, file_okay=False), metavar="DIR",
              help="Draw which parts of every image are attended to, one PNG per image (extra 'plot').")  # fmt: skip
@click.option("--heatmap-detail", type=click.Choice(DETAILS), help="One map of all layers and heads, or one per layer, "
              "or one per head.  [default: mean]")  # fmt: skip
@click.option("--centrality", is_flag=True, help="Also write how much each token is attended to, by layer and head, to "
              "an .npz --output.")  # fmt: skip
@execution_option
@memory_option
@chunk_option
@click.option("--tokens", type=click.Choice(["float32", "float16"]), default="float32", show_default=True,
              help="Type of tokens kept while streaming; float16 halves them and reports its error.")  # fmt: skip
@click.option("--scratch", type=click.Path(path_type=Path, file_okay=False),
              help="Keep tokens on disk, in this folder; an interrupted run resumes there.  [default: in the user's "
              "cache, only where memory is short]")  # fmt: skip
@click.option("--clean", is_flag=True, help="First delete what interrupted runs left in the scratch folder.")
@provider_option()
@engine_option
@batch_size_option("Images of equal grid per batch.")
@threads_option
@click.option("--ray", "address", type=Address(), is_flag=False, flag_value="local", metavar="[ADDRESS]",
              help="Spread many images over many workers with Ray: on this machine, or on the cluster at auto, "
              "HOST:PORT or ray://HOST:PORT (extra 'scale').")  # fmt: skip
@click.option("--shard-image", is_flag=True, help="With --ray: split each image over all workers.")
@click.option("--workers", type=click.IntRange(min=1), help="With --ray: number of processes.  [default: one per GPU, "
              "or per core, or, with --shard-image, per node]")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the predictions as JSON.")
def run_engine(**arguments: Any) -> None:
    """Label IMAGES (files, folders or URLs) with BUNDLE: by its engines on a GPU, or in ONNX Runtime.

    An image that cannot be read doesn't stop the others: it is reported, and the exit code is 1. An image that is
    larger than memory is streamed with --size native (extra 'stream'; 'slides' for OpenSlide's formats). One that must
    be decoded whole may have 2^30 pixels; the environment variable INFEXPORT_MAX_PIXELS sets another limit.
    """
    from infexport.bundle import open_bundle
    from infexport.images.fetch import find
    from infexport.inference.streaming import resume
    from infexport.outputs.writer import ResultsWriter
    from infexport.system.host import cache_folder

    given = RunArguments(**arguments)
    given.check()
    out, options = Output(given.as_json), given.inference_options()
    bundle = open_bundle(given.bundle, digest=given.digest)
    if given.clean:
        out.status(f"freed {resume.clean(given.scratch or cache_folder()) / 1e9:.2f} GB")
        if not given.images:
            return
    files = find(given.images)
    writer = ResultsWriter(bundle, files, given.size, given.output_options())
    out.bundle_warnings(bundle)
    with writer:
        results = writer.results(_predict(out, given, bundle, options, files, writer))
        unwritten: InfexportError | None = None
        try:
            _show(out, results)  # first: writing the output may fail
        finally:
            unwritten = writer.write(results)
            if given.output is not None and unwritten is None:
                out.status(f"wrote {given.output}")
    if given.heatmaps is not None:
        out.status(f"wrote {writer.drawn} heat maps to {given.heatmaps}")
    incomplete = [*(failure.error for failure in results.failures), *writer.undrawn]
    for error in [*incomplete, *([unwritten] if unwritten else [])]:
        out.error(error)
    raise click.exceptions.Exit(2 if unwritten else 1 if incomplete else 0)


def _predict(
    out: Output,
    given: RunArguments,
    bundle: Bundle,
    options: InferenceOptions,
    files: list[Path | str],
    writer: ResultsWriter,
) -> list[ImageResult]:
    """Predict in this process or with Ray, and show the progress."""
    from infexport.cli.progress import ConsoleProgress
    from infexport.inference.predictor import Predictor

    with out.progress(len(files), "images") as bar:
        listener: ProgressListener = ConsoleProgress(out, bar, bundle, options.centrality, writer.on_prediction)
        if given.address is None:
            with Predictor.of(bundle, options) as predictor:
                return predictor.predict(files, listener, keep_centrality=False)
        from infexport.integrations.ray import scaled

        return scaled(given.address, given.workers, given.shard_image, bundle, options, files, listener)


def _show(out: Output, results: Results) -> None:
    for prediction in results.predictions:
        out.data(prediction.file + _remarks(prediction))
        for top in prediction.top_k(results.top_k, results.labels):
            out.data(f"  {top['probability']:7.2%}  {top['label']}")
    out.document(results.to_dict())


def _remarks(prediction: Prediction) -> str:
    """Return what a reader should know about how a prediction was computed."""
    remarks = []
    if prediction.padded_share:
        remarks.append(f"{prediction.padded_share:.1%} of the pixels are padding")
    if prediction.execution != "whole":
        remarks.append(prediction.execution)
    if prediction.rounding:
        remarks.append(f"each time by a relative error of {prediction.rounding:.1e}")
    return f"  ({'; '.join(remarks)})" if remarks else ""
