"""Killed at any of its writes, or told that the disk is full: what was there is there, or what was to be made, whole.

In one process: what a killed one leaves is what is there at that moment. `tests/robustness/crash.py` kills for real.
"""

from __future__ import annotations

import errno
import importlib
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from infexport.bundle import create_bundle, open_bundle
from infexport.conversion.tensorrt import build as engine
from infexport.conversion.tensorrt.build import Plan, build_engines
from infexport.conversion.tensorrt.profiles import make_profile
from infexport.inference.tensorrt_libraries import TensorRTRTX
from infexport.system import atomic_files
from infexport.system.atomic_files import PREFIX, partial_folder, recover, sweep
from infexport.system.gpus import TARGETS
from infexport.system.progress import ProgressListener

Moment = Callable[[str], None]
watched: list[tuple[Path, Moment]] = []


@pytest.fixture(scope="module")
def crash() -> ModuleType:
    """The script, and its hook, which Python has no way to remove."""
    module = importlib.import_module("crash")

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if watched and module.changes(event, arguments, watched[-1][0]):
            now = watched.pop()  # what it does itself is not told of
            try:
                now[1](event)
            finally:
                watched.append(now)

    sys.addaudithook(hook)
    return module


@contextmanager
def moments(root: Path, told: Moment) -> Iterator[None]:
    """`told` is told of everything that is about to change below a folder."""
    watched.append((root, told))
    try:
        yield
    finally:
        watched.pop()


@pytest.fixture(scope="module")
def given(crash: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("given")
    crash.checkpoint(folder)
    return folder


@pytest.fixture(scope="module")
def made(infexport: Any, crash: ModuleType, given: Path) -> Path:
    """A bundle."""
    infexport(*crash.convert(given, "old", given / "bundle"))
    return given / "bundle"


@pytest.fixture
def scene(crash: ModuleType, given: Path, made: Path, tmp_path: Path) -> Callable[[str], Any]:
    """A scene of the script, whose old state is in `tmp_path`."""

    def get(name: str) -> Any:
        shutil.copytree(made, tmp_path / "bundle")
        (found,) = (each for each in crash.scenes(given) if each.name == name)
        return found

    return get


def states(scene: Any, folder: Path, run: Callable[[], object]) -> list[str]:
    """What is there before every change, and in the end."""
    found: list[str] = []
    with moments(folder, lambda event: found.append(scene.state(folder))):
        run()
    return [*found, scene.state(folder)]


def fill_disk(crash: ModuleType, scene: Any, folder: Path, run: Callable[[int], Any], most: int = 1000) -> int:
    """Have the disk full at one change after the other, until there is none; how many there were."""
    for at in range(1, most):
        left = 0

        def refuse(event: str, at: int = at) -> None:
            nonlocal left
            left += 1
            if left >= at and event in crash.ADDS:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        before = crash.names(folder)
        with moments(folder, refuse):
            result = run(at)
        if left < at:
            return at - 1
        assert scene.state(folder) in ("old", "new")
        assert result.exit_code in (0, 1, 2), result.stderr
        assert not isinstance(result.exception, OSError), result.exception
        # one of an image, and one of what is written
        assert (result.stderr.count("error: ") > 0) == (result.exit_code != 0), result.stderr
        assert crash.names(folder) == before
    return most


def test_a_conversion_that_replaces_a_bundle(scene, infexport, tmp_path):
    converting = scene("convert")
    found = states(converting, tmp_path, lambda: infexport(*converting.arguments(tmp_path)))
    assert found == sorted(found, reverse=True), "once new, it stays"
    assert found[0] == "old"
    assert found[-1] == "new"
    assert len(found) > 20
    assert [item.name for item in tmp_path.iterdir()] == ["bundle"]


def test_a_conversion_where_the_system_cannot_exchange_folders(scene, infexport, given, tmp_path, monkeypatch):
    """Such as NFS: there is a moment without a bundle at its place, and the next run puts it back."""
    converting = scene("convert")
    monkeypatch.setattr(atomic_files, "_exchange", lambda a, b: False)
    bundle = tmp_path / "bundle"
    without = []

    def look(event: str) -> None:
        if not bundle.exists():
            without.append(event)
            shutil.copytree(tmp_path, given / "stopped", dirs_exist_ok=True)

    with moments(tmp_path, look):
        infexport(*converting.arguments(tmp_path))
    assert converting.state(tmp_path) == "new"
    assert without == ["os.rename"]
    stopped = given / "stopped"
    assert not (stopped / "bundle").exists()
    recover(stopped / "bundle")
    assert converting.state(stopped) == "old"
    with create_bundle(stopped / "bundle", force=True) as folder:
        shutil.copytree(bundle, folder, dirs_exist_ok=True)
    assert [item.name for item in stopped.iterdir()] == ["bundle"]


def test_a_build_puts_all_its_engines_in_place_at_once(scene, infexport, crash, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path.parent / "cache"))
    building = scene("build-engine")
    for target in ("a100", "rtx3090"):
        infexport("build-engine", tmp_path / "bundle", "--target", target, "--sizes", 16, "--batch", 1)
    (tmp_path / "bundle" / "engines" / "notes").mkdir()
    (tmp_path / "bundle" / "engines" / "notes" / "mine.txt").write_text("mine")
    found = states(building, tmp_path, lambda: infexport(*building.arguments(tmp_path)))
    assert found == sorted(found, reverse=True)
    assert (found[0], found[-1]) == ("old", "new")
    assert (tmp_path / "bundle" / "engines" / "notes" / "mine.txt").read_text() == "mine"
    assert not [name for name in crash.names(tmp_path) if PREFIX in name]


