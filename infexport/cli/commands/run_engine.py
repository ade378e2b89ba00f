"""`infexport run-engine`."""

from __future__ import annotations

from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from infexport.cli.console import Output
from infexport.cli.options import Address, Bytes, ImageName, Size, threads_option
from infexport.cli.providers import engine_option, provider_option
from infexport.errors import InfexportError

if TYPE_CHECKING:
    from infexport.inference.prediction import Prediction
    from infexport.outputs.results import CentralityFile, Results

EXECUTIONS = ("auto", "whole", "stream")
DETAILS = ("mean", "layers", "heads")


@click.command("run-engine", short_help="Label images with BUNDLE.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("images", type=ImageName(), nargs=-1)
@click.option("--output", "-o", type=click.Path(path_type=Path), help="Write to a .json, .csv, .npz or .parquet file.")
@click.option(
    "--digest",
    metavar="SHA256",
    help="Run this very bundle or none; infexport inspect shows a bundle's. Engines are not part of it.",
)
@click.option("--size", type=Size(), metavar="trained|native|N", default="trained", show_default=True,
              help="The recorded evaluation transform, the image as it is, or that transform at N pixels.")  # fmt: skip
@click.option("--edge", type=click.Choice(["pad", "crop"]), default="pad", show_default=True,
              help="Complete the last patch by replicating the edge, or cut it off.")  # fmt: skip
@click.option("--top-k", type=click.IntRange(min=1), default=5, show_default=True, help="Classes shown per image.")
@click.option("--features", is_flag=True, help="Also write the features, [n, E], to --output or --json.")
@click.option("--heatmaps", type=click.Path(path_type=Path, file_okay=False), metavar="DIR",
              help="Draw which parts of every image are attended to, a PNG each (extra 'plot').")  # fmt: skip
@click.option("--heatmap-detail", type=click.Choice(DETAILS), help="One map of all layers and heads, or one of each "
              "layer, or of each head.  [default: mean]")  # fmt: skip
@click.option("--centrality", is_flag=True, help="Also write how much each token is attended to, by layer and head, to "
              "an .npz --output.")  # fmt: skip
@click.option("--execution", type=click.Choice(EXECUTIONS), default="auto", show_default=True,
              help="Run the whole graph, or stream: chunk by chunk, in memory that hardly grows.")  # fmt: skip
@click.option("--memory", type=Bytes(), help="What the process may take, such as 2GiB.  [default: 80% of what is free]")
@click.option(
    "--chunk",
    type=click.IntRange(min=1),
    help="Tokens at a time, streamed.  [default: 1024; of engines, what they were built for]",
)
@click.option("--tokens", type=click.Choice(["float32", "float16"]), default="float32", show_default=True,
              help="How tokens are kept while streaming; float16 is half as much, its error is reported.")  # fmt: skip
@click.option("--scratch", type=click.Path(path_type=Path, file_okay=False),
              help="Keep tokens on disk, in this folder; a run that is killed goes on there.  [default: only where "
              "memory is short, in the user's cache]")  # fmt: skip
@click.option("--clean", is_flag=True, help="First delete what interrupted runs left in the scratch folder.")
@provider_option()
@engine_option
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Images of equal grid at once.",
)
@threads_option
@click.option("--ray", "address", type=Address(), is_flag=False, flag_value="local", metavar="[ADDRESS]",
              help="Run many images on many workers, by Ray: on this machine, or on the cluster at auto, HOST:PORT or "
              "ray://HOST:PORT (extra 'scale').")  # fmt: skip
@click.option("--shard-image", is_flag=True, help="With --ray: all workers run each image together, every one a part.")
@click.option("--workers", type=click.IntRange(min=1), help="With --ray: processes.  [default: one per GPU, or "
              "per core, or, with --shard-image, per node]")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the predictions as JSON.")
