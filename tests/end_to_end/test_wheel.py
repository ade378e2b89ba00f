"""The built wheel, alone in an environment, runs a bundle without torch."""

import json
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

import infexport

ROOT = Path(__file__).parents[2]


def build(source, output, *kinds):
    command = [sys.executable, "-m", "build", *kinds, "--no-isolation", "--outdir", output, source]
    subprocess.run(command, check=True, capture_output=True)


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """Build the sdist, and the wheel from the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    build(ROOT, folder)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


def test_metadata_is_complete(distributions):
    subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *distributions], check=True)
    with zipfile.ZipFile(distributions[1]) as archive:
        names = set(archive.namelist())
        (metadata,) = (archive.read(name).decode() for name in names if name.endswith("/METADATA"))
    assert {f"{package}/py.typed" for package in ("infexport", "infvit", "infsa_ops")} <= names
    assert "infexport-0.1.0.dist-info/licenses/LICENSE" in names
    for line in ("License-Expression: Apache-2.0", "Author: infexport contributors", "Classifier: Typing :: Typed"):
        assert f"\n{line}\n" in metadata


def test_the_sdist_builds_the_same_wheel(distributions, tmp_path):
    build(ROOT, tmp_path, "--wheel")
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.read_bytes() == distributions[1].read_bytes()


def test_the_citation_names_this_version_and_the_paper():
    text = (ROOT / "CITATION.cff").read_text()
    assert f"version: {infexport.__version__}\n" in text
    assert "arXiv:2603.00175" in text


def test_the_wheel_runs_a_bundle_without_torch(distributions, golden_bundle, golden_images, tmp_path):
    _, wheel = distributions
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", f"{wheel}[cpu]"], check=True)
    packages = json.loads(subprocess.check_output([python, "-m", "pip", "list", "--format", "json"]))
    names = {package["name"] for package in packages}
    assert "onnxruntime" in names
    assert not names & {"torch", "onnx", "onnxscript"}

    folder, _ = golden_images("reference_linear")
    command = [
        tmp_path / "venv" / "bin" / "infexport",
        "run-engine",
        golden_bundle("reference_linear"),
        folder,
        "--json",
    ]
    ran = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path)
    assert len(json.loads(ran.stdout)["images"]) == 3
    # it contains all three source roots
    code = "import importlib.util as u; print([bool(u.find_spec(n)) for n in ('infexport', 'infsa_ops', 'infvit')])"
    assert subprocess.check_output([python, "-c", code], text=True, cwd=tmp_path) == "[True, True, True]\n"
