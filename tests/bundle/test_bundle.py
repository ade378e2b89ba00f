"""A bundle is believed only as far as it can be checked, and nothing of anybody's is lost."""

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
from PIL import Image
from support import GOLDEN

from infexport.bundle import create_bundle, open_bundle, seal
from infexport.bundle.engine_record import Engine
from infexport.bundle.integrity import sealed
from infexport.bundle.manifest import read_manifest
from infexport.errors import InfexportError
from infexport.system.atomic_files import PREFIX

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
    file.write_bytes(sealed(values))


NONSENSE = [
    {"config": {}}, {"config__patch_size": "8"}, {"config__patch_size": 0}, {"config__image_size": 10**12},
    {"config__qkv_bias": "yes"}, {"config__norm_eps": "small"}, {"config__variant": 3}, {"files": []}, {"files": {}},
    {"preprocessing__more": 1}, {"config__more": 1}, {"config__num_heads": 7}, {"neumann": {"terms": 1, "more": 2}},
    {"preprocessing": {"mean": [0] * 3, "std": [1] * 3, "resize_mode": "exact", "resize_size": 8, "crop_size": 8}},
    {"checkpoint": {}}, {"preprocessing": {}}, {"preprocessing__mean": "abc"}, {"preprocessing__std": [0, 0, 0]},
    {"versions": 3}, {"format": "1"}, {"unheard_of": 1}, {"neumann": {}},
    {"neumann": {"terms": 3, "a": 1.0, "b": 1.0}}, {"input": "float8"},
    {"stages": 3}, {"stages": [{}]}, {"stages": [{"graph": [], "over": "tokens", "inputs": [], "outputs": []}]},
    {"stages": [{"graph": "../other.onnx", "over": "tokens", "inputs": [], "outputs": []}]}, {"stages": []},
    *({"files": {"model.onnx": "0" * 64, name: "0" * 64}} for name in ("../x", "/etc/hostname", "a/b", "..")),
    {"files": {"model.onnx": "0" * 64, "infexport.json": "0" * 64}}, {"checkpoint": {"path": "a\0b", "files": {}}},
    {"checkpoint": {"path": "a", "files": {"../../id_rsa": "0" * 64}}},
]  # fmt: skip


@pytest.mark.parametrize("changes", NONSENSE, ids=str)
def test_nonsense_in_a_manifest_is_an_error_that_names_it(changes, bundle, infexport):
    edit(bundle, **changes)
    result = infexport("inspect", bundle, exit_code=2)
    assert "not as infexport wrote it" in result.stderr
    assert next(iter(changes)).split("__")[0] in result.stderr


STAGES = [
    lambda stages: stages[1].update(over="everything"),
    lambda stages: stages[1]["outputs"].remove("tokens"),
    lambda stages: stages[2].update(over="pairs"), lambda stages: stages[3]["inputs"].append("query"),
    lambda stages: stages.pop(), lambda stages: stages.pop(0), lambda stages: stages[2]["inputs"].append("image"),
]  # fmt: skip


@pytest.mark.parametrize("change", STAGES, ids=map(str, range(len(STAGES))))
def test_stages_that_cannot_be_run_one_after_the_other(change, bundle):
    stages = json.loads((bundle / "infexport.json").read_text())["stages"]
    change(stages)
    edit(bundle, stages=stages)
    with pytest.raises(InfexportError, match="not as infexport wrote it") as refused:
        open_bundle(bundle)
    assert "stages" in refused.value.details


@pytest.mark.parametrize(("number", "words"), [(99, "newer than this infexport"), (1, "older than this infexport")])
def test_a_manifest_of_another_format_is_refused(number, words, bundle):
    edit(bundle, format=number)
    with pytest.raises(InfexportError, match=words):
        open_bundle(bundle)


def refused(file, opening):
    """Whether an error names the file."""
    try:
        opening()
    except InfexportError as error:
        return file.name in f"{error.summary}\n{error.details}"
    return False


