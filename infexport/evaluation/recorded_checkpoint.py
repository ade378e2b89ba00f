"""The checkpoint a bundle was converted from: what a judgement of the bundle, or of its network, starts from."""

from __future__ import annotations

from pathlib import Path

from infexport.bundle import Bundle
from infexport.errors import InfexportError
from infvit.checkpoint import Checkpoint, load_checkpoint
from infvit.errors import CheckpointError


def recorded_checkpoint(bundle: Bundle) -> Path:
    """The checkpoint a bundle was converted from, if it still is what it was.

    Raises:
        InfexportError: it is gone, or it changed.
    """
    path = Path(bundle.manifest.checkpoint.path)
    hint = "name the checkpoint to judge by: --checkpoint CKPT"
    if not path.exists():
        raise InfexportError("the recorded checkpoint is gone", f"expected it at {path}", hint)
    for file in bundle.changed_checkpoint.values():
        raise InfexportError("the recorded checkpoint has changed", f"another content than converted: {file}", hint)
    return path


def load_recorded(path: Path, bundle: Bundle) -> Checkpoint:
    """A checkpoint read with what the bundle's manifest says and no other config: only its weights are judged.

    Raises:
        InfexportError: it cannot be read, or it is another network's.
    """
    config = bundle.manifest.config
    untold = ("variant", "num_heads", "norm_eps", "neumann_terms", "rho_per_head")  # by the tensors' shapes
    told = {name: getattr(config, name) for name in untold} | {"rho": bundle.manifest.rho}
    try:
        checkpoint = load_checkpoint(path, config=told)
    except CheckpointError as error:
        raise InfexportError(error.summary, error.details, error.hint) from error
    theirs, ours = checkpoint.config.to_dict(), config.to_dict()
    differing = [name for name in theirs if theirs[name] != ours[name]]
    if differing:
        raise InfexportError(
            f"the checkpoint is of another network: {path}",
            "\n".join(f"{name}: checkpoint {theirs[name]}, bundle {ours[name]}" for name in differing),
            "name the checkpoint the bundle was converted from, or one of the same shape",
        )
    return checkpoint
