"""`infexport validate parity`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from infexport.cli.console import Output, command_line
from infexport.cli.options import Sizes, threads_option
from infexport.cli.providers import engine_option, provider_option
from infexport.system.dependencies import require

if TYPE_CHECKING:
    from infexport.evaluation.parity.result import ParityResult


@click.command(short_help="Compare BUNDLE with its checkpoint in PyTorch.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--checkpoint", type=click.Path(path_type=Path), help="Reference checkpoint.  [default: the recorded one]"
)
@click.option(
    "--sizes", type=Sizes(), metavar="N|HxW,…", help="Sizes of synthetic images.  [default: trained, smaller, twice]"
)
@click.option("--images", type=click.Path(path_type=Path), help="An image or a folder, at native resolution.")
@provider_option(default=None, help="Where to run it: a provider of ONNX Runtime, or engines.  [default: cpu]")
@engine_option
@click.option("--execution", type=click.Choice(["whole", "stream"]), default="whole", show_default=True,
              help="Check the whole graph, or the stages that images are streamed through.")  # fmt: skip
@click.option("--layers", is_flag=True, help="Also check every layer on its own input, and name the first that exceeds "
              "its error budget.")  # fmt: skip
@threads_option
@click.option("--no-verify", is_flag=True, help="Check a bundle whose hashes differ; the verdict says so.")
@click.option("--report", "page", type=click.Path(path_type=Path), metavar="FILE.html",
              help="Also write one self-contained page: plots, the worst images, hashes.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def parity(
    bundle: Path,
    checkpoint: Path | None,
    sizes: list[tuple[int, int]] | None,
    images: Path | None,
    provider: str | None,
    engine: str | None,
    execution: str,
    layers: bool,
    threads: int | None,
    no_verify: bool,
    page: Path | None,
    as_json: bool,
) -> None:
    """Compare BUNDLE, in ONNX Runtime or its engines, with its checkpoint in PyTorch, in float32 and in float64.

    Both references are infexport's own network with the checkpoint's weights. The code that trained them is not run, so
    the verdict does not cover how the checkpoint was read.

    With --layers, every layer's output and sums are compared with those of the float64 layer on the same input. Each
    error must be within a budget: 4 standard deviations of the rounding error in the bundle's precision.

    Exit code 0 when every case is within tolerance, 1 otherwise.
    """
    out = Output(as_json)
    require("torch", "safetensors", extra="export")
    if page is not None:
        require("jinja2", "matplotlib", extra="plot")
        from infexport.evaluation.report import check_report

        check_report(page)
    from infexport.bundle import open_bundle
    from infexport.cli.progress import ConsoleProgress
    from infexport.evaluation.parity.validate import default_sizes, validate
    from infexport.evaluation.recorded_checkpoint import recorded_checkpoint
    from infexport.images.decode import find_images
    from infexport.inference.runners.factory import RunnerFactory

    opened = open_bundle(bundle, verify=not no_verify)
    out.bundle_warnings(opened, "the bundle was modified since it was converted; the verdict is unverified")
    files = [] if images is None else find_images([images])
    if sizes is None:
        sizes = default_sizes(opened) if images is None else []
    path = checkpoint or recorded_checkpoint(opened)
    opening = RunnerFactory(opened, provider or ("engine" if engine else "cpu"), engine, threads)
    with out.progress(len(sizes) + len(files), "comparing") as bar:
        report = validate(opened, path, sizes, files, opening, execution == "stream", layers, ConsoleProgress(out, bar))
    _show(out, report, layers)
    out.document(report.to_dict())
    if page is not None:
        from infexport.evaluation.report import write_report

        write_report(report, opened, command_line(), page, threads)
        out.status(f"report: {page}")
    raise click.exceptions.Exit(0 if report else 1)


def _show(out: Output, report: ParityResult, layers: bool) -> None:
    out.table(
        ["input", "max abs", "mean abs", "relative", "torch's own", "cosine", "top-1", ""],
        [
            [
                case.name,
                f"{case.bundle.max_abs:.1e}",
                f"{case.bundle.mean_abs:.1e}",
                f"{case.bundle.relative:.1e}",
                f"{case.torch.relative:.1e}",
                f"{case.bundle.cosine:.9f}",
                f"{case.bundle.top1_agreement:.0%}",
                "ok" if case.bundle else "FAILED",
            ]
            for case in report.cases
        ],
    )
    if layers:
        _show_layers(out, report)
    for _, error in report.failed:
        out.error(error)
    out.data(f"compared: {report.compared}")
    out.data(f"ran on: {report.ran}")
    out.data(f"tolerance: {report.tolerance}")
    if report.first_over_budget:
        out.data(report.first_over_budget)
    out.data(report.verdict)


def _show_layers(out: Output, report: ParityResult) -> None:
    """Show the error that each part of the network adds, and the cumulative error there."""
    out.data("")
    out.table(
        ["input", "part", "adds", "budget", "its sums add", "budget", "total", "torch adds", "total", ""],
        [
            [
                case.name,
                part.name,
                f"{part.output.local_error:.1e}",
                f"{part.output.budget:.1e}",
                *(("-", "-") if worst is None else (f"{worst.local_error:.1e}", f"{worst.budget:.1e}")),
                f"{part.cumulative_error:.1e}",
                f"{part.torch_local_error:.1e}",
                f"{part.torch_cumulative_error:.1e}",
                "ok" if part else "FAILED",
            ]
            for case in report.cases
            for part in case.parts
            for worst in [max(part.states.values(), key=lambda error: error.share, default=None)]
        ],
    )