def test_any_byte_of_a_manifest_is_noticed(bundle, monkeypatch):
    """All of them, in turn: what is in a string, a number, a name, a hash, the digest, or between them."""
    monkeypatch.setattr("infexport.bundle.bundle._holds", lambda file, digest: True)
    file = bundle / "infexport.json"
    whole = file.read_bytes()
    for at in range(len(whole)):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        assert refused(file, lambda: open_bundle(bundle)), f"byte {at}"
    for other in (whole[:-1], whole + b"\n", whole.replace(b"\n", b"\r\n"), whole.replace(b'"digest"', b'"Digest"')):
        file.write_bytes(other)
        assert refused(file, lambda: open_bundle(bundle))
    file.write_bytes(whole)
    assert open_bundle(bundle).verified


def test_any_byte_of_any_file_is_noticed_before_it_is_run(bundle, infexport):
    """The first and the last, and some between, of weights, graphs and all."""
    image = bundle.parent / "a.png"
    Image.new("RGB", (9, 9)).save(image)
    for name in read_manifest(bundle / "infexport.json").files:
        file = bundle / name
        whole = file.read_bytes()
        for at in {0, len(whole) // 3, len(whole) // 2, len(whole) - 1}:
            file.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
            assert refused(file, lambda: open_bundle(bundle))
        told = infexport("run-engine", bundle, image, exit_code=2).stderr
        assert "the bundle was modified" in told
        assert name in told
        file.write_bytes(whole)
    infexport("run-engine", bundle, image)


def test_a_digest_names_all_of_a_bundle(bundle, infexport):
    """Whoever has it from elsewhere can tell a bundle that was made anew from the one that was sent."""
    manifest = open_bundle(bundle).manifest
    assert f"digest      {manifest.digest}" in infexport("inspect", bundle).stdout
    content = (bundle / "infexport.json").read_bytes()
    assert hashlib.sha256(content.replace(manifest.seal.encode(), b"0" * 64)).hexdigest() == manifest.seal


def test_labels_are_checked_before_the_work(bundle):
    for text in (
        '{"0": "a"}',
        "[1]",
        '["only one"]',
        "[" * 100_000,
        "[" * 100 + "]" * 100,
        "[\xff",
        json.dumps(["\ud800"] * 10),
    ):
        (bundle / "labels.json").write_text(text, encoding="latin-1")
        manifest = read_manifest(bundle / "infexport.json")
        (bundle / "infexport.json").unlink()
        seal(bundle, manifest)
        assert refused(bundle / "labels.json", lambda: open_bundle(bundle)), text[:20]


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
    sidecar.write_bytes(sealed(facts | {"graph": {"model.onnx": "another"}}))
    assert "STALE" in infexport("inspect", bundle).stdout
    whole = sidecar.read_bytes()
    for at in range(0, len(whole), 7):
        sidecar.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        (found,) = open_bundle(bundle).engines
        assert found == Engine("a100-fp32.engine", "unreadable", None), f"byte {at}"
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


def test_engines_that_may_not_be_looked_at_are_told(bundle, infexport, forbid):
    """And not taken for none: they would not be used, and with --force what is among them would be lost."""
    (bundle / "engines").mkdir()
    forbid(bundle / "engines")
    with pytest.raises(InfexportError, match="cannot look into"):
        _ = open_bundle(bundle).engines
    Image.new("RGB", (32, 32)).save(bundle.parent / "image.png")
    assert "Permission denied" in infexport("run-engine", bundle, bundle.parent / "image.png", exit_code=2).stderr
    infexport("run-engine", bundle, bundle.parent / "image.png", "--provider", "cpu")
    assert "Permission denied" in infexport(*CONVERT, "-o", bundle, "--force", exit_code=2).stderr
    assert (bundle / "engines").is_dir()


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


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_killed_convert_leaves_nothing(number, code, tmp_path):
    command = [sys.executable, "-m", "infexport", *map(str, CONVERT), "-o", str(tmp_path / "b")]
    # started in the background, this process ignores some signals, and its children would too
    heed = partial(signal.signal, number, signal.SIG_DFL)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heed)
    for line in process.stderr:
        if line.startswith("exporting"):
            break
    (partial_folder,) = tmp_path.iterdir()
    assert partial_folder.name.startswith(PREFIX)
    time.sleep(0.5)
    process.send_signal(number)
    process.communicate(timeout=60)
    # where an interrupt meets code that Python compiles from text, as torch's exporter does, Python ends by the signal
    # in the end, whatever was raised meanwhile; a shell shows 130 for both
    assert process.returncode == code or (number == signal.SIGINT and process.returncode == -number)
    assert list(tmp_path.iterdir()) == []
