"""Pictures of what was measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from infexport.evaluation.benchmark.gemm import UNITS
from infexport.evaluation.benchmark.result import BenchmarkResult, BenchmarkRow, Measured, Spread, speed_limit
from infexport.outputs.files import check_writable, drawing_errors, written

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, VERMILION, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"
"""Okabe and Ito's, told apart by every kind of colour vision."""
PICTURE, ELSEWHERE = "picture", "choose a --plot that can be written to"


def check_plot(path: Path) -> None:
    """Find out before the long work, not after it, that a picture cannot be written.

    Raises:
        InfexportError: not a .png file, or a place that cannot be written to.
    """
    check_writable(path, PICTURE, (".png",), ELSEWHERE)


def draw_scaling(report: BenchmarkResult, path: Path) -> None:
    """Draw time and peak memory against tokens, log-log, with the machine's limit; 1500x640 pixels.

    Raises:
        InfexportError: it cannot be drawn or written.
    """
    with drawing_errors(path, PICTURE), written(path, PICTURE, ELSEWHERE) as file:
        _scaling(report).savefig(file, format="png", metadata={"Software": None})


def _scaling(report: BenchmarkResult) -> Figure:
    from matplotlib.figure import Figure  # no pyplot: no window system is asked for

    rows = sorted(report.rows, key=lambda row: row.tokens)
    measured = [(row, row.measured) for row in rows if row.measured is not None]
    figure = Figure(figsize=(10, 4.3), dpi=150, layout="constrained")
    time, memory = figure.subplots(1, 2)
    _draw_time(time, report, rows, measured)
    tokens = [row.tokens for row, _ in measured]
    on_gpu = [None if m.on_gpu is None else m.on_gpu.peak_memory for _, m in measured]
    resident = [m.peak_memory / 1e6 for _, m in measured]
    memory.plot(tokens, resident, "o-", color=BLUE, markersize=5, label="resident")
    memory.set_ylabel("peak resident memory, MB")
    if all(on_gpu):
        there = [count / 1e6 for count in on_gpu if count]
        memory.plot(tokens, there, "s-", color=GREEN, markersize=5, label="on the GPU")
        memory.set_ylabel("peak memory, MB")
        memory.legend(frameon=False, loc="lower right", fontsize=9)
    for axes in (time, memory):
        _dress(axes, rows)
    manifest, machine = report.manifest, report.machine
    place = machine.gpu or f"{machine.cores} cores ({machine.cpu})"
    figure.suptitle(
        f"{manifest.config.variant}, {report.precision}{', folded' if manifest.folded else ''}, "
        f"batch {rows[0].batch}, on {place}",
        fontsize=11,
    )
    return figure


def _draw_time(
    axes: Axes, report: BenchmarkResult, rows: Sequence[BenchmarkRow], measured: Sequence[tuple[BenchmarkRow, Measured]]
) -> None:
    spreads = [Spread.of(m.seconds) for _, m in measured]
    axes.errorbar(
        [row.tokens for row, _ in measured],
        [s.p50 for s in spreads],
        yerr=[[s.p50 - s.min for s in spreads], [s.max - s.p50 for s in spreads]],
        fmt="o-", color=BLUE, markersize=5, capsize=3, label="measured: median, minimum to maximum",
    )  # fmt: skip
    # one rate for the whole line: that of the run
    provider = report.machine.provider
    limits = [
        (row, limit)
        for row in rows
        if (limit := speed_limit(row.work, row.batch, report.precision, report.gemm, provider)) is not None
    ]
    if limits:
        rates = ", ".join(f"{kind} {rate.p50:.0f} {UNITS[kind]}" for kind, rate in report.rates.items())
        label = f"GEMM limit ({rates})"
        axes.plot(
            [row.tokens for row, _ in limits], [limit for _, limit in limits], ".--", color=VERMILION, label=label
        )
    for row, limit in limits:
        if row.measured is None:
            axes.plot([row.tokens], [limit], "x", color=VERMILION, markersize=7)
            axes.annotate(
                row.status, (row.tokens, limit), (-6, 4), textcoords="offset points", ha="right", color=VERMILION
            )
    axes.set_ylabel("time of a batch, seconds")
    axes.legend(frameon=False, loc="lower right", fontsize=9)


def _dress(axes: Axes, rows: Sequence[BenchmarkRow]) -> None:
    """Logarithmic axes in numbers as people write them, the same sizes below every panel."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    axes.set(xscale="log", yscale="log", xlabel="image size in pixels, tokens of an image")
    low, high = axes.dataLim.intervaly
    room = max(1.6, math.sqrt(20 * low / high))  # an axis of less than a factor 20 would show noise as a slope
    axes.set_ylim(low / room, high * room)
    axes.yaxis.set_major_locator(LogLocator(subs=(1,) if high / low > 300 else (1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}" if value < 1e4 else f"{value:,.0f}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    span = rows[-1].tokens / rows[0].tokens
    axes.set_xlim(rows[0].tokens / max(1.3, span**0.08), rows[-1].tokens * max(1.3, span**0.08))
    labelled: list[BenchmarkRow] = []
    for row in rows:
        # labels nearer than this would cover each other
        if not labelled or math.log(row.tokens / labelled[-1].tokens) >= math.log(span) / 8:
            labelled.append(row)
    axes.set_xticks([row.tokens for row in labelled], [f"{row.name}\n{row.tokens:,}" for row in labelled])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=GREY, alpha=0.2, linewidth=0.8)
