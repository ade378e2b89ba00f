"""Checks of this machine: Python, infexport itself, processor, memory, folders."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from infexport.doctor.check import Check, told
from infexport.doctor.facts import Facts, versions
from infexport.system import host
from infexport.system.dependencies import installed_version, parse
from infexport.system.gpus import GIB

NEEDED = GIB
"""Bytes that a folder, or the memory, should have; a 53.5M model's bundle takes 250 MB."""


def python(facts: Facts) -> list[Check]:
    from importlib.metadata import PackageNotFoundError, metadata

    found = f"{platform.python_version()}, {interpreter()}, {platform.system()} {platform.machine()}"
    try:
        bound = parse(f"python{metadata('infexport')['Requires-Python'] or ''}")
    except (PackageNotFoundError, ValueError):
        bound = parse("python")
    if bound.accepts(platform.python_version()):
        return [Check("Python", "yes", found)]
    return [Check("Python", "broken", found, f"expected {bound.text}", "python3.13 -m venv .venv")]


def interpreter() -> str:
    """Return a check of this Python; its path is left out, since reports are public."""
    if sys.prefix != sys.base_prefix:
        kind = "a virtual environment"
    elif Path(sys.prefix, "conda-meta").is_dir():
        kind = "a conda environment"
    else:
        kind = "the system's own" if sys.prefix == "/usr" else "an installation of its own"
    return f"{platform.python_implementation()}, {kind}"


def itself(facts: Facts) -> list[Check]:
    name = "infexport"
    found = f"{installed_version('infexport') or 'of unknown version'}, {versions(facts.of(''))}"
    return [facts.lacks(name, "") or Check(name, "yes", found)]


def cores(facts: Facts) -> list[Check]:
    usable, there, quota = host.usable_cores(), os.cpu_count() or 1, host.core_quota()
    found = f"{usable} of {there} usable, {host.cpu_model()}"
    if quota is None or quota >= usable:
        return [Check("cores", "yes", found)]
    threads = max(1, int(quota))
    advice = f"more threads than the control group's {quota:g} cores wait for each other: run with --threads {threads}"
    return [Check("cores", "no", f"{found}; {quota:g} granted", advice, f"export OMP_NUM_THREADS={threads}")]


def int8(facts: Facts) -> list[Check]:
    if host.has_int8_products():
        return [Check("int8", "yes", "dot products of 8 bits (VNNI or alike)")]
    found = "no dot products of 8 bits (VNNI): int8 is right here, but slow"
    advice = "use a processor that has them, or a bundle in fp32"
    return [Check("int8", "no", found, advice, "infexport convert checkpoint CHECKPOINT --precision fp32")]


def memory(facts: Facts) -> list[Check]:
    free, limit = host.available_memory(), host.memory_limit()
    found = f"{free / GIB:.1f} GiB of {host.physical_memory() / GIB:.1f} GiB available"
    if limit is not None:
        found += f", the control group's limit is {limit / GIB:.1f} GiB"
    if free >= NEEDED:
        return [Check("memory", "yes", found)]
    advice = "a 53.5M model alone has 214 MB of weights; end other programs, or stream images in what there is"
    remedy = f"infexport run-engine BUNDLE IMAGE --memory {max(256, free * 3 // 4 // 2**20)}MiB"
    return [Check("memory", "no", found, advice, remedy)]


def folders(facts: Facts) -> list[Check]:
    checks = [_folder("cache", host.cache_folder, "export XDG_CACHE_HOME=FOLDER")]
    checks += [_folder("temporary", lambda: Path(tempfile.gettempdir()), "export TMPDIR=FOLDER")]
    return [*checks, _folder("here", Path.cwd, "cd FOLDER")]


def _folder(name: str, where: Callable[[], Path], remedy: str) -> Check:
    """Return a check of a folder, or of its parent: it can be written to and has room."""
    name = f"{name} folder" if name != "here" else "this folder"
    advice = (
        "name a folder that can be written to and has 1 GiB: a 53.5M model's bundle takes 250 MB, an engine as much"
    )
    try:
        folder = where()
        existing = next(one for one in (folder, *folder.parents) if one.is_dir())
        free = shutil.disk_usage(existing).free
    except (OSError, StopIteration, RuntimeError) as error:  # RuntimeError: no home
        return Check(name, "broken", told(error), advice, remedy)
    found = f"{free / GIB:.1f} GiB free in {folder}"
    try:
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(bytes(4096))
            file.flush()
    except OSError as error:
        return Check(name, "broken", f"{found}; cannot be written to: {error.strerror or error}", advice, remedy)
    return Check(name, "yes", found) if free >= NEEDED else Check(name, "no", found, advice, remedy)
