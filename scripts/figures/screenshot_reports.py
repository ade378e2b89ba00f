#!/usr/bin/env python3
"""Make the pictures of docs/parity.md: a report of a bundle that holds, one of a wrong weight in a layer, a heat map.

python scripts/figures/screenshot_reports.py   # needs a Chromium: apt-get install chromium
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnx.external_data_helper import ExternalDataInfo
from PIL import Image
from train_canvases import save_samples

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs" / "parity"
WEIGHT = "network.encoder.layers.2.attn.attention.v_proj.weight"
WIDTH, HEIGHTS = 1280, {"passing": 1900, "failing": 2660}
CANVAS = "128/8"
"""A class and size of those that train_canvases.py draws, whose first is shown."""
COLOURS = 128
"""Of a picture: a page has few, and the file is a third of the size."""


def break_bundle(bundle: Path, weight: str = WEIGHT) -> None:
    """Transpose a square weight, as a faulty export might: every shape stays right."""
    graph = onnx.load(bundle / "model.onnx", load_external_data=False).graph
    tensor = next(each for each in graph.initializer if each.name == weight)
    place = ExternalDataInfo(tensor)
    with (bundle / place.location).open("r+b") as file:
        file.seek(place.offset)
        values = np.frombuffer(file.read(place.length), np.float32).reshape(tensor.dims)
        file.seek(place.offset)
        file.write(np.ascontiguousarray(values.T).tobytes())


def screenshot(browser: str, page: Path, height: int, picture: Path, folder: Path) -> None:
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
    options += [f"--user-data-dir={folder}", f"--window-size={WIDTH},{height}", f"--screenshot={folder / 'shot.png'}"]
    subprocess.run([browser, *options, page.as_uri()], check=True, stderr=subprocess.DEVNULL)
    image = Image.open(folder / "shot.png").convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
    image.save(picture, optimize=True)
    print(picture.relative_to(ROOT), f"{picture.stat().st_size / 1000:.0f} kB")


def main() -> None:
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        sys.exit("no Chromium here: apt-get install chromium")
    DOCS.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "models").symlink_to(ROOT / "models")  # so that the reports say what a reader would type

        def infexport(*arguments: str) -> int:
            return subprocess.run([sys.executable, "-m", "infexport", *arguments], cwd=folder).returncode

        infexport("convert", "checkpoint", "models/zoo/digits-linear", "--output", "bundle")
        shutil.copytree(folder / "bundle", folder / "broken")
        break_bundle(folder / "broken")
        judge = ("--sizes", "32,48x64,128", "--images", "models/zoo/digits-held-out", "--layers")
        assert infexport("validate", "parity", "bundle", *judge, "--report", "passing.html") == 0
        assert infexport("validate", "parity", "broken", *judge, "--no-verify", "--report", "failing.html") == 1
        for page, height in HEIGHTS.items():
            file = folder / f"{page}.html"
            file.write_text(file.read_text().replace(f"{folder}/", ""))  # it means nothing to a reader
            screenshot(browser, file, height, DOCS / f"{page}.png", folder)
        save_samples(folder / "canvases")
        canvas = str(next(Path(folder / "canvases" / CANVAS).iterdir()))
        infexport("convert", "checkpoint", "models/zoo/canvases-linear", "--output", "canvas-bundle")
        infexport("run-engine", "canvas-bundle", canvas, "--size", "native", "--heatmaps", "heatmaps")
        (heatmap,) = (folder / "heatmaps").glob("*.png")
        shutil.copy(heatmap, DOCS / "heatmap.png")


if __name__ == "__main__":
    main()
