"""The built wheel, in an environment with nothing else: it runs a bundle without torch."""

import json
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_wheel_runs_a_bundle_without_torch(golden_bundle, golden_images, tmp_path):
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, ROOT]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("infexport-*.whl")
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
    # all three source roots are in it
    code = "import importlib.util as u; print([bool(u.find_spec(n)) for n in ('infexport', 'infsa_ops', 'infvit')])"
    assert subprocess.check_output([python, "-c", code], text=True, cwd=tmp_path) == "[True, True, True]\n"
