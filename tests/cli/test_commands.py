"""Every command as a person meets it: help, documentation, `inspect`, the way it starts."""

import json
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

from infexport import __version__
from infexport.cli import cli

README = Path(__file__).parent.parent.parent / "README.md"


def commands(group=cli, path=()):
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


@pytest.mark.parametrize("path", [" ".join(path) for path, _ in commands()])
def test_every_command_is_documented(path, infexport):
    assert f"infexport {path}" in README.read_text()
    help_text = infexport(*path.split(), "--help").stdout
    for parameter in re.findall(r"^  (--[a-z-]+)", help_text, re.MULTILINE):
        assert re.search(rf"{parameter}.*\S", help_text)


def groups(group=cli, path=()):
    yield " ".join(path), group
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from groups(command, (*path, name))


@pytest.mark.parametrize("path", [path for path, _ in groups()])
def test_short_help_fits_its_line(path, infexport, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    listed = infexport(*path.split(), "--help").stdout.partition("Commands:\n")[2].splitlines()
    assert listed
    for line in listed:
        assert len(line) <= 80
        assert re.fullmatch(r"  [a-z-]+  +[A-Z].*\w\.", line), line  # a cut help ends in "..."


def test_options_have_help():
    for path, command in commands():
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.help, f"{' '.join(path)} {parameter.name}"


def test_help_imports_nothing_heavy():
    code = "import sys; sys.argv = ['infexport', '--help']; from infexport.__main__ import main\n"
    code += "try: main()\nexcept SystemExit: pass\n"
    code += "print([m for m in ('torch', 'numpy', 'onnx', 'onnxruntime', 'PIL') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_running_a_bundle_imports_no_torch(golden_bundle, golden_images):
    folder, _ = golden_images("reference_linear")
    arguments = ["infexport", "run-engine", str(golden_bundle("reference_linear")), str(folder)]
    code = f"import sys; sys.argv = {arguments!r}; from infexport.__main__ import main\n"
    code += "try: main()\nexcept SystemExit as end: assert not end.code\n"
    code += "print([m for m in ('torch', 'onnx', 'onnxscript', 'infvit.network', 'infsa_ops') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_both_ways_to_start():
    for command in ([f"{sys.prefix}/bin/infexport"], [sys.executable, "-m", "infexport"]):
        done = subprocess.run([*command, "--version"], check=True, capture_output=True, text=True)
        assert done.stdout == f"infexport, version {__version__}\n"


def test_inspect_shows_what_a_bundle_holds(infexport, golden_bundle):
    bundle = golden_bundle("transformers_pure")
    shown = infexport("inspect", bundle).stdout
    for words in ("pure_infsa", "4 heads", "layout transformers", "mean [0.485", "torch 2.", "model.onnx.data"):
        assert words in shown
    facts = json.loads(infexport("inspect", bundle, "--json").stdout)
    assert facts["verified"] is True
    assert facts["config"]["variant"] == "pure_infsa"
    assert facts["neumann"] == {"terms": 1}
    assert len(facts["files"]["model.onnx"]) == 64


def test_a_missing_extra_is_named(infexport, monkeypatch, tmp_path):
    from infexport.system import dependencies

    monkeypatch.setattr(dependencies, "installed", lambda module: module != "torch")
    result = infexport("convert", "checkpoint", "model.pth", "-o", tmp_path / "b", exit_code=2)
    assert "this needs torch" in result.stderr
    assert "pip install 'infexport[export]'" in result.stderr
