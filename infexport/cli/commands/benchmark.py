"""`infexport benchmark`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from infexport.cli.console import Output
from infexport.cli.options import Sizes, threads_option
from infexport.cli.providers import engine_option, provider_option
from infexport.system.dependencies import require

if TYPE_CHECKING:
    from infexport.evaluation.benchmark.result import BenchmarkResult, BenchmarkRow

ON_GPU = ("J/image", "GPU MB")
"""Columns shown only where they have a value."""


@click.command(short_help="Measure BUNDLE on this machine.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--sizes", type=Sizes(), metavar="N|HxW,…",
              help="Sizes of the images.  [default: 224,512,1024,2048,4096]")  # fmt: skip
@click.option("--batch-size", type=click.IntRange(min=1), default=1, show_default=True, help="Images per batch.")
@click.option("--repeats", type=click.IntRange(min=1),
              help="Measured runs per size; on a GPU more where they take less than a second.  "
              "[default: 5; on a GPU 100]")  # fmt: skip
@provider_option()
@engine_option
@threads_option
@click.option("--max-seconds", type=click.FloatRange(min=0, min_open=True), default=60, show_default=True,
              help="Skip a size whose batch would take longer even at the machine's limit.")  # fmt: skip
@click.option("--plot", type=click.Path(path_type=Path), help="Draw time and memory against tokens to a .png file.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def benchmark(
    bundle: Path,
    sizes: list[tuple[int, int]] | None,
    batch_size: int,
    repeats: int | None,
    provider: str,
    engine: str | None,
    threads: int | None,
    max_seconds: float,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Measure the speed of BUNDLE on this machine, with its engines or ONNX Runtime, and compare with a limit.

    Every size runs in its own process, on images of noise. Measured are latency and throughput after warm-up, peak
    memory of the process, and the seconds from a cold start to the first prediction. Between runs the same process
    multiplies large matrices. The limit is the time that the model's own matrix products would take at that rate; the
    share is limit / p50.

    On a GPU, NVML (extra 'gpu') adds joules per image and peak GPU memory, less what was in use before. Engines have
    no limit, because ONNX Runtime doesn't run them.

    Exit code 1 when a size failed, such as for lack of memory; the other sizes still run.
    """
    from infexport.bundle import open_bundle
    from infexport.cli.progress import ConsoleProgress
    from infexport.evaluation.benchmark.benchmark import benchmark, sizes_for
    from infexport.inference.runners.onnxruntime import remarks

    out = Output(as_json)
    if plot is not None:
        require("matplotlib", extra="plot")
        from infexport.evaluation.benchmark.plots import check_plot, draw_scaling

        check_plot(plot)
    opened = open_bundle(bundle)
    out.bundle_warnings(opened)
    chosen = sizes_for(opened, sizes)
    report = benchmark(
        opened, chosen, batch_size, repeats, provider, engine, threads, max_seconds, ConsoleProgress(out)
    )
    for line in remarks(opened.manifest.precision, report.machine.provider):
        out.warning(line)
    _show(out, report)
    out.document(report.to_dict())
    if plot is not None and any(row.measured for row in report.rows):
        draw_scaling(report, plot)
        out.status(f"wrote {plot}")
    elif plot is not None:
        out.warning("nothing was measured: no plot")
    raise click.exceptions.Exit(0 if report else 1)


def _show(out: Output, report: BenchmarkResult) -> None:
    for line in _facts(report):
        out.data(line)
    cells = [_cells(row) for row in report.rows]
    header = [name for name in cells[0] if name not in ON_GPU or any(row[name] != "-" for row in cells)]
    out.table(header, [[row[name] for name in header] for row in cells])
    for line in dict.fromkeys(_missing(report)):
        out.data(line)
    for row in report.rows:
        if row.reason:
            out.data(f"{row.name} {row.status}: {row.reason}")


def _facts(report: BenchmarkResult) -> list[str]:
    """Return the lines above the table: machine, runtime, limit and bundle."""
    from infexport.bundle.manifest import MODEL
    from infexport.evaluation.benchmark.gemm import SHAPES, UNITS, absence

    machine, manifest = report.machine, report.manifest
    rates = "; ".join(
        f"{kind} {rate.p50:.0f} {UNITS[kind]} ({rate.min:.0f} to {rate.max:.0f}): [{{0}},{{1}}] x [{{1}},{{2}}]".format(
            *SHAPES[kind]
        )
        for kind, rate in report.rates.items()
    )
    limit = rates or f"none: {absence(report.precision, machine.provider)}"
    gpu = f", {machine.gpu}" if machine.gpu else ""
    return [
        f"machine     {machine.cpu}, {machine.cores} cores{gpu}",
        f"runtime     {machine.runtime}, {machine.provider}, threads {machine.threads or 'chosen by it'}",
        f"limit       {limit}",
        f"bundle      {report.bundle}, {manifest.config.variant}, {report.precision}"
        f"{', folded' if manifest.folded else ''}, batch {report.rows[0].batch}",
        f"sha256      {manifest.files[MODEL]}  {MODEL}",
    ]


def _missing(report: BenchmarkResult) -> list[str]:
    """Return a line for each quantity that NVML does not provide."""
    measured = [row.measured for row in report.rows if row.measured is not None]
    return [f"not measured: {reason}" for each in measured if each.on_gpu for reason in each.on_gpu.missing]


def _cells(row: BenchmarkRow) -> dict[str, str]:
    """Return the cells of a row by the name of their column."""
    facts = row.to_dict()
    seconds, gpu = facts.get("seconds", {}), facts.get("on_gpu", {})
    share = facts.get("share_of_limit")
    return {
        "size": row.name,
        "tokens": str(row.tokens),
        **{f"{name} ms": _figure(seconds.get(name), 1e3) for name in ("p50", "p90", "p99", "min", "max")},
        "images/s": _figure(facts.get("images_per_second")),
        "J/image": _figure(gpu.get("joules_per_image")),
        "peak MB": _figure(facts.get("peak_memory_bytes"), 1e-6),
        "GPU MB": _figure(gpu.get("peak_memory_bytes"), 1e-6),
        "cold s": _figure(facts.get("cold_start_seconds")),
        "limit ms": _figure(row.limit, 1e3),
        "share": "-" if share is None else f"{share:.0%}",
        "": "" if row.measured else row.status,
    }


def _figure(value: float | None, unit: float = 1) -> str:
    """Format with three figures, and large values without an exponent; a missing value is a dash."""
    if value is None:
        return "-"
    value *= unit
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"
