"""A checkpoint as far as a conversion goes before its ten seconds of exporting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from hostile.cases import Case
from infexport.conversion.convert import ConvertOptions, read_checkpoint
from infexport.conversion.image_model import ImageModel
from infvit.checkpoint import build_network
from infvit.fold import fold

LARGE = 10**7
"""Parameters; what somebody really has is not run here."""


def read(case: Case, path: Path, **options: Any) -> int:
    """Read, build, fold and run it. 0, or 1 where it is refused later, by an answer that is not finite."""
    checkpoint = case.reads(lambda: read_checkpoint(path, ConvertOptions(**options)))
    network = build_network(checkpoint)
    if sum(weights.numel() for weights in network.parameters()) > LARGE:
        return 0
    patch = network.config.patch_size
    if patch > 64:
        return 0
    folded = ImageModel(fold(network), (0.5,) * 3, (0.5,) * 3, "uint8", True).eval()
    with torch.inference_mode():
        logits, _ = folded(torch.full((1, 2 * patch, 3 * patch, 3), 100, dtype=torch.uint8))
    return 0 if bool(torch.isfinite(logits).all()) else 1


def golden(case: Case) -> tuple[bytes, dict[str, Any], Path]:
    """The bytes of a golden checkpoint, its config, and the config as a file."""
    name = case.chance.choice(case.seeds.checkpoints)
    data, config = case.seeds.checkpoint(name)
    return data, config, case.seeds.once(f"config {name}", lambda: _written(case, name, config))


def _written(case: Case, name: str, config: dict[str, Any]) -> Path:
    import json

    file = case.seeds.folder / f"{name}.json"
    file.write_text(json.dumps(config))
    return file
