"""A `pynvml` of GPUs that are not there."""

from __future__ import annotations

import sys
from types import SimpleNamespace

from infexport.system import gpu_meter


class NVMLError(Exception):
    pass


def install(monkeypatch, fake):
    """Have `infexport.system.gpu_meter` find it, and all of its GPUs."""
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(gpu_meter, "installed", lambda module: module == "pynvml")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


class FakeNvml:
    """Stands in for the module.

    Attributes:
        used: bytes in use, of every GPU.
        millijoules: of the energy counter; None where there is none, as with MIG.
        driver: whether NVML finds one.
        opened: `nvmlInit` less `nvmlShutdown`.
    """

    NVMLError = NVMLError
    UUIDS = ("GPU-aaaa-1", "GPU-bbbb-2", "GPU-bbcc-3")

    def __init__(self):
        self.used, self.millijoules, self.driver, self.opened = 10**9, 0.0, True, 0

    def nvmlInit(self):
        if not self.driver:
            raise NVMLError("Driver Not Loaded")
        self.opened += 1

    def nvmlShutdown(self):
        self.opened -= 1

    def nvmlDeviceGetCount(self):
        return len(self.UUIDS)

    def nvmlDeviceGetHandleByIndex(self, index):
        if index >= len(self.UUIDS):
            raise NVMLError("Invalid Argument")
        return self.UUIDS[index]

    def nvmlDeviceGetHandleByUUID(self, uuid):
        if not uuid.startswith("MIG-"):
            raise NVMLError("Not Found")
        return uuid

    def nvmlDeviceGetUUID(self, handle):
        return handle

    def nvmlDeviceGetName(self, handle):
        return f"Abacus {handle}"

    def nvmlDeviceGetMemoryInfo(self, handle):
        return SimpleNamespace(used=self.used)

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        if self.millijoules is None:
            raise NVMLError("Not Supported")
        return int(self.millijoules)
