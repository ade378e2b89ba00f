#!/usr/bin/env python3
"""End every command that writes at each of its writes in turn, and look at what is left.

    python tests/robustness/crash.py --output crash.json

A command is run in a fork of this process, in which an audit hook sees what is about to change a file: opening one to
write, renaming, linking, deleting, making a folder. At the n-th of these it is killed with SIGKILL; or it is told that
the disk is full, then and from then on. Killed in the middle of a file's bytes it is by a limit of a file's size, and
stopped there by the same limit as an error; and where this process may mount one, by a small disk that really is full.

Afterwards what was there before is there, whole, or what was to be made is, whole. An error is one, and leaves nothing
beside it. And the same command, run once more, makes what it was to make.
"""

from __future__ import annotations

import argparse
import errno
import json
import mmap
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import infexport.conversion.convert  # noqa: F401  imported here, it is there in every fork
from infexport.bundle import open_bundle
from infexport.cli import cli
from infexport.system import atomic_files
from infexport.system.atomic_files import PREFIX, recover
from infvit.config import InfViTConfig
from infvit.network import InfViT

TINY = InfViTConfig(
    variant="linear_infsa", image_size=16, patch_size=8, depth=1, embed_dim=8, num_heads=2, mlp_dim=8, num_classes=3,
    norm_eps=1e-6,
)  # fmt: skip
CHANGES = {
    "os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.link", "os.symlink", "os.truncate", "os.chmod",
}  # fmt: skip
ADDS = {"open", "os.rename", "os.mkdir", "os.link", "os.symlink"}
"""What a full disk refuses."""
SIZES = (0, 1, 100, 1000, 4096, 20_000)
"""Bytes of a file at which it is stopped."""
Fault = tuple[str, int] | None


@dataclass(frozen=True)
class Scene:
    """A command, and what it replaces.

    Attributes:
        name: for people.
        prepare: makes the old state in an empty folder.
        arguments: of the command, for that folder.
        state: `old` or `new` of a folder; raises where it is neither.
    """

    name: str
    prepare: Callable[[Path], None]
    arguments: Callable[[Path], list[str]]
    state: Callable[[Path], str]


