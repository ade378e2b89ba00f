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
import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from infexport import gemm
from infexport.benchmark import ending, in_a_line
from infexport.bundle import open_bundle
from infexport.errors import InfexportError
from infexport.machine import cpu_model, peak_memory, usable_cores
from infexport.measurements import Spread, limit_of
from infexport.runners.ort import OrtRunner, import_onnxruntime
from infexport.work import work_of
from infvit.config import SIZES, InfViTConfig
from infvit.network import Attention, InfViT

EPSILON = 1e-6
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""ImageNet's, which infexport takes where a checkpoint has none."""
CONFIGS: dict[str, InfViTConfig] = {
    "linear": SIZES["infvit_linear_4l"],
    "pure": SIZES["infvit_pure_4l"],
    "softmax": dataclasses.replace(SIZES["infvit_linear_4l"], variant="softmax"),
}
OURS = ("linear-fp32", "linear-int8")
"""What all others are compared with."""
TOLERANCE = {"fp32": 1e-3, "int8": 5e-2}
"""Relative error of the logits against the first of the family that answers."""
INACCURATE = {"pure-ort": 2e-2}
"""Whose float32 is worse than that, and nothing else is wrong: ONNX Runtime's ReduceL2 of 4097² numbers is 5e-3 off."""


@dataclass(frozen=True)
class Contender:
    """Who is measured.

    Attributes:
        name: unique.
        family: whose logits it must have; `gemm` has none.
        how: `bundle`, `eager`, `compile`, `ort`, or a kind of `infexport.gemm`.
        precision: of the dense products.
        folded: by infexport's exact rewrites.
    """

    name: str
    family: str
    how: str
    precision: str = "fp32"
    folded: bool = False

    @property
    def label(self) -> str:
        """For people."""
        ways = {"eager": "torch, eager", "compile": "torch.compile", "ort": "torch.onnx.export in ONNX Runtime"}
        folded = "" if self.folded else ", not folded"
        return f"{self.family}: {ways.get(self.how, f'infexport {self.precision}{folded}')}"


CONTENDERS = (
    Contender("gemm-ort-float32", "gemm", "float32"),
    Contender("gemm-ort-int8", "gemm", "int8", "int8"),
    Contender("gemm-torch-float32", "gemm", "torch"),
    Contender("linear-eager", "linear", "eager"),
    Contender("linear-compile", "linear", "compile"),
    Contender("linear-ort", "linear", "ort"),
    Contender("linear-fp32-no-fold", "linear", "bundle"),
    Contender("linear-fp32", "linear", "bundle", folded=True),
    Contender("linear-int8", "linear", "bundle", "int8", folded=True),
    Contender("pure-eager", "pure", "eager"),
    Contender("pure-compile", "pure", "compile"),
    Contender("pure-ort", "pure", "ort"),
    Contender("pure-fp32", "pure", "bundle", folded=True),
    Contender("pure-int8", "pure", "bundle", "int8", folded=True),
    Contender("softmax-eager", "softmax", "eager"),
    Contender("softmax-ort", "softmax", "ort"),
    Contender("softmax-compile", "softmax", "compile"),
)
BY_NAME = {contender.name: contender for contender in CONTENDERS}


# The peers' networks


def linear_attention(q: Tensor, k: Tensor, v: Tensor, rho: Tensor) -> Tensor:
    """Linear-InfSA as the paper has it, every token on its own: `[B, H, N, d]` each; ρ a scalar or `[H]`."""
    q, k = q / math.sqrt(q.shape[-1]), k / math.sqrt(q.shape[-1])
    energy = torch.linalg.vector_norm(q, dim=-1, keepdim=True)
    mean_query = (energy * q).sum(-2, keepdim=True) / (energy.sum(-2, keepdim=True) + EPSILON)
    score = torch.relu(k @ mean_query.transpose(-1, -2))
    score = rho.reshape(-1, 1, 1) * score / (score.sum(-2, keepdim=True) + EPSILON)
    return (score * v).sum(-2, keepdim=True).expand_as(v)


def pure_attention(q: Tensor, k: Tensor, v: Tensor, rho: Tensor) -> Tensor:
    """One term of Pure InfSA as the paper has it, with the whole matrix: `[B, H, N, d]` each; ρ a scalar or `[H]`."""
    q, k = q / math.sqrt(q.shape[-1]), k / math.sqrt(q.shape[-1])
    affinity = torch.relu(q @ k.transpose(-1, -2))
    affinity = affinity / (torch.linalg.vector_norm(affinity, dim=(-2, -1), keepdim=True) + EPSILON)
    return (rho.reshape(-1, 1, 1) * affinity) @ v


