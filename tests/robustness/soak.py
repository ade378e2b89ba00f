#!/usr/bin/env python3
"""Predict for a long time in one process, in every way there is, and say whether anything grows.

    python tests/robustness/soak.py --count 20000 --output soak.json --plot soak.png

Rounds of a hundred requests: files and arrays at the trained size, images of ever other sizes as they are, streamed in
memory and on disk, centrality, images that are damaged, a predictor that is opened and closed, results written. After
each round resident memory, open files and threads are counted. What does not change must not: the same images get the
same answers, bit for bit, from the first round to the last. Exit code 0: nothing grows; 1: something does, or it
cannot be told.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from infexport import Predictor
from infexport.inference.prediction import Failure, ImageResult, Prediction
from infexport.outputs import heatmaps
from infexport.outputs.results import Results
from infexport.system.host import cpu_model, threads_alive, usable_cores

ROOT = Path(__file__).resolve().parents[2]
DIGITS = ROOT / "models" / "zoo" / "digits-held-out"
FORMATS = (".jpg", ".png", ".tif", ".webp")
LARGEST = 160
"""Pixels of a side."""
HEAT_MAPS_EVERY = 5
"""Rounds; a figure takes as long as a hundred predictions."""
WARM_UP = 0.25
"""Of the predictions: pools fill, modules are imported when they are first needed."""
OVER, ALLOWED = 20_000, 8 * 2**20
"""So many predictions may take so many bytes more. Heaps that fragment, and Python's table of names, which doubles when
it is full, move by 5 MB in as many; what is lost with every shape, file or figure, by many times that."""
CERTAIN = 16 * 2**20
"""With an uncertainty of more than that many bytes over as many predictions nothing can be said."""


@dataclass(frozen=True)
class Sample:
    """What the process holds after a round.

    Attributes:
        predictions: so far.
        resident: bytes, as they are.
        held: bytes resident when Python's garbage is collected and the C library has given back what is free: what is
            kept, without what merely waits.
        descriptors, threads: open, alive.
        blocks: of Python's own memory: where these grow, too, it is Python objects that are kept.
    """

    predictions: int
    resident: int
    held: int
    descriptors: int
    threads: int
    blocks: int


@dataclass(frozen=True)
class Verdict:
    """Whether anything grows.

    Attributes:
        verdict: `leak`, `no leak`, or `undecided`.
        slope: of the memory held after the warm-up, in bytes per prediction.
        error: its standard error, which counts that a sample resembles the one before.
        blocks: slope of Python's blocks per prediction.
        reasons: in words.
    """

    verdict: Literal["leak", "no leak", "undecided"]
    slope: float
    error: float
    blocks: float
    reasons: list[str]


def judge(samples: Sequence[Sample]) -> Verdict:
    """What samples of a run say, the first quarter left out.

    Memory is lost where the slope is beyond two standard errors and amounts to more than ALLOWED over OVER predictions.

    Raises:
        ValueError: fewer than 8 samples are left.
    """
    steady = [one for one in samples if one.predictions >= WARM_UP * samples[-1].predictions]
    if len(steady) < 8:
        raise ValueError(f"received {len(steady)} samples after the warm-up, expected at least 8: a larger --count")
    at = [one.predictions for one in steady]
    slope, error = line(at, [one.held for one in steady])
    blocks, _ = line(at, [one.blocks for one in steady])
    grown, unsure = slope * OVER, 2 * error * OVER
    reasons = [f"memory held: {slope:+.1f} ± {error:.1f} bytes per prediction, {grown / 1e6:+.2f} MB over {OVER:,}"]
    found: Literal["leak", "no leak", "undecided"] = "no leak"
    if grown > max(ALLOWED, unsure):
        found = "leak"
        reasons.append(f"expected less than {ALLOWED / 1e6:.1f} MB, or two standard errors")
    elif unsure > CERTAIN:
        found = "undecided"
        reasons.append(f"two standard errors are {unsure / 1e6:.1f} MB: too much to tell")
    for name in ("descriptors", "threads"):
        # a thread of a pool may live a moment longer than what it was for
        first, last = (min(getattr(one, name) for one in part) for part in (steady[:4], steady[-4:]))
        reasons.append(f"{name}: {first} at the start, {last} at the end")
        if last > first:
            found = "leak"
    return Verdict(found, slope, error, blocks, reasons)


def line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Slope of the least-squares line and its standard error.

    Memory moves in steps, so residuals resemble their neighbours: the error is that of as many samples as are worth
    something, n·(1 − r)/(1 + r), r the correlation of neighbours.
    """
    at, values = np.asarray(x, np.float64), np.asarray(y, np.float64)
    at = at - at.mean()
    slope = float(at @ values / (at @ at))
    rest = values - values.mean() - slope * at
    spread = float(rest @ rest)
    if not spread:
        return slope, 0.0
    likeness = min(0.95, max(0.0, float(rest[1:] @ rest[:-1]) / spread))
    error = np.sqrt(spread / (len(at) - 2) / (at @ at) * (1 + likeness) / (1 - likeness))
    return slope, float(error)


