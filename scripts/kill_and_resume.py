#!/usr/bin/env python3
"""Kill a streamed run at random moments, run the same command again, and compare.

    python scripts/kill_and_resume.py --times 10

The paper's 53.5M model, random weights, on a 2304² BigTIFF. Each time the run is killed with SIGKILL at a random moment
and the same command then goes on. Its logits must be those of a run that was never killed, bit for bit.
"""

from __future__ import annotations

import argparse
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=10, help="kills [10]")
    parser.add_argument("--side", type=int, default=2304, help="of the image, in pixels [2304]")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        bundle = bench_stream.make_bundle(bench_stream.Case("linear", "fp32", options.side, "disk"), folder)
        make_bigtiff.write(folder / "image.tif", options.side, options.side, make_bigtiff.photographs([]))
        command = [
            sys.executable,
            "-m",
            "infexport",
            "run-engine",
            bundle.path,
            folder / "image.tif",
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

        whole, expected, _ = run()
        print(f"never killed: {whole:.2f} s")
        chance = random.Random(0)
        for _ in range(options.times):
            at = chance.uniform(0.1, 0.95) * whole
            with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as killed:
                time.sleep(at)
                killed.send_signal(signal.SIGKILL)
            seconds, logits, messages = run()
            same = "same logits" if np.array_equal(logits, expected) else "OTHER LOGITS"
            went_on = "went on" if "going on" in messages else "nothing was recorded yet"
            left = list((folder / "scratch").iterdir())
            print(f"killed after {at:.2f} s, {went_on}: {seconds:.2f} s, {same}, {len(left)} files left")


if __name__ == "__main__":
    main()
