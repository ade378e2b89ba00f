"""A slice of the fuzzer: every input ends in success or in one clear error; and what watches over that sees."""

from __future__ import annotations

import json
import os
import pickle
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import click
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import GOLDEN

from infexport.bundle import Bundle
from infexport.bundle.integrity import sealed
from infexport.bundle.manifest import FILE, read_manifest
from infexport.cli.console import OBEYED, Output, printable
from infexport.conversion.convert import ConvertOptions, read_checkpoint
from infexport.errors import InfexportError
from infexport.evaluation.accuracy.dataset import Classes, read_labelled
from infexport.inference.engine_selection import find_engine_sets
from infvit.checkpoint.settings import NAMES

SEED = 7
SLICE = {
    "safetensors": 50,
    "pth": 50,
    "folder": 50,
    "config": 50,
    "labels": 40,
    "manifest": 50,
    "graph": 40,
    "sidecar": 60,
    "images": 80,
    "scratch": 25,
    "options": 40,
    "python": 40,
    "outputs": 15,
}


@pytest.fixture(scope="module")
def whole(hostile, zoo_bundle, tmp_path_factory):
    """The whole files that are damaged."""
    return hostile("seeds").Seeds(zoo_bundle("digits-linear"), tmp_path_factory.mktemp("seeds"))


@pytest.fixture
def judged(hostile, whole, tmp_path):
    """How a case ends, of a door that gives this function of the case: `judged(act, seconds=1)`."""
    cases = hostile("cases")

    def judge(act, **limits):
        name = cases.Name(0, "planted", 0)
        return cases.run_case(name, tmp_path / "case", whole, lambda case: lambda: act(case), **limits)

    return judge


def test_every_door_is_tried(hostile):
    assert set(hostile("doors").NAMES) == SLICE.keys()


@pytest.mark.parametrize("name", SLICE)
def test_success_or_one_clear_error(name, hostile, whole, tmp_path):
    cases, door = hostile("cases"), hostile("doors").door(name)
    ends = {}
    for index in range(SLICE[name]):
        folder = tmp_path / str(index)
        ends[index] = cases.run_case(cases.Name(SEED, name, index), folder, whole, door)
        cases.delete(folder)
    assert {index: end for index, end in ends.items() if end.end == "violated"} == {}
    # a door that nothing comes to, or nothing passes, tests nothing
    assert {end.end for end in ends.values()} == {"succeeded", "refused"}


PLANTED = {
    "outputs": ("infexport.outputs.heatmaps.check_apart", lambda outputs, inputs, hint: None, "output"),
    "scratch": ("infexport.inference.streaming.driver.Tokens.check", lambda self, stages, position: None, "answer"),
    "python": ("infexport.inference.options.InferenceOptions.named", lambda self, names: [], "answer"),
}
"""Door → what is taken out of the tool, and the kind of violation that then is seen."""


@pytest.mark.parametrize("name", PLANTED)
def test_doors_see_wrong_answers(name, hostile, whole, tmp_path, monkeypatch):
    cases, door = hostile("cases"), hostile("doors").door(name)
    place, fault, kind = PLANTED[name]
    monkeypatch.setattr(place, fault)
    monkeypatch.setattr("infexport.outputs.heatmaps.is_drawn", lambda path: True)
    for index in range(200):
        folder = tmp_path / str(index)
        outcome = cases.run_case(cases.Name(SEED, name, index), folder, whole, door)
        cases.delete(folder)
        if outcome.kind == kind:
            return
    raise AssertionError("nothing was seen")


def write(path):
    path.write_text("x")


def connect():
    with socket.socket() as one, suppress(OSError):
        one.settimeout(0.1)
        one.connect(("192.0.2.1", 9))  # of addresses for documents: nobody's


@pytest.mark.parametrize(
    ("kind", "act"),
    [
        ("traceback", lambda case: {}["missing"]),
        ("traceback", lambda case: [][0]),
        ("outside", lambda case: write(case.given / "x")),
        ("outside", lambda case: write(Path("x"))),
        ("outside", lambda case: os.mkdir("x", dir_fd=os.open(case.given, os.O_RDONLY))),
        ("outside", lambda case: (case.made / "x").symlink_to("y") or (case.made / "x").rename(case.given / "x")),
        ("outside", lambda case: (case.made / "x").symlink_to(case.given / "x") or write(case.made / "x")),
        ("outside", lambda case: write(case.place.root.parent / "beside")),
        ("started", lambda case: subprocess.run(["true"], check=True) and None),
        ("started", lambda case: os.system("true")),
        ("leftover", lambda case: tempfile.mkstemp() and None),
        ("connected", lambda case: connect()),
    ],
)  # fmt: skip
def test_what_a_case_must_not_do_is_seen(kind, act, judged):
    outcome = judged(act, seconds=20)
    assert (outcome.end, outcome.kind) == ("violated", kind)


def test_planted_code_that_runs_is_seen(hostile, judged):
    pth = hostile("doors.pth")
    canary = hostile("watch").CANARY

    def act(case):
        pickle.loads(pickle.dumps(pth.Payload(open, str(case.place.root / canary), "w")))

    outcome = judged(act)
    assert outcome.end == "violated"
    assert "planted code ran" in outcome.text


