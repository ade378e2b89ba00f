"""Whole files, from which hostile ones are made."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from click.testing import CliRunner

from infexport.bundle import Bundle, open_bundle, seal
from infexport.bundle.integrity import sealed
from infexport.bundle.manifest import FILE, read_manifest
from infexport.cli import cli
from infexport.system.untrusted_files import parse_json

ROOT = Path(__file__).parents[3]
ZOO, GOLDEN = ROOT / "models" / "zoo", ROOT / "tests" / "golden"
LAYOUTS = ("reference", "torchvision", "timm_softmax", "transformers", "transformers4_wrapped")


def make_bundle(folder: Path) -> Path:
    """The bundle that all cases damage copies of."""
    if not folder.exists():
        result = CliRunner().invoke(cli, ["convert", "checkpoint", str(ZOO / "digits-linear"), "-o", str(folder)])
        assert result.exit_code == 0, result.stderr
    return folder


class Seeds:
    """Read once for all cases of a process.

    Args:
        bundle: a whole one, never changed.
        folder: for what is made once.
    """

    def __init__(self, bundle: Path, folder: Path) -> None:
        self.bundle, self.folder = bundle.resolve(), folder.resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.kept: dict[str, Any] = {}

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """What is made by the first case that asks."""
        if name not in self.kept:
            self.kept[name] = make()
        return self.kept[name]

    @cached_property
    def opened(self) -> Bundle:
        return open_bundle(self.bundle)

    @cached_property
    def manifest(self) -> dict[str, Any]:
        return dict(json.loads((self.bundle / FILE).read_text()))

    def checkpoint(self, name: str) -> tuple[bytes, dict[str, Any]]:
        """A golden checkpoint's file and config."""
        return self.once(
            f"checkpoint {name}",
            lambda: (
                (GOLDEN / f"{name}.safetensors").read_bytes(),
                json.loads((GOLDEN / f"{name}.json").read_text()),
            ),
        )

    @property
    def checkpoints(self) -> list[str]:
        return [f"{layout}_{variant}" for layout in LAYOUTS for variant in ("linear", "pure")]

    @cached_property
    def digits(self) -> list[Path]:
        return sorted((ZOO / "digits-held-out").glob("*.png"))

    @cached_property
    def image(self) -> Path:
        """A small image at a place that stays: of how a run goes on, the place is a part."""
        from PIL import Image

        file = self.folder / "image.png"
        if not file.exists():
            chance = np.random.default_rng(0)
            Image.fromarray(chance.integers(0, 256, (72, 100, 3), np.uint8)).save(file)
        return file

    def copy_bundle(self, folder: Path, changed: dict[str, bytes] | None = None) -> Path:
        """The bundle again, other files in place of some; what is not changed is the same file."""
        changed = changed or {}
        folder.mkdir(parents=True)
        for file in self.bundle.iterdir():
            if file.is_file() and file.name not in changed:
                (folder / file.name).hardlink_to(file)
        for name, content in changed.items():
            (folder / name).write_bytes(content)
        return folder


def seal_again(folder: Path, **fields: Any) -> None:
    """Make a bundle's hashes those of its files as they are now, and, if given, fields of its manifest others."""
    manifest = read_manifest(folder / FILE)
    (folder / FILE).unlink()  # the same file as the whole bundle's
    seal(folder, replace(manifest, **fields))


def sealed_again(text: bytes) -> bytes:
    """JSON that was changed, with the hashes of itself that it has now, where it is still an object."""
    try:
        values = parse_json(text)
        return sealed(values) if isinstance(values, dict) else text
    except ValueError:
        return text


def write_manifest(folder: Path, text: bytes) -> None:
    """A manifest of any text."""
    (folder / FILE).unlink(missing_ok=True)
    (folder / FILE).write_bytes(text)


def copy_tree(source: Path, target: Path) -> None:
    shutil.copytree(source, target, symlinks=True)
    os.utime(target)
