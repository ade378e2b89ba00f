"""`infexport benchmark`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from infexport.cli.output import Output
from infexport.cli.sizes import Sizes
from infexport.extras import require

if TYPE_CHECKING:
    from infexport.measurements import Report, Row

HEADER = (
    "size", "tokens", "p50 ms", "p90 ms", "min ms", "max ms", "images/s", "peak MB", "cold s", "limit ms", "share", ""
)  # fmt: skip


@click.command(short_help="Measure BUNDLE in ONNX Runtime on this machine.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--sizes", type=Sizes(), metavar="N|HxW,…",
              help="Sizes of the images.  [default: 224,512,1024,2048,4096]")  # fmt: skip
@click.option("--batch-size", type=click.IntRange(min=1), default=1, show_default=True, help="Images at once.")
@click.option("--repeats", type=click.IntRange(min=1), default=5, show_default=True, help="Runs that count, per size.")
@click.option("--provider", type=click.Choice(["auto", "cpu", "cuda", "tensorrt"]), default="auto", show_default=True,
              help="Where ONNX Runtime must run; another than asked for is an error.")  # fmt: skip
@click.option("--threads", type=click.IntRange(min=1), help="Threads of ONNX Runtime.  [default: all cores]")
@click.option("--max-seconds", type=click.FloatRange(min=0, min_open=True), default=60, show_default=True,
              help="Leave out a size whose batch takes longer even at the machine's limit.")  # fmt: skip
@click.option("--plot", type=click.Path(path_type=Path), help="Draw time and memory against tokens to a .png file.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def benchmark(
    bundle: Path,
    sizes: list[tuple[int, int]] | None,
    batch_size: int,
    repeats: int,
    provider: str,
    threads: int | None,
    max_seconds: float,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Measure how fast BUNDLE is in ONNX Runtime on this machine, and how near the machine's limit.

    Every size runs in a process of its own, on images of noise: latency and throughput once warm, peak memory of the
    process, and the seconds from its cold start to its first answer. In between the same process runs a large matrix
    product. The limit is the time the model's own matrix products would take at that rate; the share is limit / p50.

    Exit code 1 when a size failed, as for want of memory; it doesn't stop the others.
    """
    from infexport.benchmark import benchmark, sizes_for
    from infexport.bundle import open_bundle
    from infexport.runners.ort import remarks
    from infexport.summary import warnings_of

    out = Output(as_json)
    if plot is not None:
        require("matplotlib", extra="plot")
        from infexport.plots import check_plot, draw_scaling

        check_plot(plot)
    opened = open_bundle(bundle)
    for line in warnings_of(opened.manifest):
        out.warning(line)
    chosen = sizes_for(opened, sizes)
    report = benchmark(opened, chosen, batch_size, repeats, provider, threads, max_seconds, out.status)
    for line in remarks(opened.manifest.precision, report.machine["provider"]):
        out.warning(line)
    for line in _facts(report):
        out.data(line)
    out.table(HEADER, map(_cells, report.rows))
    for row in report.rows:
        if row.reason:
            out.data(f"{row.name} {row.status}: {row.reason}")
    if plot is not None and any(row.measured for row in report.rows):
        draw_scaling(report, plot)
        out.status(f"wrote {plot}")
    elif plot is not None:
        out.warning("nothing was measured: no plot")
    out.document(report.to_dict())
    raise click.exceptions.Exit(0 if report else 1)


def _facts(report: Report) -> list[str]:
    from infexport.gemm import COLUMNS, INNER, ROWS, UNITS
    from infexport.manifest import MODEL

    machine, manifest = report.machine, report.manifest
    rates = ", ".join(
        f"{kind} {rate.p50:.0f} {UNITS[kind]} ({rate.min:.0f} to {rate.max:.0f})" for kind, rate in report.rates.items()
    )
    return [
        f"machine     {machine['cpu']}, {machine['cores']} cores",
        f"runtime     onnxruntime {machine['onnxruntime']}, {machine['provider']}, "
        f"threads {machine['threads'] or 'chosen by it'}",
        f"limit       {rates}: [{ROWS},{INNER}] x [{INNER},{COLUMNS}]",
        f"bundle      {report.bundle}, {manifest.config['variant']}, {manifest.precision}"
        f"{', folded' if manifest.folded else ''}, batch {report.rows[0].batch}",
        f"sha256      {manifest.files[MODEL]}  {MODEL}",
    ]


def _cells(row: Row) -> list[str]:
    if row.measured is None:
        return [row.name, str(row.tokens), *["-"] * 7, _figure(1e3 * row.limit), "-", row.status]
    facts = row.to_dict()
    return [
        row.name,
        str(row.tokens),
        *(_figure(1e3 * facts["seconds"][name]) for name in ("p50", "p90", "min", "max")),
        _figure(facts["images_per_second"]),
        _figure(facts["peak_memory_bytes"] / 1e6),
        _figure(facts["cold_start_seconds"]),
        _figure(1e3 * row.limit),
        f"{facts['share_of_limit']:.0%}",
        "",
    ]


def _figure(value: Any) -> str:
    """Three figures, never a power of ten for what is large."""
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"
