#!/usr/bin/env python3
"""Measure streamed and whole runs of the paper's models as whole commands: time, peak memory, and what was predicted.

    python scripts/benchmarks/bench_stream.py --json stream.json --table stream.md

Every row is one `infexport run-engine` on a BigTIFF of photographs (`make_bigtiff.py`), a process of its own, so that
loading and reading are in its time. The machine's matrix product is measured before and after it. Weights are random.
Run it on an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import make_bigtiff
import numpy as np

from infexport.bundle import Bundle, open_bundle
from infexport.evaluation.benchmark.result import speed_limit
from infexport.evaluation.flops import matmul_cost
from infexport.inference.options import InferenceOptions
from infexport.inference.planner import Image, estimates
from infexport.system.host import cpu_model, usable_cores

PATCH = 16
GEMM = """
import sys
from infexport.gemm import Gemm
product = Gemm(sys.argv[1], 'cpu', None)
print(min(product.seconds() for _ in range(5)))
"""


@dataclass(frozen=True)
class Case:
    """A run.

    Attributes:
        variant, precision, side: of the model and the image.
        way: `whole`; `plain`, that of an export that is not folded; `memory` or `disk`, streamed.
        tokens: the dtype in which tokens are kept.
    """

    variant: str
    precision: str
    side: int
    way: str
    tokens: str = "float32"

    @property
    def options(self) -> list[str]:
        if self.way in ("whole", "plain"):
            return ["--execution", "whole"]
        return ["--execution", "stream", "--tokens", self.tokens]


def default_cases() -> list[Case]:
    cases = []
    for precision in ("fp32", "int8"):
        for side in (224, 1024, 2048, 4096):
            cases += [Case("linear", precision, side, way) for way in ("whole", "memory", "disk")]
        cases += [Case("linear", precision, 9216, way) for way in ("memory", "disk")]
    cases.append(Case("linear", "fp32", 9216, "disk", "float16"))
    cases.append(Case("linear", "fp32", 4096, "plain"))
    cases += [Case("pure", "fp32", side, way) for side in (224, 1024, 2304) for way in ("whole", "memory", "disk")]
    return cases


def make_bundle(case: Case, folder: Path) -> Bundle:
    """The paper's model of four layers, random weights, converted."""
    import torch
    from safetensors.torch import save_file

    from infvit.config import SIZES
    from infvit.network import InfViT

    variant, precision, plain = case.variant, case.precision, case.way == "plain"
    path = folder / f"{variant}-{precision}{'-plain' if plain else ''}"
    if not path.exists():
        torch.manual_seed(0)
        checkpoint = folder / "model.safetensors"
        save_file(InfViT(SIZES[f"infvit_{variant}_4l"]).state_dict(), checkpoint)
        told = ["--variant", f"{variant}_infsa", "--num-heads", "16", "--precision", precision]
        told.append("--no-fold" if plain else "--fold")
        infexport = [sys.executable, "-m", "infexport", "convert", "checkpoint", checkpoint, "-o", path]
        subprocess.run([*infexport, *told], check=True, capture_output=True)
    return open_bundle(path)


LAUNCHER = """
import json, os, sys, time
started = time.perf_counter()
pid = os.posix_spawn(sys.argv[2], sys.argv[2:], os.environ)
_, status, usage = os.wait4(pid, 0)
json.dump([time.perf_counter() - started, usage.ru_maxrss * 1024, status], open(sys.argv[1], "w"))
"""
"""A small process to start others from: on Linux the peak that a child is told to have had begins with its parent's."""


def measure(command: list[str]) -> tuple[float, int, str]:
    """Seconds, peak resident bytes and stdout of a command.

    Raises:
        SystemExit: it failed.
    """
    with tempfile.NamedTemporaryFile("r") as found:
        launcher = [sys.executable, "-S", "-E", "-c", LAUNCHER, found.name]
        done = subprocess.run([*launcher, *command], capture_output=True, text=True, check=True)
        seconds, peak, status = json.load(found)
    if status:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
    return seconds, peak, done.stdout


def gemm(precision: str) -> dict[str, list[float]]:
    """Seconds of the fastest of five matrix products, by kind, in a process of its own."""
    kinds = ("float32", "int8") if precision == "int8" else ("float32",)
    return {kind: [float(measure([sys.executable, "-c", GEMM, kind])[2])] for kind in kinds}


