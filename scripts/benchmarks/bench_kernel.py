#!/usr/bin/env python3
"""Time the Triton kernel of Pure InfSA on this machine's GPU, beside the tile loop in torch and softmax attention.

    python scripts/benchmarks/bench_kernel.py --output kernel.json
    python scripts/benchmarks/bench_kernel.py --sweep --dtypes float16

Every contender is asked in turn, round after round, so that what the card's clock does falls on all alike. A large
torch.matmul of the same dtype, at torch's default precision, is one of them: rates are given as a share of its rate.
Before it is timed, the kernel must agree with the tile loop, which computes in float32. `--sweep` times other blocks
than those in `affinity_launch.BLOCKS`. Run it on an otherwise idle GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional

import infsa_ops
from infexport.evaluation.benchmark.result import Spread
from infsa_ops.tiled_affinity import TILED
from infsa_ops.triton import affinity_launch
from infsa_ops.triton.affinity_launch import KERNEL, Blocks

HEADS, WIDTH = 16, 64
GEMM = 8192
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 5e-3}
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in TOLERANCE}
CANDIDATES = [Blocks(*choice) for choice in product((32, 64, 128), (16, 32, 64, 128), (4, 8), (2, 3, 4))]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=integers, default=[4097, 20_737], help="tokens of an image [4097,20737]")
    parser.add_argument("--dtypes", default=",".join(DTYPES), help=f"[{','.join(DTYPES)}]")
    parser.add_argument("--batch", type=int, default=8, help="images at once [8]")
    parser.add_argument("--rounds", type=int, default=20, help="that count [20]")
    parser.add_argument("--warmup", type=int, default=3, help="rounds that don't [3]")
    parser.add_argument("--sweep", action="store_true", help="time other blocks of the first size instead")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write everything as JSON")
    options = parser.parse_args()
    unknown = set(options.dtypes.split(",")) - set(DTYPES)
    if unknown:
        parser.error(f"--dtypes: {', '.join(sorted(unknown))}: expected some of {', '.join(DTYPES)}")
    options.dtypes = [DTYPES[name] for name in options.dtypes.split(",")]
    if min(*options.tokens, options.batch, options.rounds) < 1 or options.warmup < 0:
        parser.error("--tokens, --batch and --rounds must be at least 1, --warmup at least 0")
    return options


def integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def refuse(why: str, exit_code: int) -> None:
    print(f"bench_kernel.py: {why}", file=sys.stderr)
    sys.exit(exit_code)


def tokens_of(batch: int, tokens: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k and v as a network has them: `[B, H, N, d]`, views of `[B, N, H·d]`."""
    generator = torch.Generator("cuda").manual_seed(0)
    shape = (batch, tokens, HEADS, WIDTH)
    return [torch.randn(shape, generator=generator, device="cuda").to(dtype).transpose(1, 2) for _ in range(3)]


def seconds(run: Callable[[], object]) -> float:
    """One run, on the card's own clock."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def in_turn(contenders: dict[str, Callable[[], object]], rounds: int, warmup: int) -> dict[str, list[float]]:
    """Seconds of every contender's runs; what doesn't fit in the card's memory is left out, and said so."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for counted in [False] * max(1, warmup) + [True] * rounds:  # the first run compiles
        for name in list(times):
            try:
                took = seconds(contenders[name])
            except torch.cuda.OutOfMemoryError:
                print(f"{name}: not enough memory on the card, left out", file=sys.stderr)
                del times[name]
                continue
            if counted:
                times[name].append(took)
    return times


def gemm(dtype: torch.dtype) -> tuple[Callable[[], object], int]:
    """A matrix product, and its floating-point operations."""
    left, right = (torch.randn(GEMM, GEMM, device="cuda").to(dtype) for _ in range(2))
    return lambda: left @ right, 2 * GEMM**3


def largest_error(q: Tensor, k: Tensor, v: Tensor) -> float:
    """Of the kernel's first image, relative to the tile loop's, the worst head's."""
    q, k, v = q[:1], k[:1], v[:1]
    (expected, squares), (actual, actual_squares) = (way.product_and_squares(q, k, v) for way in (TILED, KERNEL))
    difference = torch.linalg.vector_norm(actual - expected, dim=(-2, -1))
    relative = difference / torch.linalg.vector_norm(expected, dim=(-2, -1))
    return torch.maximum(relative.double(), (actual_squares / squares - 1).abs()).max().item()


def row_of(name: str, times: list[float], operations: int, peak: float) -> dict[str, Any]:
    spread = Spread.of(times)
    rate = operations / spread.p50
    return {
        "name": name,
        "seconds": spread.to_dict(),
        "tflops": rate / 1e12,
        "share_of_matmul": rate / peak,
        "all": times,
    }


