"""`infexport run-engine`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from infexport.cli.output import Output


class Size(click.ParamType[str | int]):
    """`trained`, `native` or a side in pixels."""

    name = "trained|native|N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str | int:
        if value in ("trained", "native") or isinstance(value, int):
            return value
        if value.isascii() and value.isdecimal() and len(value) < 10 and int(value) > 0:
            return int(value)
        self.fail(f"{value!r} is neither trained, native nor a number of pixels", param, ctx)


@click.command("run-engine", short_help="Label images with BUNDLE in ONNX Runtime.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("images", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("--output", "-o", type=click.Path(path_type=Path), help="Write to a .json, .csv or .npz file.")
@click.option("--size", type=Size(), metavar="trained|native|N", default="trained", show_default=True,
              help="The recorded evaluation transform, the image as it is, or that transform at N pixels.")  # fmt: skip
@click.option("--edge", type=click.Choice(["pad", "crop"]), default="pad", show_default=True,
              help="Complete the last patch by replicating the edge, or cut it off.")  # fmt: skip
@click.option("--top-k", type=click.IntRange(min=1), default=5, show_default=True, help="Classes shown per image.")
@click.option("--features", is_flag=True, help="Also write the features, [n, E], to --output or --json.")
@click.option("--provider", type=click.Choice(["auto", "cpu", "cuda", "tensorrt"]), default="auto", show_default=True,
              help="Where ONNX Runtime must run; another than asked for is an error.")  # fmt: skip
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Images of equal grid at once.",
)
@click.option("--threads", type=click.IntRange(min=1), help="Threads of ONNX Runtime.  [default: all cores]")
@click.option("--json", "as_json", is_flag=True, help="Print the predictions as JSON.")
def run_engine(
    bundle: Path,
    images: tuple[Path, ...],
    output: Path | None,
    size: Any,
    edge: Any,
    top_k: int,
    features: bool,
    provider: str,
    batch_size: int,
    threads: int | None,
    as_json: bool,
) -> None:
    """Label IMAGES (files or folders) with BUNDLE in ONNX Runtime.

    An image that cannot be read doesn't stop the others: it is reported, and the exit code is 1. Images of more than
    2^30 pixels are refused; the environment variable INFEXPORT_MAX_PIXELS sets another limit.
    """
    from infexport.bundle import open_bundle
    from infexport.images import find_images
    from infexport.predictions import Results, check_output
    from infexport.run import run
    from infexport.runners.ort import OrtRunner, remarks
    from infexport.summary import warnings_of

    out = Output(as_json)
    if features and not (output or as_json):
        raise click.UsageError("--features needs --output FILE or --json: there is nowhere to write them")
    opened = open_bundle(bundle)
    files = find_images(images)
    if output is not None:
        check_output(output)
    warnings = warnings_of(opened.manifest)
    for line in warnings:
        out.warning(line)
    with OrtRunner(opened, provider, threads) as runner:
        out.status(f"running on {runner.provider} with {opened.manifest.precision}")
        for line in remarks(opened.manifest.precision, runner.provider):
            out.warning(line)
        with out.progress(len(files), "images") as bar:
            answers, failures = run(opened, runner, files, size, edge, batch_size, bar.update)
    config = opened.manifest.config
    shape = config["num_classes"], config["embed_dim"]
    results = Results(answers, failures, opened.labels, warnings, top_k, features, shape)
    if output is not None:
        results.write(output)
        out.status(f"wrote {output}")
    for answer in answers:
        padded = f"  ({answer.padded_share:.1%} of the pixels are padding)" if answer.padded_share else ""
        out.data(f"{answer.file}{padded}")
        for top in answer.top_k(top_k, results.labels):
            out.data(f"  {top['probability']:7.2%}  {top['label']}")
    out.document(results.to_dict())
    for failure in failures:
        out.error(failure.error)
    raise click.exceptions.Exit(1 if failures else 0)
