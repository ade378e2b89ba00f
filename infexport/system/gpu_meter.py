"""Energy and memory of a GPU, read through NVIDIA's management library; where it gives none, the reason."""

from __future__ import annotations

import importlib
import os
import threading
from collections.abc import Callable
from types import ModuleType, TracebackType
from typing import Any, Self, TypeVar

from infexport.system.dependencies import installed

T = TypeVar("T")


class Meter:
    """Measures the GPU that this process uses; enter it before anything is loaded there.

    That is the first of CUDA_VISIBLE_DEVICES, an index or a UUID, else the first of all. Indices are NVML's, in the
    order of the bus; between GPUs of several kinds CUDA's own differ, unless CUDA_DEVICE_ORDER is PCI_BUS_ID. What
    other processes do on the GPU is measured, too: in a container the driver does not tell them apart.

    Attributes:
        gpu: its name, once entered; None where there is no NVML.
        missing: what could not be measured, and why.
    """

    EVERY = 0.01
    """Seconds between two samples of memory."""

    def __init__(self) -> None:
        self.gpu: str | None = None
        self.missing: list[str] = []
        self._nvml: ModuleType | None = None
        self._handle: Any = None
        self._before: int | None = None
        self._peak = 0
        self._enough = threading.Event()
        self._sampler = threading.Thread(target=self._sample_on, daemon=True)

    def __enter__(self) -> Self:
        if not installed("pynvml"):
            self.missing.append("energy and GPU memory: pip install nvidia-ml-py")
            return self
        nvml = importlib.import_module("pynvml")
        try:
            nvml.nvmlInit()
        except nvml.NVMLError as error:
            self.missing.append(f"energy and GPU memory: NVML: {error}")
            return self
        self._nvml = nvml
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        self._handle = self._read("energy and GPU memory", lambda: find_device(nvml, visible))
        if self._handle is not None:
            self.gpu = self._read("the GPU's name", lambda: str(nvml.nvmlDeviceGetName(self._handle)))
            self._before = self._used()
        if self._before is not None:
            self._sampler.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._rest()
        if self._nvml is not None:
            self._nvml.nvmlShutdown()
            self._nvml = self._handle = None

    def joules(self) -> float | None:
        """Energy of the GPU since its driver was loaded; None where it does not count.

        The counter moves every 20 to 100 ms: between two readings there should be a second.
        """
        nvml = self._nvml
        if nvml is None or self._handle is None:
            return None
        found = self._read("energy", lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle))
        return None if found is None else found / 1e3

    def peak_memory(self) -> int | None:
        """Bytes in use at most since this was entered, less what was in use then: a CUDA context counts.

        Sampling ends here: it must not disturb what is timed next.
        """
        self._rest()
        if self._before is None:
            return None
        self._sample()
        return max(0, self._peak - self._before)

    def _used(self) -> int | None:
        nvml = self._nvml
        assert nvml is not None
        return self._read("GPU memory", lambda: int(nvml.nvmlDeviceGetMemoryInfo(self._handle).used))

    def _sample(self) -> None:
        self._peak = max(self._peak, self._used() or 0)

    def _sample_on(self) -> None:
        while not self._enough.wait(self.EVERY):
            self._sample()

    def _rest(self) -> None:
        self._enough.set()
        if self._sampler.is_alive():
            self._sampler.join()

    def _read(self, what: str, read: Callable[[], T]) -> T | None:
        """Return a reading of NVML; None where it fails, and the first reason is kept."""
        assert self._nvml is not None
        try:
            return read()
        except self._nvml.NVMLError as error:
            reason = f"{what}: NVML: {error}"
            if reason not in self.missing:
                self.missing.append(reason)
            return None


def find_device(nvml: ModuleType, visible: str | None) -> Any:
    """NVML's handle of the GPU that CUDA takes.

    Args:
        nvml: `pynvml`, initialised.
        visible: CUDA_VISIBLE_DEVICES; None where it is not set.

    Raises:
        NVMLError: there is no such GPU.
    """
    first = "0" if visible is None else visible.partition(",")[0].strip()
    if first.isdecimal():
        return nvml.nvmlDeviceGetHandleByIndex(int(first))
    if first.startswith("GPU-"):  # CUDA takes the beginning of a UUID, too
        for index in range(nvml.nvmlDeviceGetCount()):
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            if nvml.nvmlDeviceGetUUID(handle).startswith(first):
                return handle
    return nvml.nvmlDeviceGetHandleByUUID(first)  # an instance of MIG; anything else is an error of NVML
