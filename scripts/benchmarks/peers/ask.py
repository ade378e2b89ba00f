"""The process that asks: it has the contenders prepared and started, and runs them in turn."""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from infexport.errors import InfexportError
from infexport.evaluation.benchmark.result import Spread
from infexport.system.workers import ending
from peers.contenders import Contender

SCRIPT = Path(__file__).parent.parent / "bench_peers.py"
"""What a contender's process runs."""
TOLERANCE = {"fp32": 1e-3, "fp16": 1e-2, "bf16": 5e-2, "int8": 5e-2}
"""Relative error of the logits against the first of the family that answers."""
INACCURATE = {"pure-ort": 2e-2}
"""Whose float32 is worse than that, and nothing else is wrong: ONNX Runtime's ReduceL2 of 4097² numbers is 5e-3 off."""


@dataclass
class Entry:
    """What became of a contender: `seconds` of the runs that count, or the `reason` why there are none (or no more)."""

    contender: Contender
    seconds: list[float] = dataclasses.field(default_factory=list)
    relative_error: float | None = None
    peak_memory: int | None = None
    reason: str = ""

    @property
    def median(self) -> float | None:
        return None if self.reason else Spread.of(self.seconds).p50


class Worker:
    """A contender in a process of its own."""

    def __init__(
        self, contender: Contender, folder: Path, threads: int | None, images: Path, device: str = "cpu"
    ) -> None:
        self.messages = tempfile.TemporaryFile("w+")  # noqa: SIM115
        arguments = ["--serve", contender.name, str(folder), str(threads or 0), str(images), device]
        self.process = subprocess.Popen(
            [sys.executable, SCRIPT, *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.messages, text=True,
        )  # fmt: skip

    def answer(self) -> dict[str, Any]:
        """The next line it says.

        Raises:
            InfexportError: it ended instead.
        """
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if line.endswith("\n"):
            found: dict[str, Any] = json.loads(line)
            return found
        code = self.process.wait()
        self.messages.seek(0)
        raise ending(code, self.messages.read())

    def run(self) -> dict[str, Any]:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it ended meanwhile, and its exit code says how
        return self.answer()

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        self.messages.close()


def prepare_all(contenders: Sequence[Contender], folder: Path, settings: Sequence[tuple[int, int]]) -> dict[str, str]:
    """Have what they run made, each in a process of its own; returns why not, by name, of those that failed.

    An engine takes images and batches from the smallest to the largest of the settings, and is best at the first.
    """
    profile = [f"{min(values)},{values[0]},{max(values)}" for values in zip(*settings, strict=True)]
    left_out: dict[str, str] = {}
    for contender in contenders:
        if contender.how not in ("bundle", "engine", "ort"):
            continue
        say(f"preparing {contender.name}")
        command = [sys.executable, SCRIPT, "--prepare", contender.name, folder, *profile]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            left_out[contender.name] = f"could not be made: {ending(done.returncode, done.stderr).one_line()}"
            say(f"  {left_out[contender.name]}")
    return left_out


@contextmanager
def started(
    entries: Sequence[Entry], folder: Path, threads: int | None, images: Path, device: str = "cpu"
) -> Iterator[dict[str, Worker]]:
    """A process for every contender that still can, each ready: one after the other, so that none waits for cores."""
    workers: dict[str, Worker] = {}
    with ExitStack() as stack:
        for entry in entries:
            if entry.reason:
                continue
            say(f"  starting {entry.contender.name}")
            worker = Worker(entry.contender, folder, threads, images, device)
            stack.callback(worker.close)
            try:
                worker.answer()
            except InfexportError as error:
                fail(entry, error.one_line())
            else:
                workers[entry.contender.name] = worker
        yield workers


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def fail(entry: Entry, reason: str) -> None:
    entry.reason = reason
    say(f"  {entry.contender.name}: {reason}")


def compare_logits(entries: Sequence[Entry], folder: Path, truth: dict[str, Any] | None = None) -> None:
    """Fail who doesn't say what the first of its family says, which is kept in `truth`."""
    truth = {} if truth is None else truth
    for entry in entries:
        contender = entry.contender
        if entry.reason or contender.family == "gemm":
            continue
        logits = np.load(folder / f"{contender.name}.logits.npy").astype(np.float64)
        base = truth.setdefault(contender.family, logits)
        entry.relative_error = float(np.linalg.norm(logits - base) / np.linalg.norm(base))
        if not entry.relative_error <= INACCURATE.get(contender.name, TOLERANCE[contender.precision]):
            fail(entry, f"its logits are not its family's: relative error {entry.relative_error:.1e}")


def measure(side: int, batch: int, left_out: dict[str, str], contenders: Sequence[Contender], folder: Path,
            options: argparse.Namespace) -> list[Entry]:  # fmt: skip
    """One setting: every contender `options.rounds` times, in turn; on a GPU one after the other, since what they keep
    of its memory would leave the others none.
    """
    entries = [Entry(contender, reason=left_out.get(contender.name, "")) for contender in contenders]
    images = folder / "images.npy"
    np.save(images, np.random.default_rng(0).integers(0, 256, (batch, side, side, 3), dtype=np.uint8))
    truth: dict[str, Any] = {}
    for group in [entries] if options.device == "cpu" else [[entry] for entry in entries]:
        with started(group, folder, options.threads, images, options.device) as workers:
            compare_logits(group, folder, truth)
            for i in range(-options.warmup, options.rounds):
                if options.device == "cpu":
                    say(f"  round {i + 1} of {options.rounds}" if i >= 0 else "  warm-up")
                run_round(group, workers, counts=i >= 0)
    return entries


def run_round(entries: Sequence[Entry], workers: dict[str, Worker], counts: bool) -> None:
    """Every contender that still can, once."""
    for entry in entries:
        if entry.reason:
            continue
        try:
            found = workers[entry.contender.name].run()
        except InfexportError as error:
            fail(entry, error.one_line())
            continue
        entry.peak_memory = found["peak_memory"]
        if counts:
            entry.seconds.append(found["seconds"])
