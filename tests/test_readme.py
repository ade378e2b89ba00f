"""The README tells the truth: its commands and its Python run as they stand there."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language, text=README):
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A place with nothing but the zoo, where the road's commands write."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("models", "scripts"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def test_the_road(infexport, folder, monkeypatch):
    monkeypatch.chdir(folder)
    (road,) = (block for block in blocks("bash") if "convert checkpoint" in block)
    commands = [shlex.split(line, comments=True) for line in road.splitlines()]
    assert len(commands) == 7
    for program, *arguments in commands:
        assert program == "infexport"
        infexport(*arguments)
    assert (folder / "bundle" / "engines" / "a100-fp32.engine").is_file()
    assert len((folder / "digits.csv").read_text().splitlines()) == 21


@pytest.mark.parametrize("document", ["centrality.md", "parity.md", "streaming.md"])
def test_documents(document, infexport, folder, monkeypatch):
    monkeypatch.chdir(folder)
    infexport("convert", "checkpoint", "models/zoo/digits-linear", "--output", "bundle", "--force")
    (commands,) = blocks("bash", (ROOT / "docs" / document).read_text())
    for line in commands.splitlines():
        program, *arguments = shlex.split(line, comments=True)
        if program == "python":
            subprocess.run([sys.executable, *arguments], check=True)
        else:
            infexport(*arguments)


def test_the_python(tmp_path):
    (code,) = blocks("python")
    check = "\nprint([f.name for f in model.functions])"
    done = subprocess.run(
        [sys.executable, "-c", code + check], check=True, capture_output=True, text=True, cwd=tmp_path
    )
    assert "LinearInfSAStateUpdate" in done.stdout


def test_the_two_commands_are_there_and_ci_runs_the_second():
    (two,) = (block for block in blocks("bash") if "./scripts/test" in block)
    for line in two.splitlines():
        (script, *_) = shlex.split(line, comments=True)
        assert (ROOT / script).stat().st_mode & 0o111
    assert "\n./scripts/test\n" in (ROOT / ".ci" / "run").read_text()


def test_links_and_extras_exist():
    for file in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", file.read_text()):
            assert (file.parent / target).exists(), target
    project = (ROOT / "pyproject.toml").read_text()
    for extras in re.findall(r"'\.\[([a-z,-]+)\]'", README):
        for extra in extras.split(","):
            assert f"\n{extra} = [" in project


def test_figures_are_filled_in():
    for file in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        assert "@" not in file.read_text(), file
