"""`infexport run-engine`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from infexport.cli.options import Address, Bytes, ImageName, Size, threads_option
from infexport.cli.output import Output
from infexport.cli.providers import engine_option, provider_option
from infexport.errors import InfexportError

if TYPE_CHECKING:
    from infexport.bundle import Bundle
    from infexport.heatmaps import Detail
    from infexport.predictions import Prediction
    from infexport.run import Request

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
    tokens: str,
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
    from infexport.cli.told import Told
    from infexport.execution import Policy
    from infexport.machine import cache_folder
    from infexport.predictions import Results, check_output
    from infexport.predictor import Predictor
    from infexport.remote import find
    from infexport.run import Request
    from infexport.stream import scratch as scratches
    from infexport.summary import warnings_of

    out = Output(as_json)
    if features and not (output or as_json):
        raise click.UsageError("--features needs --output FILE or --json: there is nowhere to write them")
    if centrality and (output is None or output.suffix != ".npz"):
        raise click.UsageError("--centrality needs --output FILE.npz: it is too much for text")
    if heatmap_detail is not None and heatmaps is None:
        raise click.UsageError("--heatmap-detail needs --heatmaps DIR: there is nowhere to draw")
    if not images and not clean:
        raise click.UsageError("missing argument 'IMAGES...': files, folders or URLs")
    if scratch is not None and execution == "whole":
        raise click.UsageError("--scratch is for streaming: leave out --execution whole")
    if address is None and (shard_image or workers):
        raise click.UsageError("--shard-image and --workers are of --ray")
    if address is not None and (heatmaps or centrality):
        raise click.UsageError("--heatmaps and --centrality are drawn and written by one process: leave out --ray")
    if shard_image and (scratch is not None or execution == "whole"):
        raise click.UsageError(
            "--shard-image streams, with tokens in memory: leave out --scratch and --execution whole"
        )
    opened = open_bundle(bundle, digest=digest)
    if clean:
        out.status(f"freed {scratches.clean(scratch or cache_folder()) / 1e9:.2f} GB")
        if not images:
            return
    files = find(images)
    if output is not None:
        check_output(output)
    warnings = warnings_of(opened.manifest)
    for line in warnings:
        out.warning(line)
    mapped = centrality or heatmaps is not None
    policy = Policy(execution, memory, scratch, chunk, tokens == "float16", batch_size, mapped)
    request = Request(policy, size, edge, provider, engine, threads, centrality)
    undrawn: list[InfexportError] = []
    draw = None if heatmaps is None else _drawing(opened, files, request, heatmaps, heatmap_detail or "mean", undrawn)
    with out.progress(len(files), "images") as bar:
        told = Told(out, opened, bar, mapped, draw)
        if address is None:
            with Predictor.of(opened, request) as predictor:
                rows = predictor.predict(files, told)
        else:
            from infexport.scale import scaled

            rows = scaled(address, workers, shard_image, opened, request, files, told)
    config = opened.manifest.config
    shape = config["num_classes"], config["embed_dim"]
    results = Results(rows, opened.labels, warnings, top_k, features, shape, centrality)
    if output is not None:
        results.write(output)
        out.status(f"wrote {output}")
    if heatmaps is not None:
        out.status(f"wrote {len(results.predictions) - len(undrawn)} heat maps to {heatmaps}")
    for answer in results.predictions:
        out.data(answer.file + _remarks(answer))
        for top in answer.top_k(top_k, results.labels):
            out.data(f"  {top['probability']:7.2%}  {top['label']}")
    out.document(results.to_dict())
    for error in [*(failure.error for failure in results.failures), *undrawn]:
        out.error(error)
    raise click.exceptions.Exit(1 if results.failures or undrawn else 0)


def _drawing(
    bundle: Bundle,
    files: Sequence[Path | str],
    request: Request,
    folder: Path,
    detail: Detail,
    undrawn: list[InfexportError],
) -> Callable[[int, Prediction], None]:
    """What draws the heat map of an answer, and adds to `undrawn` why it cannot."""
    from infexport import heatmaps
    from infexport.extras import require
    from infexport.remote import at_hand, shown
    from infexport.transform import transform_of

    require("matplotlib", extra="plot")
    heatmaps.check_folder(folder)
    names = heatmaps.names_of([file if isinstance(file, Path) else Path(shown(file)) for file in files])
    patch = bundle.manifest.config["patch_size"]
    transform = transform_of(bundle.manifest.preprocessing)

    def draw(index: int, answer: Prediction) -> None:
        assert answer.centrality is not None, "asked for"
        (top,) = answer.top_k(1, bundle.labels)
        title = f"{Path(answer.file).stem}: {top['label']}, {top['probability']:.1%}"
        try:
            with at_hand(files[index]) as file:
                pixels, image = heatmaps.overview(file)
            extent = heatmaps.region(image, answer.grid, patch, request.size, transform)
            figure = heatmaps.figure_of(answer.centrality, pixels, image, extent, title, detail)
            heatmaps.save(figure, folder / f"{names[index]}.png")
            figure.clear()  # its parts hold each other: Python would look for them only now and then
        except InfexportError as error:  # the answer is none the worse for it
            undrawn.append(error)

    return draw


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