def sample(predictions: int) -> Sample:
    """Of this process, now."""
    before = resident()
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc's
        trim(0)
    descriptors = len(list(Path("/proc/self/fd").iterdir())) - 1  # the one that lists them is none of ours
    return Sample(predictions, before, resident(), descriptors, threads_alive() or 0, sys.getallocatedblocks())


def resident() -> int:
    """Bytes of this process in memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))


class Traffic:
    """Requests to one bundle, through predictors that are kept open and others that are not.

    Args:
        bundle: a folder, with stages and centrality.
        folder: for images, tokens and results.
        seed: of the images' sizes and pixels.
    """

    def __init__(self, bundle: Path, folder: Path, seed: int = 0) -> None:
        self._bundle, self._folder = bundle, folder
        self._random = np.random.default_rng(seed)
        self._open = ExitStack()
        self._digits = sorted(DIGITS.glob("*.png"))
        self._first: NDArray[Any] | None = None
        self.trained = self._predictor(batch_size=8)
        self.native = self._predictor(size="native", batch_size=4)
        self.memory = self._predictor(size="native", execution="stream", chunk=64)
        self.disk = self._predictor(size="native", execution="stream", scratch=folder / "scratch")
        self.mapped = self._predictor(size="native", centrality=True)
        self._fill()

    def __enter__(self) -> Traffic:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def _predictor(self, **options: Any) -> Predictor:
        return self._open.enter_context(Predictor(self._bundle, threads=1, **options))

    def _fill(self) -> None:
        """Meet the largest there is at once: pools grow to that, which at random takes thousands of images."""
        largest = np.zeros((LARGEST, LARGEST, 3), np.uint8)
        for predictor in (self.trained, self.native, self.memory, self.disk, self.mapped):
            predictor.predict([largest] * 8)

    def round(self, number: int) -> int:
        """A hundred requests; how many images were asked about."""
        files = self._files(8)
        damaged = self._damaged(files)
        rows: list[ImageResult] = []
        for batch in (self._digits[:8], files[:4] + self._digits[8:12], files[4:] + self._digits[12:16]):
            rows += self.trained.predict(batch)
        self._same(rows[:8])
        for _ in range(3):
            rows += self.trained.predict(self._arrays(8))
        for _ in range(6):
            rows += self.native.predict(self._arrays(4))
        rows += self.native.predict(files[:6])
        rows += self.memory.predict([files[0], *self._arrays(1)])
        rows += self.disk.predict(files[1:2])
        mapped = self.mapped.predict([files[2], *self._arrays(1)])
        answers = [self.trained.predict(damaged), [self._reopened()]]
        assert all(isinstance(row, Prediction) for row in [*rows, *mapped]), rows
        assert all(isinstance(row, Failure) for row in answers[0]), answers
        columns = self.trained(files)
        assert len(columns["label"]) == 8
        rows += [*mapped, *answers[0], *answers[1]]
        self._write(rows, number)
        if number % HEAT_MAPS_EVERY == 0:
            self._draw(files[2], mapped[0])
        return len(rows) + len(files)

    def _picture(self) -> NDArray[np.uint8]:
        """Of a size and of pixels that were not there before."""
        height, width = self._random.integers(8, LARGEST + 1, 2)
        coarse = self._random.integers(0, 256, (4, 4, 3), np.uint8)
        return np.asarray(Image.fromarray(coarse).resize((int(width), int(height))))

    def _arrays(self, count: int) -> list[NDArray[np.uint8]]:
        return [self._picture() for _ in range(count)]

    def _files(self, count: int) -> list[Path]:
        """Written anew, in all formats."""
        files = []
        for index in range(count):
            file = self._folder / f"picture-{index}{FORMATS[index % len(FORMATS)]}"
            Image.fromarray(self._picture()).save(file)
            files.append(file)
        return files

    def _damaged(self, files: Sequence[Path]) -> list[Path | NDArray[Any]]:
        """Four files and an array that must fail."""
        found: list[Path | NDArray[Any]] = [self._folder / "missing.png", np.zeros((4, 4))]
        for file in files[:3]:
            content = file.read_bytes()
            damaged = self._folder / f"damaged{file.suffix}"
            damaged.write_bytes(content[: len(content) // 3])
            found.append(damaged)
        return found

    def _same(self, rows: Sequence[ImageResult]) -> None:
        """The same digits have the same answers as in the first round."""
        logits = np.stack([row.logits for row in rows if isinstance(row, Prediction)])
        self._first = logits if self._first is None else self._first
        assert np.array_equal(logits, self._first), "the same images were answered otherwise than before"

    def _reopened(self) -> ImageResult:
        """By a predictor that comes out of a pickle, and is closed."""
        with pickle.loads(pickle.dumps(self.trained)) as predictor:
            (row,) = predictor.predict(self._digits[:1])
        return row

    def _write(self, rows: Sequence[ImageResult], number: int) -> None:
        bundle = self.trained.bundle
        config = bundle.manifest.config
        results = Results(rows, bundle.labels, [], 3, True, (config.num_classes, config.embed_dim))
        json.dumps(results.to_dict())
        suffix = (".json", ".csv", ".npz", ".parquet")[number % 4]
        results.write(self._folder / f"results{suffix}")

    def _draw(self, file: Path, answer: ImageResult) -> None:
        assert isinstance(answer, Prediction)
        assert answer.centrality is not None
        manifest = self.mapped.bundle.manifest
        pixels, image = heatmaps.overview(file)
        transform = manifest.preprocessing.transform
        extent = heatmaps.region(image, answer.grid, manifest.config.patch_size, "native", transform)
        figure = heatmaps.draw_figure(answer.centrality, pixels, image, extent, "soak")
        heatmaps.save(figure, self._folder / "map.png")
        figure.clear()  # as run-engine does


def soak(
    bundle: Path, count: int, seed: int = 0, after: Callable[[int], object] = lambda predictions: None
) -> list[Sample]:
    """Samples of at least so many predictions, one a round.

    Args:
        bundle, seed: as of `Traffic`.
        count: predictions.
        after: called with the number of predictions after each round, before the sample.
    """
    samples: list[Sample] = []
    with tempfile.TemporaryDirectory() as folder, Traffic(bundle, Path(folder), seed) as traffic:
        done = number = 0
        while done < count:
            done += traffic.round(number)
            number += 1
            after(done)
            samples.append(sample(done))
    return samples


def draw(samples: Sequence[Sample], verdict: Verdict, path: Path) -> None:
    """Resident memory, open files and threads over predictions, 1500×600 pixels."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), dpi=150, layout="constrained")
    memory, counts = figure.subplots(1, 2)
    at = [one.predictions for one in samples]
    memory.plot(at, [one.resident / 1e6 for one in samples], color="#cccccc", label="as it is")
    memory.plot(at, [one.held / 1e6 for one in samples], color="#0072B2", label="held")
    memory.axvspan(0, WARM_UP * at[-1], color="#eeeeee", label="warm-up, not counted")
    memory.set(xlabel="predictions", ylabel="resident memory, MB", ylim=(0, None), title=verdict.reasons[0])
    memory.title.set_fontsize(9)
    memory.legend(frameon=False, loc="lower right")
    counts.plot(at, [one.descriptors for one in samples], color="#D55E00", label="open files")
    counts.plot(at, [one.threads for one in samples], color="#009E73", label="threads")
    counts.set(xlabel="predictions", ylim=(0, None))
    counts.legend(frameon=False)
    figure.savefig(path, metadata={"Software": None})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20_000, help="predictions, at least (default 20000)")
    parser.add_argument("--bundle", type=Path, help="a bundle (default: the shipped digits, converted first)")
    parser.add_argument("--output", type=Path, help="write the figures, as JSON")
    parser.add_argument("--plot", type=Path, help="draw them, as PNG")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for path in filter(None, (arguments.output, arguments.plot)):
        if not path.parent.is_dir():  # better now than when all is done
            parser.error(f"no such folder: {path.parent}")

    started, told = time.monotonic(), 0.0

    def tell(done: int) -> None:
        nonlocal told
        if time.monotonic() - told > 10:
            told = time.monotonic()
            print(f"{done:,} predictions, {resident() / 1e6:.1f} MB", file=sys.stderr)

    with tempfile.TemporaryDirectory() as folder:
        bundle = arguments.bundle
        if bundle is None:  # in a process of its own: what converting takes is not what predicting takes
            bundle = Path(folder) / "bundle"
            command = ["convert", "checkpoint", str(DIGITS.parent / "digits-linear"), "--output", str(bundle)]
            subprocess.run([sys.executable, "-m", "infexport", *command], check=True, stdout=subprocess.DEVNULL)
        samples = soak(bundle, arguments.count, arguments.seed, tell)
    try:
        verdict = judge(samples)
    except ValueError as error:
        parser.error(str(error))
    print("\n".join([verdict.verdict, *verdict.reasons]))
    if arguments.output is not None:
        document = {
            "predictions": samples[-1].predictions,
            "seconds": time.monotonic() - started,
            "machine": {"cpu": cpu_model(), "cores": usable_cores()},
            **asdict(verdict),
            "samples": [asdict(one) for one in samples],
        }
        arguments.output.write_text(json.dumps(document, indent=2) + "\n")
    if arguments.plot is not None:
        draw(samples, verdict, arguments.plot)
    return 0 if verdict.verdict == "no leak" else 1


if __name__ == "__main__":
    sys.exit(main())
