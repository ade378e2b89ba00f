"""Commands and Python code of the README run as written."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language, text=README):
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Folder with nothing but the zoo, in which commands run and write."""
    for name in ("models", "scripts"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_road(infexport, folder):
    (road,) = (block for block in blocks("bash") if "convert checkpoint" in block)
    commands = [shlex.split(line, comments=True) for line in road.splitlines()]
    assert len(commands) == 7
    for program, *arguments in commands:
        assert program == "infexport"
        infexport(*arguments)
    assert (folder / "bundle" / "engines" / "a100-fp32.engine").is_file()
    assert len((folder / "digits.csv").read_text().splitlines()) == 21


@pytest.mark.parametrize(
    "document",
    [
        "centrality.md",
        "hardening.md",
        "parity.md",
        "serving.md",
        "streaming.md",
        pytest.param("scale.md", marks=pytest.mark.ray),
    ],
)
def test_documents(document, infexport, zoo_bundle, folder):
    shutil.copytree(zoo_bundle("digits-linear"), folder / "bundle")  # as the README's commands make it
    (commands,) = blocks("bash", (ROOT / "docs" / document).read_text())
    for line in commands.splitlines():
        program, *arguments = shlex.split(line, comments=True)
        if program == "python":
            subprocess.run([sys.executable, *arguments], check=True)
        else:
            infexport(*arguments)


def test_the_predictor(zoo_bundle, tmp_path, monkeypatch):
    (tmp_path / "bundle").symlink_to(zoo_bundle("digits-linear"))
    (tmp_path / "models").symlink_to(ROOT / "models")
    monkeypatch.chdir(tmp_path)
    code, _ = blocks("python")
    assert len(code.splitlines()) == 5
    found = {}
    exec(code, found)
    assert found["found"]["label"].tolist() == ["7", ""]
    assert found["found"]["error"].tolist() == ["", "cannot open image: missing.png"]


def test_the_export(tmp_path):
    _, code = blocks("python")
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
