"""Plots of a judgement."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from infexport.evaluation.parity.result import Case, Logits, ParityResult
from infexport.evaluation.report.svg import BAD, INK, OURS, THEIRS, drawing, inline

if TYPE_CHECKING:
    from collections.abc import Iterable

    from markupsafe import Markup
    from matplotlib.axes import Axes

Floats = NDArray[np.float64]

LABELS = 7
"""Below an axis of this width, at most."""
POINTS = 2000
"""More of them are a picture: as shapes they would weigh more than the page."""
LEAST = 1e-6
"""Share of the tolerance; smaller errors are one bar of a histogram."""


def overall(report: ParityResult) -> list[tuple[Markup, str]]:
    """Draw the figures of all inputs, with their captions."""
    return [
        (_sizes(report), "Relative error of the logits of every input, by size; the truth is float64."),
        (
            _errors(report),
            "How far single logits are off, in units of what all might be off by: the tolerance times the root mean "
            "square of their input's logits, or of what they are sums of.",
        ),
    ]


def layers(case: Case, index: int) -> list[tuple[Markup, str]]:
    """Draw the figures of the network's parts on one input; `index` is unique to it."""
    if not case.parts:
        return []
    return [
        (_adds(case, index), "What every part adds to the error, given what it was given, and what it may add."),
        (_totals(case, index), "What has come together after every part: the error against the float64 network's."),
    ]


def _sizes(report: ParityResult) -> Markup:
    sizes: dict[tuple[int, ...], list[Case]] = {}
    for case in sorted(report.cases, key=lambda case: (math.prod(case.shape[1:3]), case.shape)):
        sizes.setdefault(case.shape[1:3], []).append(case)
    with drawing() as figure:
        axes = figure.subplots()
        places, cases = [], []
        for place, found in enumerate(sizes.values()):
            # side by side: of hundreds of equal images every one can be told from the others
            places += list(place + np.linspace(-0.3, 0.3, len(found) + 2)[1:-1])
            cases += found
        x = np.array(places)
        ours, theirs = (_visible(values) for values in (
            [case.bundle.relative for case in cases], [case.torch.relative for case in cases]))  # fmt: skip
        wrong = np.array([not case.bundle for case in cases])
        crowd = len(cases) > POINTS
        axes.scatter(x, theirs, 22, facecolors="none", edgecolors=THEIRS, label="PyTorch float32", rasterized=crowd)
        for which, size, colour, marker, label in (
            (~wrong, 20, OURS, "D", "the bundle"),
            (wrong, 34, BAD, "X", "failed"),
        ):
            if which.any():
                axes.scatter(x[which], ours[which], size, color=colour, marker=marker, label=label, rasterized=crowd)
        tolerance = report.tolerance.relative
        axes.axhline(tolerance, color=INK, linewidth=1, linestyle="--", label=f"tolerance {tolerance:.1e}")
        _logarithmic(axes, [*ours, *theirs, tolerance])
        names = [f"{height}×{width}" for height, width in sizes]
        _name(axes, names)
        axes.set(xlabel="size of the image, pixels", ylabel="relative error")
        _legend(axes, 4)
        return _svg(inline(figure, "sizes", "Relative error of every input by image size, beside the tolerance."))


def _errors(report: ParityResult) -> Markup:
    from matplotlib.ticker import FuncFormatter

    allowed = report.tolerance.relative
    ours = np.concatenate([_off(case, case.logits, allowed) for case in report.cases])
    theirs = np.concatenate([_off(case, case.eager, allowed) for case in report.cases])
    with drawing() as figure:
        axes = figure.subplots()
        every = np.concatenate([ours, theirs])
        low, high = (math.floor(math.log10(value)) for value in (every.min(), max(1.0, every.max())))
        bins = np.logspace(low, high + 1, (high + 1 - low) * 4 + 1).tolist()
        axes.hist(ours, bins, color=OURS, alpha=0.75, label="the bundle")
        axes.hist(theirs, bins, histtype="step", color=THEIRS, linewidth=1.4, label="PyTorch float32")
        axes.axvline(1, color=INK, linewidth=1, linestyle="--", label="tolerance")
        axes.set(xscale="log", xlabel="error of a logit, in units of the tolerance", ylabel="logits")
        axes.minorticks_off()
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        _legend(axes, 3)
        return _svg(inline(figure, "errors", "Histogram of the errors of single logits, beside the tolerance."))


