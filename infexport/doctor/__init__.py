"""Check what this machine can run and what is missing; a broken part is a line of the report and does not end it."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from infexport.doctor.check import Check, told
from infexport.doctor.engines import builders, running
from infexport.doctor.extras import export, others
from infexport.doctor.facts import Facts
from infexport.doctor.here import cores, folders, int8, interpreter, itself, memory, python
from infexport.doctor.nvidia import driver, energy, gpu
from infexport.doctor.onnx_runtime import providers, runtime
from infexport.doctor.reading import images, slides, strips
from infexport.system.dependencies import MODULES, installed_version

VARIABLES = {
    *("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "NVIDIA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "MKL_NUM_THREADS"),
    *("XDG_CACHE_HOME", "TMPDIR", "LD_LIBRARY_PATH", "VIPS_CONCURRENCY", "POLYGRAPHY_USE_TENSORRT_RTX"),
}
PREFIXES, SECRETS = ("INFEXPORT_", "ORT_"), ("KEY", "TOKEN", "SECRET", "PASSWORD")

GROUPS: dict[str, tuple[Callable[[Facts], list[Check]], ...]] = {
    "This machine": (python, itself, cores, int8, memory, folders),
    "Convert and judge": (export,),
    "Run bundles: --provider": (runtime, providers),
    "GPU": (gpu, driver, energy),
    "Engines": (builders, running),
    "Read images": (images, strips, slides),
    "More": (others,),
}
"""The checks, in the order in which they are shown."""


def examine(facts: Facts | None = None) -> list[Check]:
    """Every check."""
    facts = facts or Facts()
    found = []
    for group, functions in GROUPS.items():
        for function in functions:
            try:
                checks = function(facts)
            except Exception as error:  # whatever is broken here must not hide the rest
                checks = [Check(function.__name__, "broken", "cannot be told", told(error), "infexport doctor --json")]
            found += [replace(check, group=group) for check in checks]
    return found


def report(facts: Facts | None = None) -> dict[str, Any]:
    """All that a report of a bug should have, and no names of people: JSON."""
    facts = facts or Facts()
    checks = [check.to_dict() for check in examine(facts)]
    document = {
        "infexport": installed_version("infexport"),
        "python": {
            "version": platform.python_version(),
            "implementation": platform.python_implementation(),
            "executable": interpreter(),
        },
        "platform": platform.platform(),
        "libc": " ".join(platform.libc_ver()).strip(),
        "environment": environment(),
        "checks": checks,
        "packages": packages(facts),
    }
    return dict(_without_home(document))


def packages(facts: Facts) -> list[dict[str, Any]]:
    """Every package that is asked for: the version here, whether it will do, and whether it can be imported."""
    found: dict[str, dict[str, Any]] = {}
    for one in facts.wanted:
        version, module = installed_version(one.name), MODULES.get(one.name)
        error = facts.trials["import", module].error if version and module else ""
        known = found.setdefault(one.name, {"name": one.name, "version": version, "wanted": one.text, "extras": []})
        known |= {"accepted": version is not None and one.accepts(version), "error": error}
        known["extras"] += [one.extra] * bool(one.extra)
    return list(found.values())


def environment() -> dict[str, str]:
    """The variables that decide how infexport runs, without what may be secret."""
    found = {}
    for name, value in sorted(os.environ.items()):
        if name in VARIABLES or name.startswith(PREFIXES):
            found[name] = "(not shown)" if any(word in name for word in SECRETS) else value
    return found


def _without_home(value: Any) -> Any:
    """With ~ for the user's folder, whose name is often a person's."""
    if isinstance(value, dict):
        return {key: _without_home(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_home(item) for item in value]
    home = os.environ.get("HOME", "")
    return value.replace(home, "~") if isinstance(value, str) and len(home) > 1 else value
