"""The machine that this runs on: its processor, its memory, its folders."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

CPUINFO, GROUP = Path("/proc/cpuinfo"), Path("/sys/fs/cgroup")


def cpu_model() -> str:
    """The processor's name, or the architecture's where the system does not tell."""
    try:
        for line in CPUINFO.read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def has_int8_products() -> bool:
    """Tell whether the processor multiplies 8-bit numbers into 32-bit sums; assumed where Linux does not say."""
    try:
        words = set(CPUINFO.read_text().split())
    except OSError:
        return True
    return "flags" not in words or bool(words & {"avx512_vnni", "avx_vnni", "amx_int8"})


def core_quota() -> float | None:
    """Cores' worth of time that the control group grants, None where it sets no limit."""
    try:
        quota, period = (GROUP / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None


def memory_limit() -> int | None:
    """Bytes that the control group may have, None where it sets no limit."""
    try:
        limit = (GROUP / "memory.max").read_text().strip()
        return None if limit == "max" else int(limit)
    except (OSError, ValueError):
        return None


def threads_alive() -> int | None:
    """Threads of this process, None where the system does not tell."""
    tasks = Path("/proc/self/task")
    return len(list(tasks.iterdir())) if tasks.is_dir() else None


def peak_memory() -> int:
    """The most memory this process has had resident so far, in bytes."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource  # not everywhere

    # on Linux a child starts from its parent's value, even after exec; hence the file
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def physical_memory() -> int:
    """Bytes of the machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def available_memory() -> int:
    """Bytes that this process can have without swapping, as the system and its control group say."""
    found = [physical_memory()]
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) * 1024)
    except OSError:
        pass
    limit = memory_limit()
    try:
        if limit is not None:
            # files that are merely cached make room
            cached = next(
                int(line.split()[1])
                for line in (GROUP / "memory.stat").read_text().splitlines()
                if line.startswith("inactive_file ")
            )
            found.append(limit - int((GROUP / "memory.current").read_text()) + cached)
    except (OSError, ValueError, StopIteration):
        pass
    return max(0, min(found))


def cache_folder() -> Path:
    """Return infexport's folder in the user's cache, for files that can be made again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "infexport"
