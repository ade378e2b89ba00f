"""What the tests share: the golden cases, the command line, and bundles converted once."""

from __future__ import annotations

import importlib.util
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
def golden_bundle(infexport: Callable[..., Result], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The bundle of a golden model, converted once for all tests, which must not change it."""
    bundles: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in bundles:
            bundles[name] = tmp_path_factory.mktemp("bundles") / name
            config = GOLDEN / f"{name}.json"
            infexport("convert", "checkpoint", GOLDEN / f"{name}.safetensors", "--config", config, "-o", bundles[name])
        return bundles[name]

    return get


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


@pytest.fixture(scope="session")
def train_digits() -> ModuleType:
    """The script that trained the zoo, as a module."""
    script = ZOO.parent.parent / "scripts" / "train_digits.py"
    spec = importlib.util.spec_from_file_location("train_digits", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
