#!/usr/bin/env python3
"""Kill a streamed run at random moments, run the same command again, and compare.

    python tests/robustness/kill_and_resume.py --times 10
    python tests/robustness/kill_and_resume.py --times 30 --damage cut

The paper's 53.5M model, random weights, on a 2304² BigTIFF. Each time the run is killed with SIGKILL at a random moment
and the same command then goes on. Its logits must be those of a run that was never killed, bit for bit.

With --damage, what it left is damaged first, or the image exchanged for one of equal size and time. The run must then
start anew, unless no damaged row is read again.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import bench_stream
import make_bigtiff
import numpy as np

DAMAGES = ("deleted", "cut", "overwritten", "exchanged")


def damage(kind: str, tokens: Path, chance: random.Random) -> None:
    """Damage the file of tokens that a killed run left."""
    size = tokens.stat().st_size
    if kind == "deleted":
        tokens.unlink()
    elif kind == "cut":
        os.truncate(tokens, chance.randrange(size))
    else:
        with tokens.open("r+b") as file:
            file.seek(chance.randrange(size))
            file.write(b"overwritten")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=10, help="kills [10]")
    parser.add_argument("--side", type=int, default=2304, help="of the image, in pixels [2304]")
    parser.add_argument("--damage", choices=DAMAGES, help="what is done after each kill [nothing]")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        bundle = bench_stream.make_bundle(bench_stream.Case("linear", "fp32", options.side, "disk"), folder)
        image, contents = folder / "image.tif", []
        for turned in (False, True):
            pictures = make_bigtiff.photographs([])
            make_bigtiff.write(image, options.side, options.side, [p[:, ::-1] if turned else p for p in pictures])
            contents.append(image.read_bytes())

        def show(content: bytes) -> None:
            image.write_bytes(content)
            os.utime(image, ns=(0, 0))

        command = [
            sys.executable,
            "-m",
            "infexport",
            "run-engine",
            bundle.path,
            image,
            "--size",
            "native",
        ]
        command += ["--execution", "stream", "--scratch", folder / "scratch", "--output", folder / "out.npz"]

        def run() -> tuple[float, np.ndarray, str]:
            started = time.perf_counter()
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            seconds = time.perf_counter() - started
            with np.load(folder / "out.npz") as arrays:
                return seconds, arrays["logits"], done.stderr

        show(contents[1])
        others = run()[1]
        show(contents[0])
        whole, expected, _ = run()
        print(f"never killed: {whole:.2f} s")
        chance = random.Random(0)
        for _ in range(options.times):
            at = chance.uniform(0.1, 0.95) * whole
            with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as killed:
                time.sleep(at)
                killed.send_signal(signal.SIGKILL)
            done = "killed"
            if options.damage == "exchanged":
                show(contents[1])
                same = "right" if np.array_equal(run()[1], others) else "WRONG"
                show(contents[0])
                done = f"killed, exchanged (its answer {same})"
            elif options.damage and (left := list((folder / "scratch").glob("*/tokens"))):
                damage(options.damage, left[0], chance)
                done = f"killed, tokens {options.damage}"
            seconds, logits, messages = run()
            same = "same logits" if np.array_equal(logits, expected) else "OTHER LOGITS"
            said = [line for line in messages.splitlines() if "going on" in line or "starting" in line]
            kept = list((folder / "scratch").iterdir())
            print(f"{done} after {at:.2f} s: {seconds:.2f} s, {same}, {len(kept)} folders left; {'; '.join(said)}")


if __name__ == "__main__":
    main()
