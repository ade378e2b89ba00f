"""Finished work is shown as well as any stdout and stderr allow, and exit codes are right."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image
from support import ZOO

COMMAND = f"{sys.prefix}/bin/infexport"
DIGIT = min((ZOO / "digits-held-out").glob("*.png"))
NAME = "café-数字-🦀.png"
LOST = "cannot write to standard output"


def heed():
    """Restore the default of SIGINT, which a shell ignores in background processes."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def run(arguments, stdout="", stderr="", **environment):
    """Run the command with its streams redirected as by a shell; return code, stdout and stderr."""
    ends = {"closed": "{}>&-", "full": "{}>/dev/full", "left": "{}> >(exec true)", "": ""}
    script = f'"$@" {ends[stdout].format(1)} {ends[stderr].format(2)}'
    if "left" in (stdout, stderr):  # nobody reads any more when it writes
        script = f"exec 3>&1; {script}"
    done = subprocess.run(
        ["bash", "-c", script, "bash", COMMAND, *map(str, arguments)],
        capture_output=True,
        env=os.environ | environment,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def commands(zoo_bundle, tmp_path_factory):
    image = tmp_path_factory.mktemp("names") / NAME
    image.write_bytes(DIGIT.read_bytes())
    bundle = zoo_bundle("digits-linear")
    return {
        "help": ["--help"],
        "inspect": ["inspect", bundle, "--json"],
        "run-engine": ["run-engine", bundle, image, "--json"],
        "usage": ["inspect", "--nonsense"],
        "error": ["run-engine", bundle, "nowhere.png"],
    }


@pytest.mark.parametrize("command", ["help", "inspect", "run-engine"])
@pytest.mark.parametrize(("stdout", "expected"), [("closed", 0), ("full", 2), ("left", 141)])
def test_a_stdout_that_takes_nothing(commands, command, stdout, expected):
    code, _, stderr = run(commands[command], stdout=stdout)
    assert code == expected
    assert (LOST in stderr.decode()) == (stdout == "full")
    assert b"bug" not in stderr


@pytest.mark.parametrize("command", ["inspect", "run-engine", "usage", "error"])
@pytest.mark.parametrize("stderr", ["closed", "full", "left"])
def test_a_stderr_that_takes_nothing_costs_nothing(commands, command, stderr):
    code, stdout, _ = run(commands[command], stderr=stderr)
    assert code == (2 if command in ("usage", "error") else 0)
    if command in ("inspect", "run-engine"):
        assert json.loads(stdout)
    else:
        assert stdout == b""


@pytest.mark.parametrize(("stdout", "expected"), [("closed", 0), ("full", 2), ("left", 141)])
def test_neither_takes_anything(commands, stdout, expected):
    for stderr in ("closed", "full", "left"):
        assert run(commands["help"], stdout=stdout, stderr=stderr)[0] == expected


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "latin-1"},
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "ascii:strict", "PYTHONUTF8": "0"},
        {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ],
)
def test_encodings_that_lack_characters(commands, environment):
    charset = "latin-1" if "latin-1" in environment.values() else "ascii"
    code, stdout, _ = run(commands["run-engine"], **environment)
    assert code == 0
    # as programs read it, which expect UTF-8
    assert json.loads(stdout.decode("ascii"))["images"][0]["file"] == str(commands["run-engine"][2])
    code, stdout, stderr = run(commands["run-engine"][:-1], **environment)
    assert code == 0
    assert r"\u6570\u5b57-\U0001f980.png" in stdout.decode(charset)
    stderr.decode(charset)
    code, stdout, _ = run(["run-engine", "--help"], **environment)
    assert code == 0
    assert "Label IMAGES" in stdout.decode(charset)


def test_utf_8_is_written_as_it_is(commands):
    _, stdout, _ = run(commands["run-engine"])
    assert NAME in stdout.decode()


def test_results_are_written_where_stdout_is_full(commands, tmp_path):
    code, _, stderr = run([*commands["run-engine"], "-o", tmp_path / "out.json"], stdout="full")
    assert code == 2
    assert "No space left on device" in stderr.decode()
    assert json.loads((tmp_path / "out.json").read_text())["images"]


def test_an_image_that_fails_is_told_where_the_reader_has_left(commands, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "bad.png").write_bytes(b"")
    code, _, stderr = run(["run-engine", commands["inspect"][1], tmp_path], stdout="left")
    assert code == 1
    assert "bad.png" in stderr.decode()


def test_no_file_takes_the_number_of_a_closed_stream(tmp_path):
    """Texts that libraries write to descriptors 1 and 2 must not end up in an output file."""
    code = "import os\nfrom infexport.system.standard_streams import open_streams\nopen_streams()\n"
    code += f"file = open({str(tmp_path / 'file')!r}, 'w')\n[os.write(number, b'text') for number in (1, 2)]\n"
    code += "print('out', flush=True); import subprocess; subprocess.run(['sh', '-c', 'echo more; echo more >&2'])"
    subprocess.run(["bash", "-c", f'{sys.executable} -c "$1" <&- >&- 2>&-', "bash", code], check=True)
    assert (tmp_path / "file").read_bytes() == b""


AT_IMPORTS = """
import os, signal, sys
from infexport.__main__ import main
number, moments, sys.argv = int(sys.argv[1]), sys.argv[2].split(","), ["infexport", *sys.argv[3:]]
signal.signal(signal.SIGINT, signal.default_int_handler)
for moment in map(int, moments):
    if os.fork() == 0:
        met = []
        def count(event, arguments):
            met.extend([event] if event == "import" else [])
            if len(met) == moment and event == "import":
                os.kill(os.getpid(), number)
        os.close(1)
        sys.addaudithook(count)
        main()
    print(moment, os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""
"""Script that runs the command repeatedly, and sends it a signal at its n-th import for every n."""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_at_any_import_ends_it_quietly(commands, number, code):
    moments = [1, 2, 5, 10, 30, 80, 130, 200, 280, 350]
    given = [int(number), ",".join(map(str, moments)), *commands["run-engine"]]
    arguments = [sys.executable, "-c", AT_IMPORTS, *map(str, given)]
    done = subprocess.run(arguments, capture_output=True, text=True, preexec_fn=heed)
    assert done.stdout.splitlines() == [f"{moment} {code}" for moment in moments]
    assert set(done.stderr.splitlines()) <= {"interrupted"}


@pytest.mark.parametrize("milliseconds", [20, 60, 100, 150, 200, 250, 300])
def test_an_interrupt_at_any_time(commands, milliseconds):
    """Before `main` Python handles the signal; from then on it is never reported as a bug."""
    process = subprocess.Popen(
        [COMMAND, *map(str, commands["run-engine"])], stdout=-1, stderr=-1, text=True, preexec_fn=heed
    )
    time.sleep(milliseconds / 1000)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate()
    if "Traceback" in told:
        assert not re.search(r'__main__\.py", line \d+, in ', told)
        assert process.returncode in (1, -signal.SIGINT)
    else:
        assert process.returncode in (0, 130, -signal.SIGINT)
    assert "bug" not in told
