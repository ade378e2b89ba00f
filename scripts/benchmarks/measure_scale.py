#!/usr/bin/env python3
"""Measure what docs/scale.md says: many images on Ray workers, one image on several, and the terms of the cost model.

    python scripts/benchmarks/measure_scale.py --output scale.json

Commands are measured whole, each a process of its own. The paper's 53.5M model has random weights, the digits' is the
zoo's. Run it on an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import make_bigtiff
import numpy as np
import train_digits
from bench_stream import Case, make_bundle, measure
from PIL import Image

from infexport.bundle import Bundle
from infexport.inference.options import InferenceOptions
from infexport.inference.prediction import Prediction
from infexport.inference.streaming.sharding import exchanged_bytes
from infexport.integrations.ray.cluster import Workers, connected
from infexport.integrations.ray.shards import predict
from infexport.system.host import cpu_model, usable_cores
from infexport.system.progress import ProgressEvent, ProgressListener, StageProgress

COPIES = 10
"""Of the 450 held-out digits."""
REPEATS = 3
INFEXPORT = [sys.executable, "-m", "infexport"]


def spread(seconds: list[float]) -> dict[str, float]:
    return {"median": statistics.median(seconds), "least": min(seconds), "most": max(seconds)}


def many(folder: Path, copies: int) -> dict[str, Any]:
    """The held-out digits, again and again: by one process, and by workers."""
    bundle, digits = folder / "digits", folder / "images"
    subprocess.run([*INFEXPORT, "convert", "checkpoint", "models/zoo/digits-linear", "-o", bundle], check=True)
    digits.mkdir()
    _, _, images, _ = train_digits.digits()
    for copy in range(copies):
        for index, image in enumerate(images):
            Image.fromarray(image).save(digits / f"{copy}-{index}.png")
    few = folder / "few"
    few.mkdir()
    for file in sorted(digits.iterdir())[:2]:
        shutil.copy(file, few)

    def run(images: Path, *options: str) -> list[float]:
        output = folder / "out.npz"
        command = [*INFEXPORT, "run-engine", bundle, images, "-o", output, "--batch-size", "8", "--threads", "1"]
        return [measure([str(part) for part in (*command, *options)])[0] for _ in range(REPEATS)]

    ways = {"one process": [], "1 worker": ["--ray", "local", "--workers", "1"], "2 workers": ["--ray", "local"]}
    found = {}
    for name, options in ways.items():
        all_of_them, start = run(digits, *options), run(few, *options)
        count = copies * len(images)
        steady = count / (statistics.median(all_of_them) - statistics.median(start))
        found[name] = {"seconds": spread(all_of_them), "start": spread(start), "images per second": steady}
    return {"images": copies * 450, "ways": found}


def one(folder: Path, side: int, precision: str) -> dict[str, Any]:
    """One large image: by one process with all cores, and by two workers with half of them each."""
    bundle, image = make_bundle(Case("linear", precision, side, "memory"), folder), folder / f"{side}.tif"
    if not image.exists():
        make_bigtiff.write(image, side, side, make_bigtiff.photographs([]))
    half = str(max(1, usable_cores() // 2))
    ways = {
        "one process": ["--execution", "stream"],
        "2 workers": ["--ray", "local", "--shard-image", "--workers", "2", "--threads", half],
    }
    found: dict[str, Any] = {}
    logits = {}
    for name, options in ways.items():
        output = folder / "out.npz"
        command = [*INFEXPORT, "run-engine", bundle.path, image, "--size", "native", "-o", output, *options]
        started = time.perf_counter()
        done = subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True)
        found[name] = {"seconds": time.perf_counter() - started}
        with np.load(output) as arrays:
            logits[name] = arrays["logits"].astype(np.float64)
        told = re.search(r"exchanged ([\d,]+) bytes of sums and ([\d,]+) of tokens", done.stderr)
        if told:
            sums, tokens = (int(text.replace(",", "")) for text in told.groups())
            found[name] |= {"sums": sums, "tokens": tokens, "promised": exchanged_bytes(bundle.manifest.config, 2)}
            assert sums == found[name]["promised"], "what is exchanged is what the model says"
    difference = np.linalg.norm(logits["2 workers"] - logits["one process"]) / np.linalg.norm(logits["one process"])
    return {"side": side, "precision": precision, "ways": found, "relative difference": float(difference)}


class Rounds(ProgressListener):
    """Times the stages of a run."""

    def __init__(self) -> None:
        self.times: list[tuple[float, float]] = []

    def on_event(self, event: ProgressEvent) -> None:
        if isinstance(event, StageProgress) and event.done == event.total:
            self.times.append((time.perf_counter(), time.process_time()))

    @property
    def seconds(self) -> tuple[float, float]:
        """Of a round, a stage of which every worker does next to nothing, and of a core by who tells and adds."""
        wall, core = np.median(np.diff(self.times, axis=0)[1:-1], axis=0)
        return float(wall), float(core)


def rounds(bundle: Bundle, folder: Path, counts: Sequence[int] = (1, 2, 4, 8, 16)) -> dict[int, tuple[float, float]]:
    """As of `Rounds.seconds`, by the number of workers, all on the cores of this machine: a row of patches each."""
    found = {}
    image = folder / "small.png"
    patch = bundle.manifest.config.patch_size
    Image.fromarray(np.zeros((patch * max(counts), patch, 3), np.uint8)).save(image)
    options = InferenceOptions(execution="stream", memory=2**30, size="native")
    with connected("local") as ray:
        ray.shutdown()
        ray.init(num_cpus=max(counts), include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        for count in counts:
            times = []
            for _ in range(REPEATS):
                listener = Rounds()
                (row,) = predict(ray, Workers(count, 1, 0, 2**30), bundle, options, [image], listener)
                assert isinstance(row, Prediction), row
                times.append(listener.seconds)
            found[count] = min(times)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--side", type=int, default=9216)
    parser.add_argument("--copies", type=int, default=COPIES)
    options = parser.parse_args()
    parts: dict[str, Callable[[Path], Any]] = {
        "many": lambda folder: many(folder, options.copies),
        "one": lambda folder: [one(folder, options.side, precision) for precision in ("fp32", "int8")],
        "rounds": lambda folder: rounds(make_bundle(Case("linear", "fp32", 0, "memory"), folder), folder),
    }
    found: dict[str, Any] = {"cpu": cpu_model(), "cores": usable_cores()}
    with tempfile.TemporaryDirectory() as name:
        for part, run in parts.items():
            found[part] = run(Path(name))
            print(json.dumps({part: found[part]}, indent=2), flush=True)
    options.output.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
