"""`infexport doctor`: its findings on this machine, and that it survives broken libraries."""

import dataclasses
import json
import re
import time
from importlib.metadata import PackageNotFoundError, requires

import numpy as np
import onnx
import onnxruntime
import pytest
from packaging.requirements import Requirement as Reference
from packaging.specifiers import SpecifierSet

from infexport import doctor
from infexport.doctor import here
from infexport.doctor.facts import Facts
from infexport.doctor.product import product
from infexport.doctor.trials import Outcome, Started, outcomes
from infexport.errors import InfexportError
from infexport.system import dependencies, host, workers
from infexport.system import gpus as targets
from infexport.system.dependencies import MODULES, installed_version, parse, wanted
from infexport.system.gpus import Gpu

pytestmark = pytest.mark.slow

H100 = Gpu("NVIDIA H100", 81559 * 2**20, "580.65.06", "9.0")


class Tried(dict):
    """Fake trials: without an entry a trial succeeds; see `Facts`."""

    def __init__(self, *gpus, **outcomes):
        super().__init__({tuple(key.split("__")): value for key, value in outcomes.items()})
        self.gpus = Started(lambda: gpus)

    def __missing__(self, trial):
        kind, _ = trial
        forms = dict.fromkeys(("TIFF", "PNG", "JPEG", "WebP", "AVIF"), True)
        return Outcome(
            {
                "offered": ["1.30", "CPUExecutionProvider"],
                "pillow": forms,
                "vips": {"version": "8.18.0", "formats": forms},
                "driver": {"cuda": [13, 0], "count": 1},
            }.get(kind, "it")
        )


def checks_of(trials):
    facts = object.__new__(Facts)
    facts.wanted, facts.trials = wanted(), trials
    return {check.name: check for check in doctor.examine(facts)}


@pytest.fixture
def has(monkeypatch):
    """Make doctor find these versions; None for a missing package."""

    def set_versions(**versions):
        known = {name.replace("_", "-"): version for name, version in versions.items()}
        known = {name: known.get(name, installed_version(name)) for name in {*known, *MODULES, "infexport", "fsspec"}}

        def version(name):
            if known[name] is None:
                raise PackageNotFoundError(name)
            return known[name]

        monkeypatch.setattr(dependencies.importlib.metadata, "version", version)

    return set_versions