class ReferenceAttention(nn.Module):
    """An attention of `infvit` that computes the paper's formula in plain torch."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, tokens: Tensor) -> Tensor:
        mix = {"linear_infsa": linear_attention, "pure_infsa": pure_attention}[self.attention.variant]
        mixed = mix(*self.attention.project(tokens), self.attention.rho)
        return self.attention.project_out(mixed.transpose(1, 2).flatten(2))


def network_of(family: str) -> InfViT:
    """The family's network as trained, its random weights the same every time."""
    torch.manual_seed(0)
    return InfViT(CONFIGS[family]).eval()


def peer_of(family: str) -> InfViT:
    """The family's network without infsa_ops."""
    network = network_of(family)
    if family != "softmax":  # whose attention is torch's own already
        for layer in network.encoder.layers:
            layer.attn = ReferenceAttention(layer.attn)
    return network


def prepare(contender: Contender, folder: Path) -> None:
    """Make what a contender of `ort` or `bundle` runs."""
    config = CONFIGS[contender.family]
    if contender.how == "ort":
        patch = config.patch_size
        sides = (patch * torch.export.Dim(name, min=1, max=8192) for name in ("grid_height", "grid_width"))
        shapes = ({0: torch.export.Dim("batch"), **dict(zip((2, 3), sides, strict=True))},)
        example = (torch.zeros(2, 3, 3 * patch, 5 * patch),)
        file = folder / f"{contender.name}.onnx"
        network = peer_of(contender.family)
        torch.onnx.export(network, example, file, dynamo=True, opset_version=20, dynamic_shapes=shapes, verbose=False)
    else:
        from safetensors.torch import save_file

        checkpoint = folder / f"{contender.name}.safetensors"
        save_file(network_of(contender.family).state_dict(), checkpoint)
        command = ["convert", "checkpoint", checkpoint, "--output", folder / contender.name]
        for name, value in (
            ("variant", config.variant),
            ("num-heads", config.num_heads),
            ("norm-eps", config.norm_eps),
        ):
            command += [f"--{name}", str(value)]
        command += ["--precision", contender.precision, "--fold" if contender.folded else "--no-fold"]
        done = subprocess.run([sys.executable, "-m", "infexport", *command], stdout=subprocess.DEVNULL, check=False)
        checkpoint.unlink()
        if done.returncode:
            sys.exit(done.returncode)  # infexport said why


# In the contender's process