def compare(dtype: torch.dtype, tokens: int, options: argparse.Namespace) -> dict[str, Any]:
    q, k, v = tokens_of(options.batch, tokens, dtype)
    error = largest_error(q, k, v)
    if not error <= TOLERANCE[dtype]:
        refuse(f"the kernel is wrong: {dtype}, {tokens} tokens, relative error {error:.1e}", 1)
    multiply, multiply_operations = gemm(dtype)
    pairs = 2 * options.batch * HEADS * tokens**2 * WIDTH
    contenders: dict[str, tuple[Callable[[], object], int]] = {
        "matmul": (multiply, multiply_operations),
        "neumann_kernel, one term": (lambda: infsa_ops.neumann_kernel(q, k, v, 0.95), 2 * pairs),
        "kernel, product and squares": (lambda: KERNEL.product_and_squares(q, k, v), 2 * pairs),
        "kernel, product": (lambda: KERNEL.product(q, k, v), 2 * pairs),
        "kernel, squares": (lambda: KERNEL.squares(q, k), pairs),
        "tile loop in torch": (lambda: TILED.product_and_squares(q, k, v), 2 * pairs),
        "softmax attention": (lambda: functional.scaled_dot_product_attention(q, k, v), 2 * pairs),
    }
    times = in_turn({name: run for name, (run, _) in contenders.items()}, options.rounds, options.warmup)
    peak = multiply_operations / Spread.of(times["matmul"]).p50
    rows = [row_of(name, taken, contenders[name][1], peak) for name, taken in times.items()]
    return {"dtype": str(dtype), "tokens": tokens, "relative_error": error, "rows": rows}


@contextmanager
def launched_with(blocks: Blocks) -> Iterator[None]:
    with patch.object(affinity_launch, "blocks_for", lambda device, dtype, width: blocks):
        yield


def sweep(dtype: torch.dtype, tokens: int, options: argparse.Namespace) -> dict[str, Any]:
    from triton.runtime.errors import OutOfResources, PTXASError

    q, k, v = tokens_of(options.batch, tokens, dtype)
    multiply, multiply_operations = gemm(dtype)
    peak = multiply_operations / Spread.of(in_turn({"matmul": multiply}, options.rounds, options.warmup)["matmul"]).p50
    operations = 4 * options.batch * HEADS * tokens**2 * WIDTH
    rows = []
    for blocks in dict.fromkeys([affinity_launch.blocks_for(q.device, dtype, WIDTH), *CANDIDATES]):
        name = f"{blocks.queries}×{blocks.keys}, {blocks.warps} warps, {blocks.stages} stages"
        with launched_with(blocks):
            try:
                error = largest_error(q, k, v)
            except (OutOfResources, PTXASError) as problem:
                print(f"{name}: {problem}", file=sys.stderr)
                continue
            if not error <= TOLERANCE[dtype]:
                refuse(f"the kernel is wrong: {dtype}, {name}, relative error {error:.1e}", 1)
            times = in_turn({name: lambda: KERNEL.product_and_squares(q, k, v)}, options.rounds, options.warmup)
        rows += [row_of(name, taken, operations, peak) for taken in times.values()]
    chosen, rest = rows[:1], rows[1:]
    rows = chosen + sorted(rest, key=lambda row: float(row["seconds"]["p50"]))
    return {"dtype": str(dtype), "tokens": tokens, "rows": rows}


def table(setting: dict[str, Any]) -> str:
    lines = [f"\n{setting['dtype']}, {setting['tokens']} tokens", ""]
    lines += ["| | median ms | min … max | TFLOP/s | of matmul |", "|---|---|---|---|---|"]
    for row in setting["rows"]:
        p50, least, most = (1e3 * row["seconds"][key] for key in ("p50", "min", "max"))
        rate = f"{row['tflops']:.0f} | {row['share_of_matmul']:.0%}"
        lines.append(f"| {row['name']} | {p50:.2f} | {least:.2f} … {most:.2f} | {rate} |")
    return "\n".join(lines)


def main() -> None:
    options = parse()
    if not torch.cuda.is_available():
        refuse("there is no CUDA device here: run it on a machine with a GPU", 2)
    example = torch.ones(1, 1, 16, WIDTH, device="cuda")
    if affinity_launch.sweeps_for(example, example) is not KERNEL:
        refuse("the kernel needs triton and compute capability 8.0 or later", 2)
    import triton

    sizes = options.tokens[:1] if options.sweep else options.tokens
    measure = sweep if options.sweep else compare
    settings = []
    for tokens, dtype in product(sizes, options.dtypes):
        settings.append(measure(dtype, tokens, options))
        print(table(settings[-1]), flush=True)
    report = {
        "device": torch.cuda.get_device_name(),
        "capability": torch.cuda.get_device_capability(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "batch": options.batch,
        "heads": HEADS,
        "width": WIDTH,
        "settings": settings,
    }
    if options.output:
        options.output.write_text(json.dumps(report, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