def test_a_hang_and_memory_are_seen(judged):
    assert judged(lambda case: time.sleep(20), seconds=0.2).kind == "hang"
    assert judged(lambda case: np.ones(10**7) is None, most=2**25).kind == "memory"
    assert judged(lambda case: np.ones(10**6) is None, most=2**25).end == "succeeded"


@pytest.mark.parametrize(
    ("kind", "act"),
    [
        ("message", lambda: sys.exit(2)),
        ("message", lambda: Output().error(InfexportError("")) or sys.exit(2)),
        ("message", lambda: [Output().error(InfexportError("a")) for _ in "ab"] and sys.exit(2)),
        ("exit code", lambda: sys.exit(3)),
        ("traceback", lambda: print("Traceback (most recent call last):")),
        ("terminal", lambda: click.echo("\x1b[2J", err=True)),
        ("terminal", lambda: click.echo("a\u202eb", err=True)),
        ("output", lambda: click.echo('{"a": NaN}')),
    ],
)
def test_what_a_command_must_not_print_is_seen(kind, act, hostile, judged, monkeypatch):
    command = click.command()(click.option("--json", is_flag=True)(lambda json: act()))
    monkeypatch.setattr(hostile("cases"), "cli", command)
    assert judged(lambda case: case.cli("--json")).kind == kind


def test_a_worker_that_dies_or_is_silent_costs_one_case(hostile, tmp_path):
    """The first case ends the process, the second never ends, the third is well."""
    cases, supervise = hostile("cases"), hostile("supervise")
    names = [cases.Name(0, "planted", index) for index in range(3)]

    class Fake:
        def __init__(self, job, log):
            first = job.names[0]
            well = [{"ended": first, "outcome": vars(cases.Outcome("refused"))}]
            self.said = [{"begins": first}, *((None,) if first[2] == 0 else () if first[2] == 1 else well)]

        def hear(self, seconds):
            if not self.said:
                raise TimeoutError
            return self.said.pop(0)

        def end(self):
            return -11

    found = [outcome for _, outcome in supervise.supervised(names, tmp_path, tmp_path, start=Fake)]
    assert [(each.end, each.kind) for each in found] == [("violated", "crash"), ("violated", "hang"), ("refused", "")]


def test_the_script_from_end_to_end(zoo_bundle, tmp_path):
    script = Path(__file__).with_name("fuzz.py")
    command = [sys.executable, script, "--count", "6", "--door", "sidecar", "--bundle", zoo_bundle("digits-linear")]
    done = subprocess.run([*command, "--output", tmp_path / "f.json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "f.json").read_text())
    assert found["doors"]["sidecar"]["tried"] == found["tried"] == 6
    assert found["violations"] == []


TEXT = st.text(max_size=8) | st.text(st.characters(categories=["Cs", "Cc", "Cf"]), max_size=4)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=8,
)
quick = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@quick
@given(data=st.data(), value=VALUES)
def test_any_value_in_a_manifest_is_read_or_refused(whole, tmp_path, data, value):
    values = json.loads(json.dumps(whole.manifest))
    name = data.draw(st.sampled_from(sorted(values)))
    if isinstance(values[name], dict) and values[name] and data.draw(st.booleans()):
        values[name][data.draw(st.sampled_from(sorted(values[name])))] = value
    else:
        values[name] = value
    (tmp_path / FILE).write_text(json.dumps(values))
    with suppress(InfexportError):
        read_manifest(tmp_path / FILE)


@quick
@given(
    name=st.sampled_from(sorted(NAMES | dict.fromkeys(("mean", "std", "size", "image_mean", "crop_size")))),
    value=VALUES,
)
def test_any_value_in_a_config_is_used_or_refused(tmp_path, name, value):
    values = json.loads((GOLDEN / "reference_pure.json").read_text()) | {name: value}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with suppress(InfexportError):
        read_checkpoint(GOLDEN / "reference_pure.safetensors", ConvertOptions(config_file=tmp_path / "config.json"))


@quick
@given(name=st.sampled_from(["graph", "profile", "layers", "chunk", "target", "sha256", "precision"]), value=VALUES)
def test_any_value_in_a_sidecar_is_used_or_refused(whole, hostile, tmp_path, name, value):
    (tmp_path / "engines").mkdir(exist_ok=True)
    (tmp_path / "engines" / "a.engine").write_bytes(b"x")
    facts = hostile("doors.sidecar")._facts(SimpleNamespace(seeds=whole), b"x") | {name: value}
    try:
        content = sealed(facts)
    except ValueError:
        return  # no JSON
    (tmp_path / "engines" / "a.engine.json").write_bytes(content)
    bundle = Bundle(tmp_path, whole.opened.manifest)
    assert len(find_engine_sets(bundle, "whole")) <= 1
    assert bundle.engines[0].state in ("current", "stale", "modified", "unreadable")


@quick
@given(
    content=st.binary(max_size=60)
    | st.text('",\n\r\0x19 ', max_size=40).map(lambda text: f"file,label\n{text}".encode())
)
def test_any_csv_names_images_or_is_refused(tmp_path, content):
    (tmp_path / "a.csv").write_bytes(content)
    with suppress(InfexportError):
        read_labelled(tmp_path / "a.csv", Classes(10, None))


@given(text=st.text())
def test_what_is_printed_is_what_it_was_but_for_what_a_terminal_obeys(text):
    assert not OBEYED.search(printable(text))
    if not OBEYED.search(text):
        assert printable(text) == text