def runner_of(contender: Contender, folder: Path, threads: int | None, images: Any) -> Callable[[], Any]:
    """What runs the contender once on uint8 images `[B, H, W, 3]` and returns its logits."""
    if contender.how == "bundle":
        runner = OrtRunner(open_bundle(folder / contender.name), "cpu", threads).__enter__()
        return lambda: runner.run(images)["logits"]
    mean, std = (torch.tensor(values) for values in (MEAN, STD))
    pixels = ((torch.from_numpy(images) / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()
    if contender.how == "ort":
        onnxruntime = import_onnxruntime()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        session = onnxruntime.InferenceSession(
            folder / f"{contender.name}.onnx", options, providers=["CPUExecutionProvider"]
        )
        feed = {session.get_inputs()[0].name: pixels.numpy()}
        return lambda: session.run(None, feed)[0]
    network: Callable[[Tensor], Tensor] = peer_of(contender.family)
    if contender.how == "compile":
        network = torch.compile(network, dynamic=False)

    def run() -> Any:
        with torch.inference_mode():
            return network(pixels).numpy()

    return run


def gemm_of(contender: Contender, threads: int | None) -> Callable[[], Any]:
    if contender.how in gemm.KINDS:
        product = gemm.Gemm(contender.how, "cpu", threads)
        return product.run
    left, out = torch.randn(gemm.ROWS, gemm.INNER), torch.empty(gemm.ROWS, gemm.COLUMNS)
    right = torch.randn(gemm.COLUMNS, gemm.INNER).T  # as a Linear holds its weights
    return lambda: torch.mm(left, right, out=out)


def serve(contender: Contender, folder: Path, threads: int | None, images: Path) -> None:
    """Answer until stdin ends: a line is a run, and its answer seconds and peak memory in bytes."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print to stdout as they like
    if threads is not None:
        torch.set_num_threads(threads)
    if contender.family == "gemm":
        run = gemm_of(contender, threads)
    else:
        run = runner_of(contender, folder, threads, np.load(images))
        np.save(folder / f"{contender.name}.logits.npy", run())
    run()
    print(json.dumps({}), file=out, flush=True)
    for _ in sys.stdin:
        time.sleep(gemm.SETTLE)
        started = time.perf_counter()
        run()
        seconds = time.perf_counter() - started
        print(json.dumps({"seconds": seconds, "peak_memory": peak_memory()}), file=out, flush=True)


# In the process that asks


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

    def __init__(self, contender: Contender, folder: Path, threads: int | None, images: Path) -> None:
        self.messages = tempfile.TemporaryFile("w+")  # noqa: SIM115
        arguments = ["--serve", contender.name, str(folder), str(threads or 0), str(images)]
        self.process = subprocess.Popen(
            [sys.executable, __file__, *arguments],
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


@contextmanager
def started(entries: Sequence[Entry], folder: Path, threads: int | None, images: Path) -> Iterator[dict[str, Worker]]:
    """A process for every contender that still can, each ready: one after the other, so that none waits for cores."""
    workers: dict[str, Worker] = {}
    with ExitStack() as stack:
        for entry in entries:
            if entry.reason:
                continue
            say(f"  starting {entry.contender.name}")
            worker = Worker(entry.contender, folder, threads, images)
            stack.callback(worker.close)
            try:
                worker.answer()
            except InfexportError as error:
                fail(entry, in_a_line(error))
            else:
                workers[entry.contender.name] = worker
        yield workers


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def fail(entry: Entry, reason: str) -> None:
    entry.reason = reason
    say(f"  {entry.contender.name}: {reason}")


def compare_logits(entries: Sequence[Entry], folder: Path) -> None:
    """Fail who doesn't say what the first of its family says."""
    truth: dict[str, Any] = {}
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
    """One setting: every contender `options.rounds` times, in turn."""
    entries = [Entry(contender, reason=left_out.get(contender.name, "")) for contender in contenders]
    images = folder / "images.npy"
    np.save(images, np.random.default_rng(0).integers(0, 256, (batch, side, side, 3), dtype=np.uint8))
    with started(entries, folder, options.threads, images) as workers:
        compare_logits(entries, folder)
        for i in range(-options.warmup, options.rounds):
            say(f"  round {i + 1} of {options.rounds}" if i >= 0 else "  warm-up")
            for entry in entries:
                if entry.reason:
                    continue
                try:
                    found = workers[entry.contender.name].run()
                except InfexportError as error:
                    fail(entry, in_a_line(error))
                    continue
                entry.peak_memory = found["peak_memory"]
                if i >= 0:
                    entry.seconds.append(found["seconds"])
    return entries


# What is said of it


def gemm_seconds(entries: Sequence[Entry], how: str) -> dict[str, list[float]]:
    """Of the products that limit a contender that runs like this: torch's are torch's own. Empty where one failed."""
    torch_s = how in ("eager", "compile")
    kinds = {"float32": "gemm-torch-float32" if torch_s else "gemm-ort-float32", "int8": "gemm-ort-int8"}
    found = {entry.contender.name: entry for entry in entries if entry.median is not None}
    return {kind: found[name].seconds for kind, name in kinds.items()} if found.keys() >= set(kinds.values()) else {}


def limit(entry: Entry, entries: Sequence[Entry], side: int, batch: int) -> float | None:
    """Seconds a contender's own matrix products take at the rate of a large one."""
    contender, products = entry.contender, gemm_seconds(entries, entry.contender.how)
    if contender.family == "gemm" or not products:
        return None
    config = CONFIGS[contender.family]
    work = work_of(config.to_dict(), contender.folded, (side // config.patch_size) ** 2 + 1)
    return limit_of(work, batch, contender.precision, products)


def row_of(entry: Entry, entries: Sequence[Entry], side: int, batch: int) -> dict[str, Any]:
    """A contender's result: times in seconds, memory in bytes."""
    row: dict[str, Any] = {
        **dataclasses.asdict(entry.contender),
        "label": entry.contender.label,
        "status": "failed" if entry.reason else "measured",
    }
    row |= {"relative_error": entry.relative_error, "peak_memory": entry.peak_memory, "all": entry.seconds}
    if entry.median is None:
        return row | {"reason": entry.reason}
    medians = {other.contender.name: other.median for other in entries}
    least = limit(entry, entries, side, batch)
    row |= {"seconds": Spread.of(entry.seconds).to_dict(), "limit": least}
    row["share_of_limit"] = None if least is None else least / entry.median
    if entry.contender.family == "gemm":
        return row | {"giga_operations_per_second": gemm.giga_operations(entry.median)}
    ratios = {name: entry.median / median for name in OURS if (median := medians.get(name)) is not None}
    return row | {"times_ours": ratios}


def table(report: dict[str, Any]) -> str:
    """Markdown: a table per setting."""
    machine = report["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines = [f"{machine['cpu']}, {machine['cores']} cores, threads {machine['threads']}; {versions}"]
    for setting in report["settings"]:
        lines += ["", f"### {setting['side']}², batch {setting['batch']}, {report['rounds']} rounds", ""]
        products = [row for row in setting["rows"] if row["family"] == "gemm"]
        for row in products:
            lines.append(f"- {row['name']}: {row['reason'] if row['status'] == 'failed' else rates(row)}")
        header = ["contender", "median, s", "minimum to maximum", *(f"× {name}" for name in OURS)]
        header += ["share of its limit", "peak, MB", "relative error"]
        lines += ["", "| " + " | ".join(header) + " |", "|---" + "|---:" * (len(header) - 1) + "|"]
        for row in setting["rows"]:
            if row["family"] != "gemm":
                lines.append("| " + " | ".join(cells(row)) + " |")
    return "\n".join(lines) + "\n"


def rates(row: dict[str, Any]) -> str:
    slow, middle, fast = (gemm.giga_operations(row["seconds"][name]) for name in ("max", "p50", "min"))
    return f"{middle:.0f} G operations/s ({slow:.0f} to {fast:.0f})"


def cells(row: dict[str, Any]) -> list[str]:
    if row["status"] == "failed":
        return [row["label"], f"failed: {row['reason'].replace('|', '/')}", *["-"] * (len(OURS) + 4)]
    seconds, share = row["seconds"], row["share_of_limit"]
    ratios = [f"{row['times_ours'][name]:.2f}" if name in row["times_ours"] else "-" for name in OURS]
    spread = f"{seconds['min']:.3f} to {seconds['max']:.3f}"
    shares = "-" if share is None else f"{share:.0%}"
    peak = f"{row['peak_memory'] / 1e6:.0f}"
    return [row["label"], f"{seconds['p50']:.3f}", spread, *ratios, shares, peak, f"{row['relative_error']:.0e}"]


COLOURS = {"linear": "#0072B2", "pure": "#D55E00", "softmax": "#009E73"}


def draw(report: dict[str, Any], path: Path) -> None:
    """Bars of the medians, a panel per setting, and what our folded linear models' products take at least."""
    from matplotlib.figure import Figure

    settings = report["settings"]
    bars = [row for row in settings[0]["rows"] if row["family"] != "gemm"]
    figure = Figure(figsize=(3 + 4.5 * len(settings), 1.6 + 0.32 * len(bars)), dpi=150, layout="constrained")
    panels = figure.subplots(1, len(settings), sharey=True, squeeze=False)[0]
    for axes, setting in zip(panels, settings, strict=True):
        rows = {row["name"]: row for row in setting["rows"]}
        longest = max((row["seconds"]["max"] for row in map(rows.get, names(bars)) if "seconds" in row), default=1.0)
        for name, style in zip(OURS, ("--", ":"), strict=True):
            if (least := rows.get(name, {}).get("limit")) is not None:
                axes.axvline(least, color="black", linestyle=style, linewidth=1, label=f"GEMM limit of {name}, folded")
        for y, name in enumerate(names(bars)):
            row = rows[name]
            if row["status"] == "failed":
                axes.text(0.015 * longest, y, "failed", va="center", fontsize=8, color="#666666")
                continue
            seconds = row["seconds"]
            axes.barh(y, seconds["p50"], color=COLOURS[row["family"]], alpha=1 if row["how"] == "bundle" else 0.45)
            axes.plot([seconds["min"], seconds["max"]], [y, y], color="black", linewidth=1)
            text = axes.text(seconds["max"] + 0.015 * longest, y, f"{seconds['p50']:.3g} s", va="center", fontsize=8)
            text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.5})
        axes.set(xlabel="median time of a batch, seconds", title=f"{setting['side']}², batch {setting['batch']}")
        axes.set(yticks=range(len(bars)), yticklabels=[row["label"] for row in bars])
        axes.set(xlim=(0, 1.14 * longest), ylim=(len(bars) - 0.4, -0.6))
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    figure.savefig(path, metadata={"Software": None})


def names(rows: Sequence[dict[str, Any]]) -> list[str]:
    return [row["name"] for row in rows]


def chosen(only: str | None) -> list[Contender]:
    """The products, always, and the contenders named: the softmax ViT's two ways together.

    Raises:
        ValueError: a name that is none.
    """
    names = set(BY_NAME) if only is None else set(only.split(","))
    if names - set(BY_NAME):
        raise ValueError(f"no contender: {', '.join(sorted(names - set(BY_NAME)))}; there are {', '.join(BY_NAME)}")
    if names & {"softmax-eager", "softmax-ort"}:
        names |= {"softmax-eager", "softmax-ort"}  # the one is misleading without the other
    return [contender for contender in CONTENDERS if contender.family == "gemm" or contender.name in names]


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
    left_out: dict[str, str] = {}
    settings = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for contender in options.contenders:
            if contender.how not in ("bundle", "ort"):
                continue
            say(f"preparing {contender.name}")
            command = [sys.executable, __file__, "--prepare", contender.name, scratch]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                left_out[contender.name] = f"could not be made: {in_a_line(ending(done.returncode, done.stderr))}"
                say(f"  {left_out[contender.name]}")
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
