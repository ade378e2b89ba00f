"""Environment of a comparison: the machine, the versions, and the hashes of all files."""

from __future__ import annotations

import importlib.metadata
import platform
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from infexport.bundle import Bundle
from infexport.bundle.integrity import sha256
from infexport.bundle.provenance import Checked, check_provenance
from infexport.evaluation.parity.result import ParityResult
from infexport.system.gpus import local_gpu
from infexport.system.host import cpu_model, usable_cores

PACKAGES = ("infexport", "torch", "onnxruntime", "onnxruntime-gpu", "numpy", "pillow", "matplotlib")
WEIGHTS = {".safetensors", ".bin", ".pt", ".pth"}


@dataclass(frozen=True)
class Facts:
    """Facts of the machine and the files, as the page shows them.

    Attributes:
        environment: by name.
        files: the checkpoint's, then the bundle's; `state` is `ok`, `changed`, `missing`, an engine's state, or
            `not recorded` of a checkpoint that is not the bundle's own.
        now: SHA-256 of those that were changed, as they are.
    """

    environment: list[tuple[str, str]]
    files: list[Checked]
    now: dict[str, str]


def collect_facts(report: ParityResult, bundle: Bundle) -> Facts:
    """Collect the facts of this process, this machine and the files as they are."""
    found = check_provenance(bundle)
    source = [Checked(f"{each.file} (checkpoint)", each.sha256, each.state) for each in found.source]
    if report.checkpoint.absolute() != Path(bundle.manifest.checkpoint.path):
        source = [Checked(f"{file} (checkpoint)", sha256(file), "not recorded") for file in _weights(report.checkpoint)]
    now = {name: sha256(bundle.path / name) for name in bundle.changed if (bundle.path / name).is_file()}
    return Facts(_environment(), [*source, *found.files], now)


def _weights(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    return sorted(file for file in path.iterdir() if file.suffix in WEIGHTS)


def _environment() -> list[tuple[str, str]]:
    versions = []
    for name in PACKAGES:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    cores, gpu = usable_cores(), local_gpu()
    return [
        ("date", f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"),
        ("versions", ", ".join([f"Python {platform.python_version()}", *versions])),
        ("system", platform.platform()),
        ("processor", f"{cpu_model()}, {cores} core{'' if cores == 1 else 's'}"),
        *([("GPU", str(gpu))] if gpu is not None else []),
        ("folder", str(Path.cwd())),
    ]
