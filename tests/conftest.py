"""What the tests share: the golden cases, the command line, and bundles converted once."""

from __future__ import annotations

import errno
import fcntl
import functools
import gc
import hashlib
import importlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hypothesis import settings
from PIL import Image
from safetensors.numpy import load_file
from support import GOLDEN, ZOO

from infexport.cli import cli

settings.register_profile("untimed", deadline=None)  # other work may go on beside the tests
settings.load_profile("untimed")


SLOW_FOLDERS = {"end_to_end", "robustness"}
SLOW_FIXTURES = {"bundle_of", "made_once", "ray"}
SLOW_MARKERS = ("slow", "ray", "serving")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fast", action="store_true", help="Leave out tests that convert a checkpoint, start a server or take seconds."
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--fast"):
        slow = [item for item in items if _is_slow(item)]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in set(slow)]


def _is_slow(item: pytest.Item) -> bool:
    fixtures = set(getattr(item, "fixturenames", ()))
    marked = any(item.get_closest_marker(name) for name in SLOW_MARKERS)
    return marked or bool(fixtures & SLOW_FIXTURES) or bool(SLOW_FOLDERS & set(item.path.parts))


def pytest_collection_finish() -> None:
    """What is imported by now stays: Python need not search it for garbage again and again."""
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def domains_read_once() -> None:
    """At every export onnxscript parses its library's thousand functions for what it knows of them: their domain."""
    from onnxscript._internal import values

    kind = getattr(values, "TracedOnnxFunction", object)
    parsed = vars(kind).get("function_ir")
    if isinstance(parsed, property) and parsed.fget is not None:
        once = functools.cached_property(parsed.fget)
        once.__set_name__(kind, "function_ir")
        kind.function_ir = once


@pytest.fixture(scope="session")
def cli_result() -> Callable[..., Result]:
    """Run the command line in this process, whatever comes of it."""
    return lambda *arguments: CliRunner().invoke(cli, [str(argument) for argument in arguments])


@pytest.fixture(scope="session")
def infexport(cli_result: Callable[..., Result]) -> Callable[..., Result]:
    """As `cli_result`: `infexport("inspect", bundle)`; exit code 0 unless told."""

    def run(*arguments: Any, exit_code: int = 0) -> Result:
        result = cli_result(*arguments)
        told = f"{result.stdout}\n{result.stderr}"
        assert result.exception is None or isinstance(result.exception, SystemExit), f"{result.exception!r}\n{told}"
        assert result.exit_code == exit_code, told
        return result

    return run


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Callable[..., Path]:
    """A folder made once for all tests of all processes, which must not change it: `make(folder)`, told by `facts`."""
    place = tmp_path_factory.getbasetemp()
    place = (place.parent if hasattr(request.config, "workerinput") else place) / "shared"
    place.mkdir(exist_ok=True)

    def get(make: Callable[[Path], object], *facts: Any) -> Path:
        folder = place / hashlib.sha256("\0".join(map(str, facts)).encode()).hexdigest()[:16]
        with folder.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.exists():
                try:
                    make(folder)
                except BaseException:
                    shutil.rmtree(folder, ignore_errors=True)
                    raise
        return folder

    return get


@pytest.fixture(scope="session")
def bundle_of(infexport: Callable[..., Result], made_once: Callable[..., Path]) -> Callable[..., Path]:
    """The bundle of a checkpoint, and options, as of `made_once`: converting is most of what the tests take."""

    def get(checkpoint: Path, *options: Any) -> Path:
        def make(bundle: Path) -> None:
            infexport("convert", "checkpoint", checkpoint, "-o", bundle, *options)

        return made_once(make, checkpoint, *options)

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


@pytest.fixture(scope="session")
def hostile() -> Callable[[str], ModuleType]:
    """A module of the fuzzer: `hostile("cases")`."""
    return lambda name: importlib.import_module(f"hostile.{name}")


@pytest.fixture
def forbid(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Have the system say of a folder that it may not be looked into, and of what is in it, that it may not be seen."""

    def add(folder: Path) -> None:
        def refusing(call: Callable[..., Any], inside: bool) -> Callable[..., Any]:
            def look(path: Any = ".", *arguments: Any, **options: Any) -> Any:
                if not isinstance(path, int):
                    place = Path(os.fsdecode(path))
                    if (folder in place.parents) if inside else place == folder:
                        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
                return call(path, *arguments, **options)

            return look

        for name, inside in (("listdir", False), ("scandir", False), ("stat", True)):
            monkeypatch.setattr(os, name, refusing(getattr(os, name), inside))

    return add