@dataclass
class Figures:
    """What came of a scene."""

    points: int = 0
    tried: Counter[str] = field(default_factory=Counter)
    left: Counter[str] = field(default_factory=Counter)
    again: int = 0
    violations: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code, or minus the signal, what it said, and how many changes it began."""

    code: int
    messages: str
    changes: int


def changes(event: str, found: tuple[Any, ...], root: Path) -> bool:
    """Whether what an audit hook is told of changes something below a folder."""
    if event == "open":
        if not isinstance(found[0], str | bytes) or not (found[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return False
    elif event not in CHANGES:
        return False
    # relative ones are of a folder that is being deleted, by its descriptor
    paths = [Path(os.fsdecode(path)) for path in found[:2] if isinstance(path, str | bytes | Path)]
    return any(path.is_relative_to(root) or not path.is_absolute() for path in paths)


def run(arguments: list[str], root: Path, fault: Fault = None) -> Ended:
    """A command in a fork of this process, with a fault in what it does below `root`."""
    count = mmap.mmap(-1, 8)  # which both processes see
    reading, writing = os.pipe()  # a file would have a limit, too
    child = os.fork()
    if not child:
        code = 71
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(writing, 2)
            os.close(writing)
            code = _behave(arguments, root, fault, count)
        finally:
            os._exit(code)  # nothing of the parent's is the child's to clean up
    os.close(writing)
    with open(reading, errors="replace") as pipe:  # noqa: PTH123  a descriptor
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    return Ended(os.waitstatus_to_exitcode(status), said, int.from_bytes(count[:8], "little"))


def _behave(arguments: list[str], root: Path, fault: Fault, count: mmap.mmap) -> int:
    kind, at = fault or ("none", 0)
    if kind in ("cut", "short"):
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL if kind == "cut" else signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (at, at))
    full = False

    def hook(event: str, found: tuple[Any, ...]) -> None:
        nonlocal full
        if not changes(event, found, root):
            return
        number = int.from_bytes(count[:8], "little") + 1
        count[:8] = number.to_bytes(8, "little")
        if kind == "kill" and number == at:
            os.kill(os.getpid(), signal.SIGKILL)
        full = full or (kind == "full" and number == at)
        if full and event in ADDS:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fsdecode(found[0]))

    sys.addaudithook(hook)
    try:
        cli.main(arguments, prog_name="infexport")
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 1
    except BaseException as error:
        print(f"TRACEBACK {error!r}", file=sys.stderr)
        return 70
    finally:
        sys.stderr.flush()
    return 0


def names(root: Path) -> list[str]:
    """Return all that is below a folder, without random parts of names, and without what a run goes on with."""
    inside = (file.relative_to(root) for file in root.rglob("*"))
    found = (str(file) for file in inside if file.parts[0] != "scratch")
    return sorted({re.sub(rf"({re.escape(PREFIX)})[^/]*", r"\1*", name) for name in found})


def try_scene(scene: Scene, place: Path, mounted: bool, progress: Callable[[str], None]) -> Figures:
    """Every fault, one after the other."""
    figures, seen = Figures(), set()
    prepared = place / "prepared"
    prepared.mkdir()
    scene.prepare(prepared)
    before = names(prepared)

    def attempt(fault: Fault, root: Path | None = None) -> Ended:
        folder = root or place / "folder"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(prepared, folder, dirs_exist_ok=True)
        ended = run(scene.arguments(folder), folder, fault)
        leftovers = tuple(names(folder))
        for name in ("bundle", "bundle/engines"):
            recover(folder / name)  # as the next command that writes there does
        try:
            left = scene.state(folder)
        except Exception as error:
            left = f"neither: {error!r}"
        figures.left[left.split(":")[0]] += 1
        wrong = _wrong(ended, left, fault, names(folder) == before)
        if not wrong and ended.code and root is None and leftovers not in seen:
            seen.add(leftovers)
            figures.again += 1
            again = run(scene.arguments(folder), folder)
            if again.code or scene.state(folder) != "new" or any(PREFIX in name for name in names(folder)):
                wrong = f"the next run: {again}, {names(folder)}"
        if wrong:
            figures.violations.append(f"{fault}: {wrong}: {leftovers}")
        return ended

    whole = attempt(None)
    figures.points = whole.changes
    for kind in ("kill", "full"):
        for number in range(1, whole.changes + 1):
            progress(f"{scene.name}: {kind} {number} of {whole.changes}")
            attempt((kind, number))
            figures.tried[kind] += 1
    for kind in ("cut", "short"):
        for size in SIZES:
            progress(f"{scene.name}: {kind} {size}")
            attempt((kind, size))
            figures.tried[kind] += 1
    if mounted:
        _fill_disks(scene, place, prepared, attempt, figures)
    shutil.rmtree(prepared)
    return figures


def _fill_disks(
    scene: Scene, place: Path, prepared: Path, attempt: Callable[[Fault, Path], Ended], figures: Figures
) -> None:
    """On disks that are larger each time, from one that just holds the old state until the command fits."""
    mount = place / "disk"
    mount.mkdir(exist_ok=True)
    pages = sum(-(-file.stat().st_size // 4096) for file in prepared.rglob("*") if file.is_file())
    for step in range(40):
        size = (pages + 1 + step * (step + 1) // 2) * 4096
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", mount], check=True)
        try:
            (mount / "folder").mkdir()
            try:
                shutil.copytree(prepared, mount / "folder", dirs_exist_ok=True)
            except shutil.Error:
                continue  # not even that
            ended = attempt(("disk", size), mount / "folder")
            figures.tried["disk"] += 1
        finally:
            subprocess.run(["umount", mount], check=True)
        if not ended.code:
            return
    figures.violations.append("no disk is large enough")


def _wrong(ended: Ended, left: str, fault: Fault, untouched: bool) -> str:
    """What is not as it should be, if anything."""
    if left not in ("old", "new"):
        return left
    if ended.code == 0:
        return "" if left == "new" else "done, and nothing new is there"
    if ended.code < 0:
        killed = fault is not None and fault[0] in ("kill", "cut")
        return "" if killed else f"ended by signal {-ended.code}"
    if ended.code not in (1, 2) or ended.messages.count("error: ") < 1 or "Traceback" in ended.messages:
        return f"exit code {ended.code}, {ended.messages!r}"
    return "" if untouched or left == "new" else "an error, and something is left"


# The scenes


def checkpoint(folder: Path) -> Path:
    """A network of one layer."""
    torch.manual_seed(0)
    network = InfViT(TINY)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(
        {"model": network.state_dict(), "config": {"variant": TINY.variant, "num_heads": TINY.num_heads}},
        folder / "model.pth",
    )
    for name in ("old", "new"):
        (folder / f"{name}.txt").write_text(f"{name}\nb\nc\n")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 48, 3), np.uint8)).save(folder / "image.png")
    return folder / "model.pth"


def convert(given: Path, labels: str, output: Path) -> list[str]:
    return [
        "convert", "checkpoint", str(given / "model.pth"), "--labels", str(given / f"{labels}.txt"), "-o", str(output),
        "--force",
    ]  # fmt: skip


def done(arguments: list[str], root: Path) -> None:
    ended = run(arguments, root)
    assert ended.code == 0, ended


def bundle_state(folder: Path) -> str:
    bundle = open_bundle(folder / "bundle")
    assert bundle.labels is not None
    return bundle.labels[0]


def engine_state(folder: Path, chosen: str = "a100-fp32.engine") -> str:
    """The old engine takes one image, the new one two; the one beside it stays."""
    engines = {engine.file: engine for engine in open_bundle(folder / "bundle").engines}
    assert all(engine.state == "current" for engine in engines.values()), engines
    assert "rtx3090-fp32.engine" in engines, engines
    return {1: "old", 2: "new"}[engines[chosen].recorded.profile["image"].max[0]]


OLD = {
    "out.json": b"old",
    "maps/image.png": b"\x89PNG\r\n\x1a\ntEXtSoftware\0infexport heat map",  # no other picture is replaced
    "page.html": b"old",
}
"""Output → what is there before."""


def files_state(folder: Path, whole: dict[str, Callable[[Path], object]]) -> str:
    """All files old, or new and whole; of several, each for itself."""
    states = set()
    for name, check in whole.items():
        if (folder / name).read_bytes() == OLD[name]:
            states.add("old")
        else:
            check(folder / name)
            states.add("new")
    return "old" if "old" in states else "new"


def scenes(given: Path) -> list[Scene]:
    """All commands that write."""

    def old_engine(folder: Path) -> None:
        done(convert(given, "new", folder / "bundle"), folder)
        for target, batch in (("a100", "1"), ("rtx3090", "1")):
            done(build(folder, target, batch), folder)

    def build(folder: Path, target: str = "a100", batch: str = "2") -> list[str]:
        sizes = ("--sizes", "16", "--batch", batch)
        return ["build-engine", str(folder / "bundle"), "--target", target, *sizes]

    def texts(*files: str) -> Callable[[Path], None]:
        def prepare(folder: Path) -> None:
            done(convert(given, "new", folder / "bundle"), folder)
            for file in files:
                (folder / file).parent.mkdir(exist_ok=True)
                (folder / file).write_bytes(OLD[file])

        return prepare

    def streamed(folder: Path) -> list[str]:
        return [
            "run-engine", str(folder / "bundle"), str(given / "image.png"), "--size", "native", "--execution", "stream",
            "--scratch", str(folder / "scratch"), "--chunk", "7", "--output", str(folder / "out.json"),
            "--heatmaps", str(folder / "maps"),
        ]  # fmt: skip

    def report(folder: Path) -> list[str]:
        return ["validate", "parity", str(folder / "bundle"), "--sizes", "16", "--report", str(folder / "page.html")]

    def whole_page(file: Path) -> None:
        assert file.read_text().rstrip().endswith("</html>")

    outputs = {
        "out.json": lambda file: json.loads(file.read_text()),
        "maps/image.png": lambda file: Image.open(file).load(),
    }
    return [
        Scene("convert", lambda folder: done(convert(given, "old", folder / "bundle"), folder),
              lambda folder: convert(given, "new", folder / "bundle"), bundle_state),
        Scene("build-engine", old_engine, build, engine_state),
        Scene("run-engine", texts("out.json", "maps/image.png"), streamed,
              partial(files_state, whole=outputs)),
        Scene("report", texts("page.html"), report,
              partial(files_state, whole={"page.html": whole_page})),
    ]  # fmt: skip


def may_mount() -> bool:
    """Whether disks can be mounted here; in a name space of its own, which ends with this process."""
    return not subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode and os.geteuid() == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scene", action="append", help="convert, build-engine, run-engine or report [all]")
    parser.add_argument("--no-exchange", action="store_true", help="as on file systems that cannot exchange folders")
    parser.add_argument("--output", type=Path, help="write the figures to this .json")
    options = parser.parse_args()
    if options.no_exchange:
        atomic_files._exchange = lambda a, b: False
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="crash-") as scratch:
        os.environ["XDG_CACHE_HOME"] = str(Path(scratch) / "cache")
        given = Path(scratch) / "given"
        checkpoint(given)
        for scene in scenes(given):
            if options.scene and scene.name not in options.scene:
                continue
            place = Path(scratch) / scene.name
            place.mkdir()
            started = time.monotonic()
            figures = try_scene(
                scene, place, may_mount(), lambda text: print(f"\r\x1b[K{text}", end="", file=sys.stderr)
            )
            print(f"\r\x1b[K{scene.name}: {figures}", file=sys.stderr)
            found[scene.name] = {
                "points": figures.points,
                "tried": dict(figures.tried),
                "left": dict(figures.left),
                "next_runs": figures.again,
                "violations": figures.violations,
                "seconds": round(time.monotonic() - started, 1),
            }
    text = json.dumps({"scenes": found, "seconds": round(time.monotonic() - began, 1)}, indent=2)
    if options.output:
        options.output.write_text(text + "\n")
    print(text)
    return int(any(scene["violations"] for scene in found.values()))


if __name__ == "__main__":
    sys.exit(main())