def run_engine(
    bundle: Path,
    images: tuple[Path | str, ...],
    output: Path | None,
    digest: str | None,
    size: Any,
    edge: Any,
    top_k: int,
    features: bool,
    heatmaps: Path | None,
    heatmap_detail: Any,
    centrality: bool,
    execution: Any,
    memory: int | None,
    chunk: int | None,
    tokens: Any,
    scratch: Path | None,
    clean: bool,
    provider: str,
    engine: str | None,
    batch_size: int,
    threads: int | None,
    address: str | None,
    shard_image: bool,
    workers: int | None,
    as_json: bool,
) -> None:
    """Label IMAGES (files, folders or URLs) with BUNDLE: by its engines on a GPU, or in ONNX Runtime.

    An image that cannot be read doesn't stop the others: it is reported, and the exit code is 1. An image that is
    larger than memory is streamed with --size native (extra 'stream'; 'slides' for OpenSlide's formats). One that must
    be decoded whole may have 2^30 pixels; the environment variable INFEXPORT_MAX_PIXELS sets another limit.
    """
    from infexport.bundle import open_bundle
    from infexport.bundle.summary import bundle_warnings
    from infexport.cli.progress import ConsoleProgress
    from infexport.images.fetch import find
    from infexport.inference.options import InferenceOptions
    from infexport.inference.predictor import Predictor
    from infexport.inference.streaming import resume
    from infexport.outputs.files import check_apart
    from infexport.outputs.heatmaps import HeatmapWriter
    from infexport.outputs.results import CentralityFile, Results, check_output
    from infexport.system.host import cache_folder

    out = Output(as_json)
    if features and not (output or as_json):
        raise click.UsageError("--features needs --output FILE or --json: there is nowhere to write them")
    if centrality and (output is None or output.suffix.lower() != ".npz"):
        raise click.UsageError("--centrality needs --output FILE.npz: it is too much for text")
    if heatmap_detail is not None and heatmaps is None:
        raise click.UsageError("--heatmap-detail needs --heatmaps DIR: there is nowhere to draw")
    if not images and not clean:
        raise click.UsageError("missing argument 'IMAGES...': files, folders or URLs")
    if address is None and (shard_image or workers):
        raise click.UsageError("--shard-image and --workers are of --ray")
    if address is not None and (heatmaps or centrality):
        raise click.UsageError("--heatmaps and --centrality are drawn and written by one process: leave out --ray")
    if shard_image and (scratch is not None or execution == "whole"):
        raise click.UsageError(
            "--shard-image streams, with tokens in memory: leave out --scratch and --execution whole"
        )
    options = InferenceOptions(
        size=size,
        edge=edge,
        execution="stream" if shard_image else execution,
        memory=memory,
        chunk=chunk,
        tokens=tokens,
        scratch=scratch,
        provider=provider,
        engine=engine,
        batch_size=batch_size,
        threads=threads,
        centrality=centrality or heatmaps is not None,
        drawing=None if heatmaps is None else heatmap_detail or "mean",
    )
    opened = open_bundle(bundle, digest=digest)
    if clean:
        out.status(f"freed {resume.clean(scratch or cache_folder()) / 1e9:.2f} GB")
        if not images:
            return
    files = find(images)
    pictures = None if heatmaps is None else HeatmapWriter(opened, files, size, heatmaps, heatmap_detail or "mean")
    if output is not None:
        check_output(output)
        check_apart({output: "output"}, files, "choose another --output")
    warnings = bundle_warnings(opened.manifest)
    for line in warnings:
        out.warning(line)
    with ExitStack() as stack:
        numbers = stack.enter_context(closing(CentralityFile(output))) if centrality and output else None
        sinks = [sink.take for sink in (pictures, numbers) if sink is not None]
        with out.progress(len(files), "images") as bar:
            told = ConsoleProgress(out, bar, opened, options.centrality, sinks)
            if address is None:
                with Predictor.of(opened, options) as predictor:
                    rows = predictor.predict(files, told, keep_centrality=False)
            else:
                from infexport.integrations.ray import scaled

                rows = scaled(address, workers, shard_image, opened, options, files, told)
        config = opened.manifest.config
        shape = config.num_classes, config.embed_dim
        results = Results(rows, opened.labels, warnings, top_k, features, shape)
        unwritten: InfexportError | None = None
        try:
            _show(out, results)  # first: what follows may fail
        finally:
            if output is not None:
                unwritten = _write(out, results, output, numbers)
    if pictures is not None:
        out.status(f"wrote {pictures.drawn} heat maps to {heatmaps}")
    undrawn = pictures.failed if pictures else []
    for error in [*(failure.error for failure in results.failures), *undrawn, *([unwritten] if unwritten else [])]:
        out.error(error)
    raise click.exceptions.Exit(2 if unwritten else 1 if results.failures or undrawn else 0)


def _show(out: Output, results: Results) -> None:
    for answer in results.predictions:
        out.data(answer.file + _remarks(answer))
        for top in answer.top_k(results.top_k, results.labels):
            out.data(f"  {top['probability']:7.2%}  {top['label']}")
    out.document(results.to_dict())


def _write(out: Output, results: Results, output: Path, numbers: CentralityFile | None) -> InfexportError | None:
    """Write the output; or, where that fails, keep a copy elsewhere and return why."""
    from infexport.outputs.results import keep_elsewhere

    try:
        results.write(output) if numbers is None else numbers.write(results)
        out.status(f"wrote {output}")
        return None
    except InfexportError as error:
        copy = keep_elsewhere(output, results)
        kept = f"the answers{' without centrality' if numbers else ''} are in {copy}" if copy else error.hint
        return InfexportError(error.summary, error.details, kept)


def _remarks(answer: Prediction) -> str:
    """What a person should know of how an answer came about."""
    said = []
    if answer.padded_share:
        said.append(f"{answer.padded_share:.1%} of the pixels are padding")
    if answer.execution != "whole":
        said.append(answer.execution)
    if answer.rounding:
        said.append(f"each time by a relative error of {answer.rounding:.1e}")
    return f"  ({'; '.join(said)})" if said else ""
