#!/usr/bin/env python3
"""Measure infexport's bundles beside what one would run without it, on this machine, all in turn.

    python scripts/benchmarks/bench_peers.py --json peers.json --table peers.md --plot peers.png

The peers are the paper's formulas in plain torch, and the softmax ViT of the same shape: eager, through torch.compile,
and through plain torch.onnx.export in ONNX Runtime. Every contender has a process of its own and is asked in turn,
round after round, so that what else the machine does falls on all alike. Each is given what it takes, outside the
clock: bundles uint8 images, which they normalise themselves, peers normalised pixels. Before the clock starts, its
logits must be those of its family. The yardstick, one large matrix product, is a contender like the others. Peak memory
includes torch, which every process has imported. Run it on an otherwise idle machine.

    python scripts/benchmarks/bench_peers.py --device cuda --batch-size 1,8,32 --engine fp16 --json peers.json

On a GPU the peers run in float32, without TF32, and in float16. Contenders come one after the other, each alone on the
GPU, and a round is a burst of runs that counts as its median. The clock runs from images in the process's memory to
logits there; plain exports, which take pixels, have them on the GPU before. Peak memory is the GPU's, by NVML.
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
from peers.contenders import BY_NAME, ENGINES, chosen
from peers.networks import CONFIGS
from peers.report import draw, row_of, table
from peers.worker import prepare, serve

from infexport.inference.runners.onnxruntime import import_onnxruntime
from infexport.system.host import cpu_model, usable_cores


def integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def words(text: str) -> list[str]:
    return text.split(",")


def names_of(device: str) -> list[str]:
    return [contender.name for contender in chosen(None, device)]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=integers, default=[1024, 512], help="sides of the images [1024,512]")
    parser.add_argument("--batches", type=integers, help="images at once, one for each size [1,8]")
    parser.add_argument("--batch-size", type=integers, help="images at once, all for each size [with cuda 1,8,32]")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where all of them run [cpu]")
    parser.add_argument("--engine", type=words, default=[], metavar="PRECISION,…",
                        help=f"with cuda, TensorRT engines that are built for this GPU, of {', '.join(ENGINES)}, for "
                        "all sizes and batches, best at the first [none]")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=7, help="that count [7]")
    parser.add_argument("--warmup", type=int, default=1, help="rounds that don't [1]")
    parser.add_argument("--threads", type=int, help="of each contender [its own default]")
    parser.add_argument("--only", metavar="NAME,…", help=f"leave out the others of {', '.join(names_of('cpu'))}; "
                        f"with cuda of {', '.join(names_of('cuda'))}")  # fmt: skip
    for name, what in (("json", "everything"), ("table", "the tables, Markdown [stdout]"), ("plot", "a .png picture")):
        parser.add_argument(f"--{name}", type=Path, metavar="FILE", help=f"write {what}")
    options = parser.parse_args()
    patches = {config.patch_size for config in CONFIGS.values()}
    if options.device == "cuda" and not torch.cuda.is_available():
        print(f"error: --device cuda: torch {torch.__version__} finds no NVIDIA GPU here", file=sys.stderr)
        sys.exit(2)
    if options.engine and options.device == "cpu":
        parser.error("--engine goes with --device cuda")
    if set(options.engine) - set(ENGINES):
        parser.error(f"--engine {','.join(options.engine)}: expected some of {','.join(ENGINES)}")
    if options.batches and options.batch_size:
        parser.error("--batches is one for each size, --batch-size all for each size: give one of the two")
    if options.batches is None and (options.batch_size or options.device == "cuda"):
        every = options.batch_size or [1, 8, 32]
        options.batches = every * len(options.sizes)
        options.sizes = [side for side in options.sizes for _ in every]
    options.batches = options.batches or [1, 8]
    if len(options.sizes) != len(options.batches):
        parser.error("--sizes and --batches go together: give as many of the one as of the other")
    if any(side < 1 or side % patch for side in options.sizes for patch in patches):
        parser.error(f"--sizes must be multiples of the patch, {max(patches)}")
    if min(options.batches) < 1 or options.rounds < 1 or options.warmup < 0:
        parser.error("--batches and --rounds must be at least 1")
    try:
        options.contenders = chosen(options.only, options.device, options.engine)
    except ValueError as error:
        parser.error(str(error))
    return options


def main() -> None:
    if sys.argv[1:2] == ["--prepare"]:
        name, place, sizes, batches = sys.argv[2:]
        prepare(BY_NAME[name], Path(place), sizes, batches)
        return
    if sys.argv[1:2] == ["--serve"]:
        name, place, threads, images, device = sys.argv[2:]
        serve(BY_NAME[name], Path(place), int(threads) or None, Path(images), device)
        return
    options = parse()
    settings = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        asked = list(zip(options.sizes, options.batches, strict=True))
        left_out = prepare_all(options.contenders, folder, asked)
        for side, batch in asked:
            say(f"{side}², batch {batch}")
            entries = measure(side, batch, left_out, options.contenders, folder, options)
            rows = [row_of(entry, entries, side, batch, options.device) for entry in entries]
            settings.append({"side": side, "batch": batch, "rows": rows})
    versions = {name: importlib.metadata.version(name) for name in ("infexport", "torch")}
    # of several packages
    versions |= {"onnxruntime": import_onnxruntime().__version__, "numpy": importlib.metadata.version("numpy")}
    machine = {"cpu": cpu_model(), "cores": usable_cores(), "threads": options.threads or torch.get_num_threads()}
    if options.device == "cuda":
        machine["gpu"] = torch.cuda.get_device_name()
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