def test_this_machine(infexport, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    started = time.monotonic()
    shown = infexport("doctor").stdout
    assert time.monotonic() - started < 60  # under 3 s on an idle machine
    lines = shown.splitlines()
    assert all(len(line) <= 80 for line in lines[:-1] if "$ " not in line)
    assert re.search(r"yes +cpu +ran a graph: onnxruntime 1\.", shown)
    assert "x1b" not in shown
    assert any(line.startswith("  no ") for line in lines), "this machine has all there is"
    for index, line in enumerate(lines):
        if line.startswith(("  no ", "  broken ")):
            below = lines[index + 1 : index + 6]
            assert below[0].startswith(" " * 20), line


def test_a_report_of_a_bug(infexport, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "someone"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("INFEXPORT_TOKEN", "hush")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    text = infexport("doctor", "--json").stdout
    assert "someone" not in text
    assert "hush" not in text
    document = json.loads(text)
    assert {"infexport", "python", "platform", "libc", "environment", "checks", "packages"} == document.keys()
    assert document["environment"]["OMP_NUM_THREADS"] == "1"
    checks = {check["name"]: check for check in document["checks"]}
    for name in ("Python", "infexport", "checkpoints", "cpu", "build: tensorrt-rtx", "Pillow", "libvips", "OpenSlide"):
        assert checks[name]["ok"] is True, checks[name]
    assert all(check["ok"] or check["remedy"] or check["advice"] for check in checks.values())
    packages = {package["name"]: package for package in document["packages"]}
    assert packages["torch"]["accepted"] is True
    assert packages["torch"]["extras"] == ["export"]
    assert packages["onnxruntime-gpu"]["version"] is None


def test_what_is_broken_is_a_line(infexport, monkeypatch, tmp_path):
    planted = {
        "jinja2": "raise RuntimeError('no\\nfoot')",
        "openslide": "raise SystemExit(3)",
        "pynvml": "import os; os.kill(os.getpid(), 11)",
        "safetensors": "import os; os._exit(7)",
        "onnxruntime": "raise ImportError('libnothing.so: cannot open shared object file')",
        "PIL": "class Odd(Exception):\n    def __str__(self): raise ValueError\nraise Odd",
    }
    for name, code in planted.items():
        (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    checks = {check["name"]: check for check in json.loads(infexport("doctor", "--json").stdout)["checks"]}
    for name, words in {
        "reports": "RuntimeError: no\nfoot",
        "OpenSlide": "SystemExit: 3",
        "checkpoints": "exit code 7",
        "cpu": "libnothing.so",
        "Pillow": "Odd",
        "infexport": "Odd",
    }.items():
        assert checks[name]["state"] == "broken", checks[name]
        assert words in checks[name]["found"] + checks[name]["advice"]
        assert checks[name]["remedy"].startswith("pip install --force-reinstall")
    # trials after a crash of the process are run all the same
    for name in ("Triton", "workers", "libvips"):
        assert checks[name]["ok"], checks[name]


def test_a_module_that_hangs(monkeypatch, tmp_path):
    (tmp_path / "sleeper.py").write_text("import time; time.sleep(60)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr("infexport.doctor.trials.LIMIT", 3.0)
    started = time.monotonic()
    found = outcomes([("import", "sleeper"), ("import", "json")])
    assert time.monotonic() - started < 10
    assert "no answer within" in found["import", "sleeper"].error
    assert not found["import", "json"].error


def test_a_module_that_cannot_end(monkeypatch, tmp_path):
    code = "import atexit, threading; atexit.register(threading.Event().wait)"
    (tmp_path / "endless.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    started = time.monotonic()
    assert outcomes([("import", "endless")]) == {("import", "endless"): Outcome("")}
    assert time.monotonic() - started < 10


def test_a_process_that_cannot_be_started(monkeypatch):
    monkeypatch.setattr("infexport.doctor.trials.worker_command", lambda module: ["/no/such/python"])
    found = outcomes([("import", "json")])
    assert found["import", "json"].error


@pytest.mark.parametrize(
    ("script", "state", "words"),
    [
        ("echo 'NVIDIA H100, 81559, 580.65.06, 9.0'", "yes", "NVIDIA H100, 80 GiB, compute capability 9.0, driver 580"),
        ("echo 'NVIDIA GB10, [N/A], 580.95.05, 12.1'", "yes", "shared memory"),
        ("sleep 20 & echo 'NVIDIA H100, 81559, 580.65.06, 9.0'", "yes", "NVIDIA H100"),
        ("echo odd >&2; echo 'NVIDIA H100, 81559, 580.65.06, 9.0'", "yes", "NVIDIA H100"),
        ("sleep 60 & exec sleep 60", "broken", "no answer within 0.5 s"),
        ("head -c 300 /dev/urandom", "broken", "says:"),
        ("echo 'a, b, c'", "broken", "says: a, b, c"),
        ("echo couldn\\'t communicate with the NVIDIA driver >&2; exit 9", "broken", "code 9 and says: couldn't"),
        ("exit 0", "broken", "nothing"),
    ],
)
def test_nvidia_smi(script, state, words, monkeypatch, tmp_path):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(targets.shutil, "which", lambda name: str(program))
    monkeypatch.setattr(targets, "SMI_LIMIT", 0.5 if "exec sleep" in script else 15)
    trials, started = Tried(), time.monotonic()
    trials.gpus = Started(targets.gpus)
    check = checks_of(trials)["GPU"]
    assert check.state == state
    assert words in check.found
    gpu = targets.local_gpu()
    assert (gpu is not None) == (state == "yes")
    assert time.monotonic() - started < 10


def test_nothing_is_installed(has):
    has(**{name.replace("-", "_"): None for name in MODULES})
    gone = Outcome(error="ModuleNotFoundError: it is not there")
    names = ("cpu", "cuda", "tensorrt", "tensorrt-rtx")
    trials = Tried(**{f"provider__{name}": gone for name in names}, driver__=gone, pillow__=gone)
    checks = checks_of(trials)
    remedies = " ".join(check.remedy for check in checks.values())
    for extra in ("export", "cpu", "gpu", "stream", "slides", "tensorrt-rtx", "tensorrt", "scale", "triton", "plot"):
        assert f"'infexport[{extra}]'" in remedies
    assert not any(checks[name].ok for name in (*names, "checkpoints", "libvips", "run engines", "energy", "reports"))
    assert all(check.remedy or check.advice for check in checks.values() if not check.ok)


def test_a_package_that_is_too_old(has):
    has(onnx="1.19.1", numpy="2.0rc1", matplotlib="3.10")
    checks = checks_of(Tried())
    assert checks["checkpoints"].state == "broken"
    assert checks["checkpoints"].remedy == "pip install --upgrade 'onnx>=1.20'"
    assert checks["infexport"].remedy == "pip install --upgrade 'numpy>=2.0'"
    assert checks["reports"].ok


def test_two_runtimes(has):
    has(onnxruntime="1.30", onnxruntime_gpu="1.30")
    check = checks_of(Tried())["cpu"]
    assert check.state == "broken"
    assert check.remedy == "pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'infexport[cpu]'"
    assert "[gpu]" in checks_of(Tried(H100))["cpu"].remedy


def test_the_gpu_runtime_serves_a_cpu(has):
    has(onnxruntime=None, onnxruntime_gpu="1.30.1")
    check = checks_of(Tried())["cpu"]
    assert check.ok
    assert "onnxruntime-gpu 1.30.1" in check.found


def test_a_gpu_that_works_and_one_that_does_not(has):
    has(onnxruntime=None, onnxruntime_gpu="1.30.1", tensorrt="10.13")
    checks = checks_of(Tried(H100))
    for name in ("GPU", "CUDA", "cuda", "tensorrt", "build: tensorrt", "run engines", "energy"):
        assert checks[name].ok, checks[name]
    fell_back = Outcome(error="asked for CUDAExecutionProvider, ONNX Runtime gave CPUExecutionProvider")
    old = Outcome({"cuda": [12, 4], "count": 1})
    crashed = Outcome(error="the process was killed by SIGSEGV, by builder tensorrt")
    checks = checks_of(Tried(H100, provider__cuda=fell_back, driver__=old, builder__tensorrt=crashed))
    assert checks["cuda"].state == "broken"
    assert "gave CPUExecutionProvider" in checks["cuda"].found
    assert checks["CUDA"].state == "broken"
    assert "580" in checks["CUDA"].advice
    assert "SIGSEGV" in checks["build: tensorrt"].advice
    broken = Outcome({"cuda": [13, 0], "error": "cuInit: system not yet initialized (802)"})
    assert "802" in checks_of(Tried(H100, driver__=broken))["CUDA"].found
    hidden = Outcome({"cuda": [13, 0], "count": 0})
    assert checks_of(Tried(H100, driver__=hidden))["CUDA"].remedy == "unset CUDA_VISIBLE_DEVICES"


def test_formats_that_are_missing():
    forms = {"PNG": True, "TIFF": False, "JPEG": True, "WebP": True, "AVIF": False}
    checks = checks_of(Tried(pillow__=Outcome(forms), vips__=Outcome({"version": "8.15.0", "formats": forms})))
    assert checks["Pillow"].state == "no"
    assert "without TIFF, AVIF" in checks["Pillow"].found
    assert "without TIFF" in checks["libvips"].found


def test_folders(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    check = checks_of(Tried())["cache folder"]
    assert check.state == "broken"
    assert "cannot be written to" in check.found
    assert "XDG_CACHE_HOME" in check.remedy

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "made" / "later"))
    usage = here.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(here.shutil, "disk_usage", lambda folder: usage._replace(free=10 * 2**20))
    check = checks_of(Tried())["cache folder"]
    assert check.state == "no"
    assert "0.0 GiB free" in check.found
    assert not (tmp_path / "made").exists()


def test_no_folder_for_what_is_temporary(monkeypatch):
    def nowhere(*arguments, **options):
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(here.tempfile, "gettempdir", nowhere)
    monkeypatch.setattr(workers.tempfile, "TemporaryFile", nowhere)
    check = checks_of(Tried())["temporary folder"]
    assert check.state == "broken"
    assert "TMPDIR" in check.remedy
    assert outcomes([("import", "json")])["import", "json"] == Outcome("")


def test_what_a_control_group_grants(monkeypatch, tmp_path):
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    (tmp_path / "memory.max").write_text(f"{2**29}\n")
    (tmp_path / "memory.current").write_text(f"{2**28}\n")
    (tmp_path / "memory.stat").write_text("inactive_file 0\n")
    monkeypatch.setattr(host, "GROUP", tmp_path)
    checks = checks_of(Tried())
    assert checks["cores"].remedy == "export OMP_NUM_THREADS=1"
    assert checks["memory"].state == "no"
    assert "limit is 0.5 GiB" in checks["memory"].found
    assert "--memory 256MiB" in checks["memory"].remedy


def test_a_check_that_fails_itself(monkeypatch):
    def fails(facts):
        raise ZeroDivisionError("of all things")

    monkeypatch.setitem(doctor.GROUPS, "More", (fails, here.python))
    checks = checks_of(Tried())
    assert checks["fails"].state == "broken"
    assert checks["fails"].advice == "of all things"
    assert checks["Python"] == dataclasses.replace(here.python(None)[0], group="More")


def test_what_is_asked_for_is_the_metadata_s():
    lines = requires("infexport")
    for line in lines:
        ours, theirs = parse(line), Reference(line)
        assert ours.name == theirs.name.lower().replace("_", "-")
        assert {operator + bound for operator, bound in ours.specifiers} == set(map(str, theirs.specifier))
        assert bool(ours.extra) == ("extra" in line)
    assert {one.name for one in wanted()} == MODULES.keys()
    assert not any(one.condition for one in wanted()), "doctor does not judge other markers"


@pytest.mark.parametrize("bound", [">=2.0", ">=1.24", "==1.7.1.116", "~=0.3", "~=1.2.3", "<2", "!=1.24.0", ">1,<=1.24"])
@pytest.mark.parametrize(
    "version", ["0.3", "0.6.1", "1.0", "1.2.3", "1.2.9", "1.3", "1.7.1.116", "1.24", "2", "2.13.0"]
)
def test_versions(bound, version):
    truth = SpecifierSet(bound).contains(version, prereleases=True)
    assert parse(f"some{bound}").accepts(version) == truth
    if not bound.startswith("=="):
        assert parse(f"some{bound}").accepts(version + "+cpu") == truth


def test_requirements_that_are_none():
    for line in ("", "some>=", "some @ https://example.org/some.whl", "some>=1.*"):
        with pytest.raises(ValueError, match="no "):
            parse(line)


def test_the_model_that_providers_run():
    model = onnx.load_from_string(product(4))
    onnx.checker.check_model(model, full_check=True)
    x = np.arange(16, dtype=np.float32).reshape(4, 4)
    (y,) = onnxruntime.InferenceSession(product(4)).run(None, {"x": x})
    assert np.array_equal(y, x @ x)


def test_a_program_that_is_late():
    with pytest.raises(TimeoutError):
        workers.run_program(["sleep", "60"], 0.1)
    assert workers.run_program(["sh", "-c", "echo out; echo err >&2; exit 3"], 10) == (3, "out\n", "err\n")
    with pytest.raises(InfexportError, match=r"no answer within 0\.5 s"):
        workers.ask(["sh", "-c", "sleep 60 & sleep 60"], {}, limit=0.5)
    with pytest.raises(InfexportError, match=r"no answer within 0\.5 s"):
        workers.ask(["sh", "-c", "exec >&-; sleep 60"], {}, limit=0.5)
