"""scripts/build_on_a100: its commands exist as they stand there, and its steps fail one by one."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

from infexport.cli import cli

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "build_on_a100"
MODEL = ("model.safetensors", "--variant", "linear_infsa", "--num-heads", "16")


def run(*arguments, **environment):
    return subprocess.run(
        [SCRIPT, *map(str, arguments)], capture_output=True, text=True, check=False, env=os.environ | environment
    )


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    """Those of a dry run, which makes nothing."""
    out = tmp_path_factory.mktemp("dry") / "an output"
    done = run("--dry-run", "--output", out, "--peers", *MODEL, VENV=str(out / "venv"))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert not out.exists()
    lines = [line.removeprefix("$ ") for line in done.stdout.splitlines()]
    assert len(lines) == len(done.stdout.splitlines())
    return [shlex.split(line) for line in lines]


def infexports(commands):
    return [arguments for program, *arguments in commands if program.endswith("bin/infexport")]


def test_every_command_parses(commands):
    for arguments in infexports(commands):
        command, words = cli, list(arguments)
        while isinstance(command, click.Group):
            command = command.commands[words.pop(0)]
        command.make_context(command.name, words)  # raises on an option, a choice or a number that is none


def test_every_script_has_its_options(commands):
    for program, *arguments in commands:
        if program.endswith("bin/python"):
            script, *words = arguments
            options = subprocess.run(
                [sys.executable, script, "--help"], capture_output=True, text=True, check=True
            ).stdout
            assert all(f"{word} " in options for word in words if word.startswith("--"))


def test_what_is_built_and_measured(commands):
    found = infexports(commands)
    both = 2  # models
    assert [words[0] for words in found].count("doctor") == 1
    built = [words for words in found if words[0] == "build-engine"]
    assert len(built) == both * (4 + 2)
    assert all(words[2:6] == ["--backend", "tensorrt", "--target", "local"] for words in built)
    for precision in ("fp32", "fp16", "bf16", "int8"):
        engine = f"this-gpu-{precision}"
        with_it = [words[0] for words in found if "--engine" in words and words[words.index("--engine") + 1] == engine]
        streamed = precision in ("fp32", "fp16")
        assert sorted(with_it) == sorted(
            both * (["validate", "run-engine", "benchmark", "benchmark"] + ["run-engine"] * streamed)
        )
        assert all(("--calibrate" in words) == (precision == "int8") for words in built if precision in words)
    assert sum("--execution" in words for words in built) == both * 2
    convert = next(words for words in found if "model.safetensors" in words)
    assert convert[2:7] == list(MODEL)
    installed = next(words for words in commands if "-e" in words)
    extras = installed[installed.index("-e") + 1].partition("[")[2].strip("]").split(",")
    project = (ROOT / "pyproject.toml").read_text()
    assert all(f"\n{extra} = [" in project for extra in extras)
    assert {"gpu", "export", "tensorrt"} <= set(extras)
    assert "dev" not in extras  # which has ONNX Runtime for the CPU, and that overwrites the other


def test_no_gpu_is_one_clear_line(tmp_path):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'; exit 9\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    done = run("--output", tmp_path / "out", PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert done.returncode == 2
    assert done.stderr.startswith("error: no NVIDIA GPU here")
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_help_and_wrong_options():
    assert "--dry-run" in run("--help").stdout
    for wrong in (["--nonsense"], ["--output"]):
        done = run(*wrong)
        assert (done.returncode, done.stdout) == (2, "")
        assert wrong[0] in done.stderr


@pytest.mark.parametrize("fails", ["", "validate"])
def test_a_step_that_fails_stops_no_other(fails, tmp_path):
    """With a GPU, pip, python and infexport that only say that they were there."""
    folder = tmp_path / "venv" / "bin"
    folder.mkdir(parents=True)
    told = tmp_path / "told"
    programs = {
        tmp_path / "nvidia-smi": "echo 'GPU 0: Abacus'",
        folder / "pip": "",
        folder / "python": "case $1 in -c) echo abacus ;; esac",
        folder / "infexport": f'echo "parity of $1"; echo "$*" >>{told}; [ "$1" != "{fails}" ] || exit 1',
    }
    for path, text in programs.items():
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
    out = tmp_path / "out"
    done = run("--output", out, VENV=str(tmp_path / "venv"), PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert done.returncode == (1 if fails else 0), done.stderr
    steps = told.read_text().splitlines()
    assert len(steps) == 1 + 1 + 4 * 5 + 2 * 2 + 2 * 3
    assert f"validate parity {out}/digits-linear --engine abacus-int8" in steps
    judged = sum(step.startswith("validate") for step in steps)
    count = judged if fails else 0
    assert done.stdout.splitlines()[-1] == f"{len(steps) + 1} steps, {count} failed; everything is in {out}"
    summary = (out / "summary.txt").read_text()
    assert summary.count("exit 1") == count
    assert summary.count("parity of validate") == judged  # its log's verdict
    assert len(list(out.glob("*.log"))) == len(steps) + 1
    assert "Abacus" in (out / "machine.txt").read_text()
