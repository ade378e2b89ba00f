"""The meter of a GPU: what it reads, of which GPU, and what it says where there is nothing to read."""

import time

import pytest
from fake_nvml import FakeNvml, NVMLError, install

from infexport.system import gpu_meter
from infexport.system.gpu_meter import Meter, find_device


@pytest.fixture
def fake(monkeypatch):
    fake = FakeNvml()
    install(monkeypatch, fake)
    return fake


def test_the_peak_is_what_was_in_use_at_most_less_what_was_before(fake):
    with Meter() as meter:
        fake.used = 5 * 10**9
        deadline = time.monotonic() + 10
        while meter._peak < fake.used and time.monotonic() < deadline:
            time.sleep(0.001)
        fake.used = 2 * 10**9
        assert meter.peak_memory() == 4 * 10**9
        fake.used = 9 * 10**9
        time.sleep(5 * Meter.EVERY)
        assert meter._peak == 5 * 10**9  # no more samples: what comes now is timed
    assert meter.missing == []
    assert meter.gpu == "Abacus GPU-aaaa-1"
    assert fake.opened == 0


def test_a_peak_is_never_less_than_nothing(fake):
    with Meter() as meter:
        fake.used = 0
        assert meter.peak_memory() == 0


def test_energy_in_joules(fake):
    with Meter() as meter:
        fake.millijoules = 1500
        before = meter.joules()
        fake.millijoules = 4000
        assert meter.joules() - before == 2.5


def test_no_counter(fake):
    fake.millijoules = None
    with Meter() as meter:
        assert meter.joules() is None
        assert meter.joules() is None
        assert meter.peak_memory() == 0
    assert meter.missing == ["energy: NVML: Not Supported"]


@pytest.mark.parametrize(
    ("driver", "package", "visible", "reason"),
    [
        (True, False, "0", "pip install nvidia-ml-py"),
        (False, True, "0", "NVML: Driver Not Loaded"),
        (True, True, "7", "NVML: Invalid Argument"),
        (True, True, "", "NVML: Not Found"),
    ],
)
def test_no_nvml(driver, package, visible, reason, fake, monkeypatch):
    fake.driver = driver
    monkeypatch.setattr(gpu_meter, "installed", lambda module: package)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with Meter() as meter:
        assert (meter.gpu, meter.joules(), meter.peak_memory()) == (None, None, None)
    assert len(meter.missing) == 1
    assert meter.missing[0].startswith("energy and GPU memory: ")
    assert meter.missing[0].endswith(reason)
    assert fake.opened == 0


@pytest.mark.parametrize(
    ("visible", "found"),
    [
        (None, "GPU-aaaa-1"),
        ("2,0", "GPU-bbcc-3"),
        (" 1 ", "GPU-bbbb-2"),
        ("GPU-bbbb-2", "GPU-bbbb-2"),
        ("GPU-bbc,GPU-aaaa-1", "GPU-bbcc-3"),
        ("MIG-1234", "MIG-1234"),
    ],
)
def test_the_gpu_is_the_one_that_cuda_takes(visible, found):
    assert find_device(FakeNvml(), visible) == found


@pytest.mark.parametrize("visible", ["", "-1", "GPU-dddd"])
def test_a_gpu_that_is_not_there(visible):
    with pytest.raises(NVMLError):
        find_device(FakeNvml(), visible)


def test_the_package_is_what_the_fake_stands_in_for():
    pynvml = pytest.importorskip("pynvml")
    assert all(hasattr(pynvml, name) for name in dir(FakeNvml) if name.startswith("nvml"))
    assert issubclass(pynvml.NVMLError, Exception)