def _off(case: Case, logits: Logits, allowed: float) -> Floats:
    unit = allowed * case.bundle.scale / math.sqrt(logits.size)
    off = np.abs(logits.astype(np.float64) - case.truth).ravel() / unit
    return np.clip(np.nan_to_num(off, nan=1e9, posinf=1e9), LEAST, 1e9)


def _adds(case: Case, index: int) -> Markup:
    parts, x = case.parts, np.arange(len(case.parts))
    with drawing() as figure:
        axes = figure.subplots()
        budgets = _visible([part.output.budget for part in parts])
        ours = _visible([part.output.local_error for part in parts])
        theirs = _visible([part.torch_local_error for part in parts])
        axes.hlines(budgets, x - 0.38, x + 0.38, color=INK, linewidth=1.6, label="its budget")
        axes.plot(x, theirs, "o", color=THEIRS, markerfacecolor="none", markersize=5, label="PyTorch float32")
        good = np.array([bool(part.output) for part in parts])
        axes.plot(x[good], ours[good], "D", color=OURS, markersize=4.5, label="the part adds")
        out = [(place, error.local_error) for place, part in enumerate(parts) for _, error in part.out]
        if out:
            axes.plot([place for place, _ in out], _visible([adds for _, adds in out]), "X", color=BAD, markersize=7,
                      label="out of its budget")  # fmt: skip
        _logarithmic(axes, [*budgets, *ours, *theirs, *_visible([adds for _, adds in out])])
        _parts(axes, case)
        axes.set_ylabel("relative error that it adds")
        return _svg(inline(figure, f"adds-{index}", "Error that every part adds, beside its budget and PyTorch's."))


def _totals(case: Case, index: int) -> Markup:
    x = np.arange(len(case.parts))
    with drawing() as figure:
        axes = figure.subplots()
        ours = _visible([part.cumulative_error for part in case.parts])
        theirs = _visible([part.torch_cumulative_error for part in case.parts])
        axes.plot(x, theirs, "o--", color=THEIRS, markerfacecolor="none", markersize=5, linewidth=1.2,
                  label="PyTorch float32")  # fmt: skip
        axes.plot(x, ours, "D-", color=OURS, markersize=4.5, linewidth=1.6, label="the bundle")
        _logarithmic(axes, [*ours, *theirs])
        _parts(axes, case)
        axes.set_ylabel("relative error so far")
        return _svg(inline(figure, f"totals-{index}", "Error as it comes together, part by part, beside PyTorch's."))


def _visible(values: Sequence[float]) -> Floats:
    """Values that a logarithmic axis can show: not zero, and not infinite."""
    found = np.array(values, np.float64)
    finite = found[np.isfinite(found) & (found > 0)]
    low, high = (finite.min(), finite.max()) if finite.size else (1e-9, 1.0)
    return np.clip(np.where(np.isnan(found), np.inf, found), low / 3, high * 10)


def _logarithmic(axes: Axes, values: Iterable[float]) -> None:
    """An axis over all values, of two decades at least: less would show noise as differences."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    found = list(values)
    low, high = math.log10(min(found)), math.log10(max(found))
    room = max(0.25, (2 - high + low) / 2)
    axes.set_yscale("log")
    axes.set_ylim(10 ** (low - room), 10 ** (high + room))
    axes.yaxis.set_major_locator(LogLocator(numticks=6))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0e}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(axis="y")


def _parts(axes: Axes, case: Case) -> None:
    _name(axes, [part.name.removeprefix("layers.") for part in case.parts])
    axes.set_xlabel("part of the network: embedding, layers, head")
    _legend(axes, 4)


def _name(axes: Axes, names: Sequence[str]) -> None:
    """Name as many ticks as there is room for, the first and the last among them."""
    size = max(map(len, names))
    room = max(2, min(len(names), LABELS * 7 // max(7, size) if size > 5 else LABELS + 3))
    places = sorted({round(i * (len(names) - 1) / (room - 1)) for i in range(room)})
    axes.set_xticks(places, [names[place] for place in places])
    axes.set_xlim(-0.6, len(names) - 0.4)


def _legend(axes: Axes, columns: int) -> None:
    axes.figure.legend(loc="outside upper center", ncols=columns, handlelength=1.3, columnspacing=1, handletextpad=0.5)


def _svg(text: str) -> Markup:
    from markupsafe import Markup

    return Markup(text)  # of matplotlib's, which escapes; no name of the user's is in it