def run(case: Case, bundle: Bundle, image: Path, scratch: Path, memory: int) -> dict[str, Any]:
    options = [*case.options, "--memory", str(memory), "--size", "native", "--top-k", "1", "--features", "--json"]
    if case.way == "disk":
        options += ["--scratch", str(scratch)]
    before = gemm(case.precision)
    seconds, peak, text = measure(
        [sys.executable, "-m", "infexport", "run-engine", str(bundle.path), str(image), *options]
    )
    after = gemm(case.precision)
    tokens = (-(-case.side // PATCH)) ** 2 + 1
    inference = InferenceOptions(tokens=case.tokens)
    predicted = estimates(bundle, inference, Image(tokens, case.side))
    way = "whole" if case.way == "plain" else case.way
    work = matmul_cost(bundle.manifest.config, bundle.manifest.folded, tokens)
    limit = speed_limit(work, 1, case.precision, {kind: before[kind] + after[kind] for kind in before})
    answer = json.loads(text)["images"][0]
    return asdict(case) | {
        "rows": tokens,
        "seconds": seconds,
        "peak": peak,
        "predicted": predicted[way],
        "limit": limit,
        "execution": answer["execution"],
        "rounding": answer.get("rounding", 0.0),
        "features": answer["features"],
    }


def table(report: dict[str, Any]) -> str:
    """Markdown."""
    lines = [f"{report['cpu']}, {report['cores']} cores", ""]
    header = ["model", "size", "tokens", "run", "seconds", "µs/token", "of the limit", "peak, MB", "predicted, MB"]
    header.append("differs from float32 in memory by")
    lines += ["| " + " | ".join(header) + " |", "|---|---|---:|---|" + "---:|" * 6]
    for row in report["rows"]:
        kept = f"stream, tokens {row['way'].replace('memory', 'in memory').replace('disk', 'on disk')}"
        kept += ", float16" if row["tokens"] == "float16" else ""
        difference = "-" if row["difference"] is None else f"{row['difference']:.0e}"
        cells = [
            f"{row['variant']} {row['precision']}",
            f"{row['side']}²",
            f"{row['rows']:,}",
            {"whole": "whole", "plain": "whole, not folded"}.get(row["way"], kept),
            f"{row['seconds']:.2f}",
            f"{1e6 * row['seconds'] / row['rows']:.0f}",
            f"{row['limit'] / row['seconds']:.0%}",
            f"{row['peak'] / 1e6:.0f}",
            f"{row['predicted'] / 1e6:.0f} ({row['predicted'] / row['peak'] - 1:+.0%})",
            difference,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def compare(rows: list[dict[str, Any]]) -> None:
    """Relative difference of the features from the same image's in fp32, tokens in memory."""
    base = {(r["variant"], r["side"]): r for r in rows if (r["precision"], r["way"]) == ("fp32", "memory")}
    for row in rows:
        other, found = base.get((row["variant"], row["side"])), np.array(row.pop("features") or [])
        row["array"] = found
        row["difference"] = None if other is None or other is row else other
    for row in rows:
        if row["difference"] is not None:
            truth = row["difference"]["array"]
            row["difference"] = float(np.linalg.norm(row["array"] - truth) / np.linalg.norm(truth))
    for row in rows:
        del row["array"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", metavar="VARIANT,PRECISION,SIDE,WAY[,float16]", help="cases [all]")
    parser.add_argument("--memory", type=int, default=20 * 10**9, help="bytes a run may take [20 GB]")
    parser.add_argument("--folder", type=Path, help="keep bundles and images there [a temporary folder]")
    for name, what in (("json", "everything"), ("table", "the table, Markdown [stdout]")):
        parser.add_argument(f"--{name}", type=Path, metavar="FILE", help=f"write {what}")
    options = parser.parse_args()
    cases = default_cases()
    if options.only:
        parts = [text.split(",") for text in options.only]
        cases = [Case(p[0], p[1], int(p[2]), *p[3:]) for p in parts]
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        folder = options.folder or Path(scratch)
        rows = []
        for case in cases:
            image = folder / f"{case.side}.tif"
            if not image.exists():
                make_bigtiff.write(image, case.side, case.side, make_bigtiff.photographs([]))
            rows.append(run(case, make_bundle(case, folder), image, Path(scratch), options.memory))
            print(*(f"{k}={v}" for k, v in rows[-1].items() if k != "features"), file=sys.stderr, flush=True)
    compare(rows)
    report = {"cpu": cpu_model(), "cores": usable_cores(), "rows": rows}
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    if options.table:
        options.table.write_text(table(report))
    else:
        print(table(report), end="")


if __name__ == "__main__":
    main()
