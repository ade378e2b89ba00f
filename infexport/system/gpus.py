"""GPUs that engines are built for."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass

from infexport.errors import InfexportError
from infexport.system.workers import run_program

SMI_LIMIT = 20.0
"""Seconds; a driver that nothing keeps awake takes several for each of its GPUs."""


@dataclass(frozen=True)
class Target:
    """A kind of GPU.

    Attributes:
        name: as `--target` has it.
        capability: NVIDIA's compute capability, such as `8.0`.
        memory: bytes of its smallest version; None where it isn't known.
    """

    name: str
    capability: str
    memory: int | None = None


GIB = 2**30
TARGETS = {
    target.name: target
    for target in (
        Target("t4", "7.5", 16 * GIB),
        Target("a100", "8.0", 40 * GIB),
        Target("a30", "8.0", 24 * GIB),
        Target("a10", "8.6", 24 * GIB),
        Target("rtx3090", "8.6", 24 * GIB),
        Target("l4", "8.9", 24 * GIB),
        Target("l40s", "8.9", 48 * GIB),
        Target("rtx4090", "8.9", 24 * GIB),
        Target("h100", "9.0", 80 * GIB),
        Target("h200", "9.0", 141 * 10**9),
        Target("b200", "10.0", 180 * GIB),
        Target("rtx5090", "12.0", 32 * GIB),
    )
}


@dataclass(frozen=True)
class Gpu:
    """An NVIDIA GPU of this machine, as its driver names it; `memory` in bytes, None where it has none of its own."""

    name: str
    memory: int | None
    driver: str
    capability: str

    @property
    def size(self) -> str:
        return "shared memory" if self.memory is None else f"{self.memory / GIB:.0f} GiB"

    def __str__(self) -> str:
        return f"{self.name}, {self.size}, driver {self.driver}, compute capability {self.capability}"


def gpus(*options: str) -> list[Gpu]:
    """All that nvidia-smi, given options, names; none where there is no nvidia-smi.

    Raises:
        InfexportError: it names none, or gives no answer.
    """
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = [program, "--query-gpu=name,memory.total,driver_version,compute_cap", "--format=csv,noheader,nounits"]
    try:
        code, output, messages = run_program([*query, *options], SMI_LIMIT)
    except OSError as error:
        raise InfexportError(f"nvidia-smi: {error.strerror or error}") from error
    rows = [[part.strip() for part in line.split(",")] for line in output.splitlines() if line.strip()]
    # warnings are told among them
    rows = [row for row in rows if len(row) == 4 and re.fullmatch(r"\d+\.\d+", row[3])]
    if code or not rows:
        line = next(filter(None, map(str.strip, (output + messages).splitlines())), "nothing")
        raise InfexportError(f"nvidia-smi ends with code {code} and says: {line[:200]}")
    return [
        Gpu(name, int(memory) * 2**20 if memory.isdecimal() else None, driver, capability)
        for name, memory, driver, capability in rows
    ]


def local_gpu() -> Gpu | None:
    """The GPU that engines run on here: the first that CUDA sees; None where there is no driver, or no answer."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").partition(",")[0].strip()
    try:
        return next(iter(gpus(*([f"--id={visible}"] if visible else []))), None)
    except InfexportError:
        return None


def find_target(name: str) -> Target:
    """A target by name: one of TARGETS, `sm_80` and the like, or `local`, this machine's GPU.

    Raises:
        InfexportError: no such target, or no GPU here.
    """
    if name in TARGETS:
        return TARGETS[name]
    if name == "local":
        gpu = local_gpu()
        if gpu is None:
            raise InfexportError(
                "there is no NVIDIA GPU here to build for",
                "--target local is this machine's GPU, and nvidia-smi names none",
                f"name the GPU: --target {' | '.join(TARGETS)}, or its compute capability, such as sm_80",
            )
        return Target(re.sub(r"[^a-z0-9]+", "-", gpu.name.lower()).strip("-"), gpu.capability, gpu.memory)
    found = re.fullmatch(r"sm_?(\d+)(\d)", name)
    if found is None:
        raise InfexportError(
            f"no such target: {name}",
            f"expected {', '.join(TARGETS)}, local, or a compute capability, such as sm_80",
            "nvidia-smi --query-gpu=compute_cap --format=csv tells what a machine has",
        )
    return Target(f"sm_{found[1]}{found[2]}", f"{found[1]}.{found[2]}")
