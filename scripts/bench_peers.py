#!/usr/bin/env python3
"""Measure infexport's bundles beside what one would run without it, on this machine, all in turn.

    python scripts/bench_peers.py --json peers.json --table peers.md --plot peers.png

The peers are the paper's formulas in plain torch, and the softmax ViT of the same shape: eager, through torch.compile,
and through plain torch.onnx.export in ONNX Runtime. Every contender has a process of its own and is asked in turn,
round after round, so that what else the machine does falls on all alike. Each is given what it takes, outside the
clock: bundles uint8 images, which they normalise themselves, peers normalised pixels. Before the clock starts, its
logits must be those of its family. The yardstick, one large matrix product, is a contender like the others. Peak memory
includes torch, which every process has imported. Run it on an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import sys
import tempfile
from pathlib import Path

import torch
from peers.ask import INACCURATE, TOLERANCE, measure, prepare_all, say
from peers.contenders import BY_NAME, chosen
from peers.networks import CONFIGS
from peers.report import draw, row_of, table
from peers.worker import prepare, serve

from infexport.machine import cpu_model, usable_cores


def integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=integers, default=[1024, 512], help="sides of the images [1024,512]")
    parser.add_argument("--batches", type=integers, default=[1, 8], help="images at once, one for each size [1,8]")
    parser.add_argument("--rounds", type=int, default=7, help="that count [7]")
    parser.add_argument("--warmup", type=int, default=1, help="rounds that don't [1]")
    parser.add_argument("--threads", type=int, help="of each contender [its own default]")
    parser.add_argument("--only", metavar="NAME,…", help=f"leave out the others of {', '.join(BY_NAME)}")
    for name, what in (("json", "everything"), ("table", "the tables, Markdown [stdout]"), ("plot", "a .png picture")):
        parser.add_argument(f"--{name}", type=Path, metavar="FILE", help=f"write {what}")
    options = parser.parse_args()
    patches = {config.patch_size for config in CONFIGS.values()}
    if len(options.sizes) != len(options.batches):
        parser.error("--sizes and --batches go together: give as many of the one as of the other")
    if any(side < 1 or side % patch for side in options.sizes for patch in patches):
        parser.error(f"--sizes must be multiples of the patch, {max(patches)}")
    if min(options.batches) < 1 or options.rounds < 1 or options.warmup < 0:
        parser.error("--batches and --rounds must be at least 1")
    try:
        options.contenders = chosen(options.only)
    except ValueError as error:
        parser.error(str(error))
    return options


def main() -> None:
    if sys.argv[1:2] == ["--prepare"]:
        prepare(BY_NAME[sys.argv[2]], Path(sys.argv[3]))
        return
    if sys.argv[1:2] == ["--serve"]:
        name, place, threads, images = sys.argv[2:]
        serve(BY_NAME[name], Path(place), int(threads) or None, Path(images))
        return
    options = parse()
    settings = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        left_out = prepare_all(options.contenders, folder)
        for side, batch in zip(options.sizes, options.batches, strict=True):
            say(f"{side}², batch {batch}")
            entries = measure(side, batch, left_out, options.contenders, folder, options)
            rows = [row_of(entry, entries, side, batch) for entry in entries]
            settings.append({"side": side, "batch": batch, "rows": rows})
    versions = {name: importlib.metadata.version(name) for name in ("infexport", "torch", "onnxruntime", "numpy")}
    machine = {"cpu": cpu_model(), "cores": usable_cores(), "threads": options.threads or torch.get_num_threads()}
    report = {"machine": machine, "versions": {"python": platform.python_version(), **versions}}
    report |= {
        "rounds": options.rounds,
        "warmup": options.warmup,
        "tolerance": TOLERANCE | INACCURATE,
        "settings": settings,
    }
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    if options.table:
        options.table.write_text(table(report))
    else:
        print(table(report), end="")
    if options.plot:
        draw(report, options.plot)


if __name__ == "__main__":
    main()
