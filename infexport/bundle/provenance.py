"""The state of every file whose hash a bundle records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from infexport.bundle import ENGINES, Bundle

CheckpointState = Literal["unchanged", "changed", "gone", "unreadable"]


@dataclass(frozen=True)
class Checked:
    """A file whose SHA-256 was recorded, None where that cannot be read; `state` is `ok`, `changed` or `missing`."""

    file: str
    sha256: str | None
    state: str


@dataclass(frozen=True)
class Provenance:
    """Comparison of files with their recorded hashes.

    Attributes:
        checkpoint: as a whole; `unreadable` where this user may not read it.
        source: the files of the checkpoint.
        files: of the bundle, then its engines, whose states are those of `Bundle.engines`.
    """

    checkpoint: CheckpointState
    source: list[Checked]
    files: list[Checked]


def check_provenance(bundle: Bundle) -> Provenance:
    """The state of every file that the manifest and the sidecars of engines have recorded."""

    def checked(recorded: Mapping[str, str], changed: Mapping[str, Path]) -> list[Checked]:
        states = {name: "changed" if file.is_file() else "missing" for name, file in changed.items()}
        return [Checked(name, digest, states.get(name, "ok")) for name, digest in recorded.items()]

    record, checkpoint = bundle.manifest.checkpoint, _checkpoint_state(bundle)
    source = [] if checkpoint == "unreadable" else checked(record.files, bundle.changed_checkpoint)
    files = checked(bundle.manifest.files, {name: bundle.path / name for name in bundle.changed})
    for engine in bundle.engines:
        files.append(
            Checked(f"{ENGINES}/{engine.file}", None if engine.record is None else engine.record.sha256, engine.state)
        )
    return Provenance(checkpoint, source, files)


def _checkpoint_state(bundle: Bundle) -> CheckpointState:
    try:
        if not Path(bundle.manifest.checkpoint.path).exists():
            return "gone"
        return "changed" if bundle.changed_checkpoint else "unchanged"
    except OSError:  # the bundle is none the worse for it
        return "unreadable"
