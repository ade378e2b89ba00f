"""Which library builds for which GPU, and why."""

import sys

import pytest

from infexport.errors import InfexportError
from infexport.inference import tensorrt_libraries
from infexport.system import gpus
from infexport.system.gpus import Gpu, find_target, local_gpu

A100 = Gpu("NVIDIA A100-SXM4-80GB", 80 << 30, "580.1", "8.0")
H200 = Gpu("NVIDIA H200", 141 * 10**9, "580.1", "9.0")


@pytest.fixture
def everything(monkeypatch):
    monkeypatch.setattr(tensorrt_libraries, "installed", lambda module: True)


@pytest.mark.parametrize(
    ("target", "gpu", "chosen", "words"),
    [
        ("a100", A100, "tensorrt", "it has the GPU at hand"),
        ("a100", None, "tensorrt-rtx", "no NVIDIA GPU here"),
        ("a100", H200, "tensorrt-rtx", "compute capability 9.0, not 8.0"),
        ("h200", H200, "tensorrt", "it has the GPU at hand"),
    ],
)
def test_auto_takes_the_gpu_s_own(target, gpu, chosen, words, everything):
    backend, why = tensorrt_libraries.choose("auto", find_target(target), gpu)
    assert backend.name == chosen
    assert words in why


def test_none_can(everything):
    with pytest.raises(InfexportError) as refused:
        tensorrt_libraries.choose("auto", find_target("h100"), A100)
    assert "tensorrt: it builds for the GPU it runs on" in refused.value.details
    assert "tensorrt-rtx: it builds for compute capabilities" in refused.value.details


@pytest.mark.parametrize(
    ("name", "capability"), [("a100", "8.0"), ("sm_80", "8.0"), ("sm90", "9.0"), ("sm_120", "12.0")]
)
def test_targets_by_name_and_capability(name, capability):
    assert find_target(name).capability == capability


@pytest.mark.parametrize("name", ["", "sm_", "sm_8", "sm_8x", "A100!", "../a100"])
def test_no_such_target(name):
    with pytest.raises(InfexportError, match="no such target"):
        find_target(name)


def smi(monkeypatch, stdout, code=0):
    monkeypatch.setattr(gpus.shutil, "which", lambda program: "nvidia-smi")
    monkeypatch.setattr(gpus, "run_program", lambda command, limit: (code, stdout, ""))


def test_the_local_gpu(monkeypatch):
    smi(monkeypatch, "NVIDIA A100-SXM4-80GB, 81920, 580.1, 8.0\nanother, 1, 1, 9.0\n")
    assert local_gpu() == A100
    target = find_target("local")
    assert (target.name, target.capability, target.memory) == ("nvidia-a100-sxm4-80gb", "8.0", 80 << 30)


def test_the_gpu_that_cuda_sees(monkeypatch):
    asked = []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-1234,0")
    monkeypatch.setattr(gpus.shutil, "which", lambda program: "nvidia-smi")

    def run_program(command, limit):
        asked.append(command)
        return 0, "NVIDIA GB10, [N/A], 580.1, 12.1\n", ""

    monkeypatch.setattr(gpus, "run_program", run_program)
    gpu = local_gpu()
    assert "--id=GPU-1234" in asked[0]
    assert (gpu.memory, gpu.capability) == (None, "12.1")
    assert "shared memory" in str(gpu)


def test_libraries_that_pip_brought_are_found(monkeypatch, tmp_path):
    monkeypatch.setenv("LD_LIBRARY_PATH", "/known")
    for _ in range(2):
        tensorrt_libraries._find_libraries([tmp_path])
        assert tensorrt_libraries.os.environ["LD_LIBRARY_PATH"] == f"{tmp_path}:/known"


@pytest.mark.parametrize(("stdout", "code"), [("", 0), ("No devices were found\n", 6), ("a, b, c, d\n", 0)])
def test_a_driver_that_has_no_gpu(monkeypatch, stdout, code):
    smi(monkeypatch, stdout, code)
    assert local_gpu() is None


def test_an_old_tensorrt(monkeypatch, tmp_path):
    (tmp_path / "tensorrt.py").write_text("__version__ = '8.6.1'")
    monkeypatch.syspath_prepend(tmp_path)
    try:
        with pytest.raises(InfexportError, match=r"TensorRT 8.6.1 is too old"):
            tensorrt_libraries.BACKENDS["tensorrt"].load()
    finally:
        sys.modules.pop("tensorrt", None)  # for other tests it is not installed