@pytest.mark.parametrize(
    ("name", "files"), [("run-engine", ("out.json", "maps/image.png")), ("report", ("page.html",))]
)
def test_outputs(name, files, scene, infexport, crash, tmp_path, cli_result):
    running = scene(name)
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(crash.OLD[file])
    changes = fill_disk(crash, running, tmp_path, lambda at: cli_result(*running.arguments(tmp_path)))
    assert changes >= 5
    for file in files:
        (tmp_path / file).write_bytes(crash.OLD[file])
    found = states(running, tmp_path, lambda: infexport(*running.arguments(tmp_path)))
    assert found == sorted(found, reverse=True)
    assert (found[0], found[-1]) == ("old", "new")
    assert not (tmp_path / "scratch").exists() or not list((tmp_path / "scratch").iterdir())


def test_what_killed_processes_left_is_deleted_and_what_living_ones_make_is_not(tmp_path):
    (tmp_path / f"{PREFIX}dead").mkdir()
    (tmp_path / f"{PREFIX}dead" / "half.onnx").touch()
    (tmp_path / "partial").mkdir()
    with partial_folder(tmp_path) as living:
        sweep(tmp_path)
        assert {item.name for item in tmp_path.iterdir()} == {living.name, "partial"}
    assert [item.name for item in tmp_path.iterdir()] == ["partial"]


def test_a_newborn_that_is_taken_for_dead_is_made_again(tmp_path, monkeypatch):
    lock, taken = atomic_files._lock, []

    def slow(folder: Path, wait: bool = False) -> int | None:
        if wait and not taken:
            taken.append(folder)
            sweep(tmp_path)
        return lock(folder, wait)

    monkeypatch.setattr(atomic_files, "_lock", slow)
    with partial_folder(tmp_path) as folder:
        assert folder not in taken
        assert folder.is_dir()


def test_writers_of_one_bundle_do_not_mix_and_readers_see_one_of_them(golden_bundle, made, tmp_path):
    """Twenty at once, of two models in turn, each with a number in two files."""
    path, seen, wrong = tmp_path / "bundle", set(), []
    models = [made, golden_bundle("reference_linear")]

    def write(number: int) -> None:
        with create_bundle(path, force=True) as folder:
            shutil.copytree(models[number % 2], folder, dirs_exist_ok=True)
            (folder / "engines").mkdir()
            for name in ("a.engine", "b.engine"):
                (folder / "engines" / name).write_text(str(number))

    def read() -> None:
        while any(writer.is_alive() for writer in writers):
            try:
                seen.add(open_bundle(path).manifest.digest)
            except Exception as error:  # one that is raised in a thread fails nothing
                wrong.append(error)

    write(0)
    writers = [threading.Thread(target=write, args=[number]) for number in range(20)]
    readers = [threading.Thread(target=read) for _ in range(2)]
    for thread in [*writers, *readers]:
        thread.start()
    for thread in [*writers, *readers]:
        thread.join()
    assert not wrong
    assert seen
    assert seen <= {open_bundle(model).manifest.digest for model in models}
    assert len({(path / "engines" / name).read_text() for name in ("a.engine", "b.engine")}) == 1
    assert [item.name for item in tmp_path.iterdir()] == ["bundle"]


def test_builds_into_one_bundle_at_once_keep_each_other_s_engines(made, tmp_path, monkeypatch):
    """Twelve, for six GPUs, each twice: every engine is there, beside its own sidecar."""
    bundle = open_bundle(shutil.copytree(made, tmp_path / "bundle"))

    def build(bundle: Any, plan: Any, parts: Any, scratch: Path, listener: Any) -> tuple[str, list[dict[str, Any]]]:
        for part in parts:
            (scratch / "engines" / part.engine).write_text(f"{part.engine} by {threading.get_ident()}")
        return "1.0", [{"seconds": 0.0, "layers": {}, "log": []} for _ in parts]

    monkeypatch.setattr(engine, "_build", build)
    sizes = make_profile(bundle.manifest, [(16, 16)], [1])
    targets = [*TARGETS][:6]
    plans = [Plan(TARGETS[name], TensorRTRTX(), "fp32", "whole", sizes, None) for name in targets * 2]
    threads = [threading.Thread(target=build_engines, args=[bundle, plan, ProgressListener()]) for plan in plans]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = {each.recorded.target: each.state for each in open_bundle(bundle.path).engines}
    assert found == dict.fromkeys(targets, "current")
    assert {item.name for item in (tmp_path / "bundle").iterdir() if item.is_dir()} == {"engines"}
