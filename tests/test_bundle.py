"""A bundle is believed only as far as it can be checked, and nothing of anybody's is lost."""

import json
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
from support import GOLDEN

from infexport.bundle import create_bundle, open_bundle
from infexport.errors import InfexportError
from infexport.manifest import read_manifest

CHECKPOINT, CONFIG = GOLDEN / "reference_linear.safetensors", GOLDEN / "reference_linear.json"
CONVERT = ("convert", "checkpoint", CHECKPOINT, "--config", CONFIG)


@pytest.fixture
def bundle(golden_bundle, tmp_path):
    """A copy that may be spoilt."""
    shutil.copytree(golden_bundle("reference_linear"), tmp_path / "b")
    return tmp_path / "b"


def edit(bundle, **changes):
    file = bundle / "infexport.json"
    values = json.loads(file.read_text())
    for name, value in changes.items():
        section, _, key = name.partition("__")
        if key:
            values[section][key] = value
        else:
            values[section] = value
    file.write_text(json.dumps(values))


NONSENSE = [
    {"config": {}}, {"config__patch_size": "8"}, {"config__patch_size": 0}, {"files": []}, {"files": {}},
    {"checkpoint": {}}, {"preprocessing": {}}, {"preprocessing__mean": "abc"}, {"preprocessing__std": [0, 0, 0]},
    {"versions": 3}, {"format": "1"}, {"unheard_of": 1}, {"neumann": {}}, {"input": "float8"},
    {"stages": 3}, {"stages": [{}]}, {"stages": [{"graph": [], "over": "tokens", "inputs": [], "outputs": []}]},
    {"stages": [{"graph": "../other.onnx", "over": "tokens", "inputs": [], "outputs": []}]},
]  # fmt: skip


@pytest.mark.parametrize("changes", NONSENSE, ids=str)
def test_nonsense_in_a_manifest_is_an_error_that_names_it(changes, bundle, infexport):
    edit(bundle, **changes)
    result = infexport("inspect", bundle, exit_code=2)
    assert "not as infexport wrote it" in result.stderr
    assert next(iter(changes)).split("__")[0] in result.stderr


def test_a_newer_manifest_is_refused(bundle):
    edit(bundle, format=99)
    with pytest.raises(InfexportError, match="newer than this infexport"):
        open_bundle(bundle)


@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
def test_a_broken_manifest(text, bundle, infexport):
    (bundle / "infexport.json").write_text(text)
    assert "unreadable" in infexport("inspect", bundle, exit_code=2).stderr


def test_every_file_is_checked(bundle, infexport):
    (bundle / "model.onnx.data").unlink()
    assert "model.onnx.data" in infexport("inspect", bundle, exit_code=1).stdout
    with pytest.raises(InfexportError) as refused:
        open_bundle(bundle)
    assert "model.onnx.data" in refused.value.details


def test_an_engine_is_checked_too(bundle, infexport):
    infexport("build-engine", bundle, "--target", "a100", "--sizes", 64)
    assert infexport("inspect", bundle).stdout.count("a100-fp32.engine") == 2
    engine = bundle / "engines" / "a100-fp32.engine"
    content = engine.read_bytes()
    engine.write_bytes(content[:-1])
    assert "MODIFIED" in infexport("inspect", bundle, exit_code=1).stdout
    engine.unlink()
    assert "MISSING" in infexport("inspect", bundle, exit_code=1).stdout
    engine.write_bytes(content)
    sidecar = engine.with_name(engine.name + ".json")
    facts = json.loads(sidecar.read_text())
    sidecar.write_text(json.dumps(facts | {"graph": {"model.onnx": "another"}}))
    assert "STALE" in infexport("inspect", bundle).stdout
    sidecar.write_text("{")
    assert "UNREADABLE" in infexport("inspect", bundle, exit_code=1).stdout


def test_force_refuses_to_lose_what_is_not_the_bundle_s(bundle, infexport):
    """Such as the checkpoint itself."""
    shutil.copy(GOLDEN / "reference_linear.safetensors", bundle / "model.safetensors")
    arguments = ("convert", "checkpoint", bundle / "model.safetensors", *CONVERT[3:], "-o", bundle, "--force")
    assert "model.safetensors" in infexport(*arguments, exit_code=2).stderr
    assert (bundle / "model.safetensors").is_file()
    assert open_bundle(bundle).verified


def test_force_keeps_what_lies_among_the_engines(bundle, infexport):
    (bundle / "engines").mkdir()
    (bundle / "engines" / "notes.txt").write_text("mine")
    assert "notes.txt" in infexport(*CONVERT, "-o", bundle, "--force", exit_code=2).stderr


def test_force_says_what_to_do_with_a_broken_bundle(bundle, infexport):
    (bundle / "infexport.json").write_text("{")
    assert "delete the folder" in infexport(*CONVERT, "-o", bundle, "--force", exit_code=2).stderr


def test_of_two_at_once_the_second_is_refused(bundle):
    """Whichever finishes later finds the other's bundle and leaves it."""
    path = bundle.parent / "made"

    def make(layout, meanwhile=lambda: None):
        with create_bundle(path) as folder:
            shutil.copytree(bundle, folder, dirs_exist_ok=True)
            edit(folder, layout=layout)
            meanwhile()

    with pytest.raises(InfexportError, match="the output exists"):
        make("late", meanwhile=lambda: make("early"))
    assert read_manifest(path / "infexport.json").layout == "early"
    assert sorted(item.name for item in bundle.parent.iterdir()) == ["b", "made"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_killed_convert_leaves_nothing(number, code, tmp_path):
    command = [sys.executable, "-m", "infexport", *map(str, CONVERT), "-o", str(tmp_path / "b")]
    # started in the background, this process ignores some signals, and its children would too
    heed = partial(signal.signal, number, signal.SIG_DFL)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heed)
    for line in process.stderr:
        if line.startswith("exporting"):
            break
    assert [item.name[:9] for item in tmp_path.iterdir()] == [".partial-"]
    time.sleep(0.5)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == code
    assert list(tmp_path.iterdir()) == []
