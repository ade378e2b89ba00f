"""What the tests share: the golden cases, the command line, and bundles converted once."""

from __future__ import annotations

import fcntl
import hashlib
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from click.testing import CliRunner, Result
from PIL import Image
from safetensors.numpy import load_file
from support import GOLDEN, ZOO

from infexport.cli import cli


@pytest.fixture(scope="session")
def infexport() -> Callable[..., Result]:
    """Run the command line in this process: `infexport("inspect", bundle)`; exit code 0 unless told."""

    def run(*arguments: Any, exit_code: int = 0) -> Result:
        result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
        told = f"{result.stdout}\n{result.stderr}"
        assert result.exception is None or isinstance(result.exception, SystemExit), f"{result.exception!r}\n{told}"
        assert result.exit_code == exit_code, told
        return result

    return run


@pytest.fixture(scope="session")
def bundle_of(
    infexport: Callable[..., Result], tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Callable[..., Path]:
    """The bundle of a checkpoint, and options: converted once for all tests of all processes, which must not change it.

    Converting is most of what the tests take.
    """
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if hasattr(request.config, "workerinput") else folder) / "bundles"
    folder.mkdir(exist_ok=True)

    def get(checkpoint: Path, *options: Any) -> Path:
        told = "\0".join(map(str, (checkpoint, *options)))
        bundle = folder / hashlib.sha256(told.encode()).hexdigest()[:16]
        with bundle.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not bundle.exists():
                infexport("convert", "checkpoint", checkpoint, "-o", bundle, *options)
        return bundle

    return get


@pytest.fixture(scope="session")
def golden_bundle(bundle_of: Callable[..., Path]) -> Callable[..., Path]:
    """The bundle of a golden model, and options, as of `bundle_of`."""
    return lambda name, *options: bundle_of(
        GOLDEN / f"{name}.safetensors", "--config", GOLDEN / f"{name}.json", *options
    )


@pytest.fixture(scope="session")
def zoo_bundle(bundle_of: Callable[..., Path]) -> Callable[..., Path]:
    """The bundle of a model of the zoo, and options, as of `bundle_of`."""
    return lambda name, *options: bundle_of(ZOO / name, *options)


@pytest.fixture(scope="session")
def golden_images(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, dict[str, Any]]]:
    """A folder with a golden model's images as PNG, and its io arrays."""

    def get(name: str) -> tuple[Path, dict[str, Any]]:
        folder = tmp_path_factory.mktemp("images")
        io = load_file(GOLDEN / f"{name}.io.safetensors")
        for i, image in enumerate(io["images"]):
            Image.fromarray(image).save(folder / f"{i}.png")
        return folder, io

    return get


def script(name: str) -> ModuleType:
    """A script of the project as a module, as it is to another one beside it."""
    folder = str(ZOO.parent.parent / "scripts")
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module(name)


@pytest.fixture(scope="session")
def train_digits() -> ModuleType:
    """The script that trained the zoo's first models."""
    return script("train_digits")


@pytest.fixture(scope="session")
def train_canvases() -> ModuleType:
    """The script that trained those that have something to find."""
    return script("train_canvases")
