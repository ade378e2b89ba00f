"""Outputs that lie where images, tables or bundles are: what is read stays as it is, and answers are those of it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image

from hostile.cases import Case
from hostile.watch import Violation
from infexport.bundle import open_bundle
from infexport.inference.prediction import Prediction
from infexport.inference.predictor import Predictor

NAMES = ("a.png", "a.jpg", "a.webp", "b.PNG", "b-2.png", "a-2.png", "c.tif", "sub/a.png", "sub/deep/b.bmp", "é 猫.png")


def make(case: Case) -> Callable[[], int | None]:
    chance, root = case.chance, case.made
    images = root / "images"
    files = [images / name for name in chance.sample(NAMES, chance.randrange(1, 6))]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(chance.randrange(2**32)).integers(0, 256, (64, 64, 3), np.uint8)
        Image.fromarray(pixels).save(file)
    bundle = case.seeds.copy_bundle(root / "bundle")
    (root / "table.csv").write_text("file,label\n" + "".join(f"{file},1\n" for file in files))
    for name, target in (("link", images), ("bundle-link", bundle), ("out.json", chance.choice(files)), ("loop", root)):
        if chance.random() < 0.5:
            (root / name).symlink_to(target)
    if chance.random() < 0.3:
        with suppress(FileExistsError):
            (root / "maps").mkdir()
            os.link(chance.choice(files), root / "maps" / "a.png")
    folders = [
        images,
        images / "sub",
        root / "link",
        bundle,
        root / "bundle-link",
        bundle / "stream",
        root / "maps",
        root,
    ]
    arguments = chance.choice(
        ([images], files, [files[0]], [f"file://{file}" for file in files], [root / "link"], [root])
    )
    words: list[object] = ["run-engine", bundle, *arguments, "--threads", "1", "--json"]
    if chance.random() < 0.25:
        words = ["validate", "accuracy", bundle, chance.choice((root / "table.csv", images)), "--no-pytorch", "--json"]
    elif chance.random() < 0.7:
        words += ["--heatmaps", chance.choice(folders)]
    if chance.random() < 0.6:
        names = ("out.json", "labels.json", "infexport.json", "table.csv", "a.csv", "a.npz", "model.onnx.csv")
        words += ["-o", chance.choice((*(folder / chance.choice(names) for folder in folders), root / "table.csv"))]
    # an output may be a link to an image that this command does not read
    read = files[:1] if words[0] == "run-engine" and arguments == files[:1] else files
    before = {path: path.read_bytes() for path in (*read, *(path for path in bundle.rglob("*") if path.is_file()))}
    truth = _truth(case, files)
    if root / "table.csv" in words[:4]:
        before[root / "table.csv"] = (root / "table.csv").read_bytes()
    return lambda: _act(case, words, before, truth)


def _truth(case: Case, files: list[Path]) -> dict[bytes, int]:
    """Content of every image → its class."""
    reference = case.seeds.once("plain", lambda: Predictor(case.seeds.bundle, threads=1))
    rows = reference.predict(files)
    found = zip(files, rows, strict=True)
    return {file.read_bytes(): int(row.logits.argmax()) for file, row in found if isinstance(row, Prediction)}


def _act(case: Case, words: list[object], before: dict[Path, bytes], truth: dict[bytes, int]) -> int | None:
    told = " ".join(map(str, words[2:]))[:400]
    last = 0
    for _ in range(2):  # what the first run wrote is there when the second reads
        code = case.cli(*words)
        for path, content in before.items():
            if not path.is_file() or path.read_bytes() != content:
                raise Violation("output", f"{path.name} was replaced: {told}")
        if not open_bundle(case.made / "bundle").verified:
            raise Violation("output", f"the bundle was changed: {told}")
        last = max(last, code)
    for file in case.made.rglob("*.json"):
        if file.is_file() and not file.is_symlink() and not file.is_relative_to(case.made / "bundle"):
            _check(json.loads(file.read_text()), truth, told)
    return last


def _check(document: object, truth: dict[bytes, int], told: str) -> None:
    images = document.get("images", []) if isinstance(document, dict) else []
    for image in images if isinstance(images, list) else []:
        file = Path(image["file"].removeprefix("file://"))
        expected = truth.get(file.read_bytes()) if file.is_file() else None
        if expected is None or image["top"][0]["index"] != expected:
            raise Violation("answer", f"{file.name} is answered with another image's class: {told}")
