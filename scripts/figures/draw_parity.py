#!/usr/bin/env python3
"""Draw models/zoo/parity.png: the zoo's error against float64 at every resolution, as `validate parity` measures it.

python scripts/figures/draw_parity.py
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ZOO = Path(__file__).resolve().parents[2] / "models" / "zoo"
SIZES = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512)
COLOURS = {"digits-linear": "#0b6e99", "digits-pure": "#c1440e"}


def infexport(*arguments: object) -> str:
    command = [sys.executable, "-m", "infexport", *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def measure(name: str, folder: Path) -> dict[str, Any]:
    infexport("convert", "checkpoint", ZOO / name, "--output", folder / name)
    sizes = ",".join(map(str, SIZES))
    report: dict[str, Any] = json.loads(infexport("validate", "parity", folder / name, "--sizes", sizes, "--json"))
    return report


def main() -> None:
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(figsize=(8, 3.4), dpi=150, layout="constrained")
    with tempfile.TemporaryDirectory() as folder:
        for name, colour in COLOURS.items():
            report = measure(name, Path(folder))
            for key, style, label in (("bundle", "o-", "ONNX bundle"), ("torch_float32", "x:", "PyTorch float32")):
                errors = [case[key]["relative"] for case in report["cases"]]
                axes.plot(SIZES, errors, style, color=colour, label=f"{name}, {label}", markersize=5)
            tolerance = report["tolerance"]["relative"]
    axes.axhline(tolerance, color="#444", linewidth=1, linestyle="--")
    axes.text(SIZES[0], tolerance * 1.08, f"tolerance {tolerance:.1e}", color="#444", va="bottom")
    axes.set(xscale="log", yscale="log", xlabel="image side, pixels (trained at 32)", ylim=(1e-7, 3 * tolerance))
    axes.set_ylabel("relative error\nagainst float64")
    axes.set_xticks(SIZES, [str(size) for size in SIZES])
    axes.minorticks_off()
    axes.legend(ncols=2, frameon=False, loc="center right", bbox_to_anchor=(1, 0.62))
    axes.set_title("Parity at every resolution: one graph, float32 rounding and nothing else", fontsize=11)
    figure.savefig(ZOO / "parity.png", metadata={"Software": None})


if __name__ == "__main__":
    main()
