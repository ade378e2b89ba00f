"""What was measured: rows, tables and a picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from infexport.evaluation.benchmark import gemm
from infexport.evaluation.benchmark.result import Spread, speed_limit
from infexport.evaluation.flops import matmul_cost
from peers.ask import Entry
from peers.contenders import OURS, OURS_ON_GPU
from peers.networks import CONFIGS

WAYS_OF_OURS = ("bundle", "engine")
COLOURS = {"linear": "#0072B2", "pure": "#D55E00", "softmax": "#009E73"}


def gemm_seconds(entries: Sequence[Entry], how: str) -> dict[str, list[float]]:
    """Of the products that limit a contender that runs like this, but those that failed: torch's are torch's own."""
    library = "torch" if how in ("eager", "compile") else "ort"
    names = {f"gemm-{library}-{kind}": kind for kind in gemm.SHAPES}
    found = [entry for entry in entries if entry.contender.name in names and entry.median is not None]
    return {names[entry.contender.name]: entry.seconds for entry in found}


def limit(entry: Entry, entries: Sequence[Entry], side: int, batch: int, device: str) -> float | None:
    """Seconds a contender's own matrix products take at the rate of a large one; None where there is none like them."""
    contender, products = entry.contender, gemm_seconds(entries, entry.contender.how)
    if contender.family == "gemm" or contender.how == "engine":
        return None
    config = CONFIGS[contender.family]
    work = matmul_cost(config, contender.folded, (side // config.patch_size) ** 2 + 1)
    return speed_limit(work, batch, contender.precision, products, device)


def row_of(entry: Entry, entries: Sequence[Entry], side: int, batch: int, device: str = "cpu") -> dict[str, Any]:
    """A contender's result: times in seconds, memory in bytes, on a GPU the GPU's."""
    row: dict[str, Any] = {
        **dataclasses.asdict(entry.contender),
        "label": entry.contender.label,
        "status": "failed" if entry.reason else "measured",
    }
    row |= {"relative_error": entry.relative_error, "peak_memory": entry.peak_memory, "all": entry.seconds}
    if entry.median is None:
        return row | {"reason": entry.reason}
    medians = {other.contender.name: other.median for other in entries}
    least = limit(entry, entries, side, batch, device)
    row |= {"seconds": Spread.of(entry.seconds).to_dict(), "limit": least}
    row["share_of_limit"] = None if least is None else least / entry.median
    if entry.contender.family == "gemm":
        return row | {"giga_operations_per_second": gemm.giga_operations(entry.median, entry.contender.product)}
    ours = OURS if device == "cpu" else OURS_ON_GPU
    ratios = {name: entry.median / median for name in ours if (median := medians.get(name)) is not None}
    return row | {"times_ours": ratios}


def table(report: dict[str, Any]) -> str:
    """Markdown: a table per setting."""
    machine, ours = report["machine"], ours_of(report)
    gpu = f"{machine['gpu']}; " if "gpu" in machine else ""
    unit, peak = ("ms", "GPU, MB") if gpu else ("s", "peak, MB")
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines = [f"{gpu}{machine['cpu']}, {machine['cores']} cores, threads {machine['threads']}; {versions}"]
    for setting in report["settings"]:
        lines += ["", f"### {setting['side']}², batch {setting['batch']}, {report['rounds']} rounds", ""]
        products = [row for row in setting["rows"] if row["family"] == "gemm"]
        for row in products:
            lines.append(f"- {row['name']}: {row['reason'] if row['status'] == 'failed' else rates(row)}")
        header = ["contender", f"median, {unit}", "minimum to maximum", *(f"× {name}" for name in ours)]
        header += ["share of its limit", peak, "relative error"]
        lines += ["", "| " + " | ".join(header) + " |", "|---" + "|---:" * (len(header) - 1) + "|"]
        for row in setting["rows"]:
            if row["family"] != "gemm":
                lines.append("| " + " | ".join(cells(row, ours, 1e3 if gpu else 1)) + " |")
    return "\n".join(lines) + "\n"


def ours_of(report: dict[str, Any]) -> tuple[str, ...]:
    return OURS_ON_GPU if "gpu" in report["machine"] else OURS


def rates(row: dict[str, Any]) -> str:
    seconds, middle = row["seconds"], row["giga_operations_per_second"]
    slow, fast = (middle * seconds["p50"] / seconds[name] for name in ("max", "min"))
    return f"{middle:.0f} G operations/s ({slow:.0f} to {fast:.0f})"


def cells(row: dict[str, Any], ours: Sequence[str], unit: float) -> list[str]:
    """Of a table whose times are seconds times `unit`."""
    if row["status"] == "failed":
        return [row["label"], f"failed: {row['reason'].replace('|', '/')}", *["-"] * (len(ours) + 4)]
    seconds, share = {name: unit * value for name, value in row["seconds"].items()}, row["share_of_limit"]
    ratios = [f"{row['times_ours'][name]:.2f}" if name in row["times_ours"] else "-" for name in ours]
    spread = f"{seconds['min']:.3f} to {seconds['max']:.3f}"
    shares = "-" if share is None else f"{share:.0%}"
    peak = "-" if row["peak_memory"] is None else f"{row['peak_memory'] / 1e6:.0f}"
    return [row["label"], f"{seconds['p50']:.3f}", spread, *ratios, shares, peak, f"{row['relative_error']:.0e}"]


def draw(report: dict[str, Any], path: Path) -> None:
    """Bars of the medians, a panel per setting, and what our folded linear models' products take at least."""
    from matplotlib.figure import Figure

    settings = report["settings"]
    bars = [row for row in settings[0]["rows"] if row["family"] != "gemm"]
    figure = Figure(figsize=(3 + 4.5 * len(settings), 1.6 + 0.32 * len(bars)), dpi=150, layout="constrained")
    panels = figure.subplots(1, len(settings), sharey=True, squeeze=False)[0]
    for axes, setting in zip(panels, settings, strict=True):
        rows = {row["name"]: row for row in setting["rows"]}
        longest = max((row["seconds"]["max"] for row in map(rows.get, names(bars)) if "seconds" in row), default=1.0)
        for name, style in zip(ours_of(report), ("--", ":"), strict=True):
            if (least := rows.get(name, {}).get("limit")) is not None:
                axes.axvline(least, color="black", linestyle=style, linewidth=1, label=f"GEMM limit of {name}, folded")
        for y, name in enumerate(names(bars)):
            row = rows[name]
            if row["status"] == "failed":
                axes.text(0.015 * longest, y, "failed", va="center", fontsize=8, color="#666666")
                continue
            seconds = row["seconds"]
            axes.barh(y, seconds["p50"], color=COLOURS[row["family"]], alpha=1 if row["how"] in WAYS_OF_OURS else 0.45)
            axes.plot([seconds["min"], seconds["max"]], [y, y], color="black", linewidth=1)
            text = axes.text(seconds["max"] + 0.015 * longest, y, f"{seconds['p50']:.3g} s", va="center", fontsize=8)
            text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.5})
        axes.set(xlabel="median time of a batch, seconds", title=f"{setting['side']}², batch {setting['batch']}")
        axes.set(yticks=range(len(bars)), yticklabels=[row["label"] for row in bars])
        axes.set(xlim=(0, 1.14 * longest), ylim=(len(bars) - 0.4, -0.6))
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    figure.savefig(path, metadata={"Software": None})


def names(rows: Sequence[dict[str, Any]]) -> list[str]:
    return [row["name"] for row in rows]
