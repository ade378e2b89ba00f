"""`--config`: a JSON file that a person wrote."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

from hostile.cases import Case
from hostile.doors.folder import PROCESSOR, TIMM
from hostile.doors.reading import golden, read
from hostile.mutate import INTERESTING, mutate_json

MORE: dict[str, Any] = {
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
    "resize_mode": "exact",
    "resize_size": 32,
    "crop_size": 32,
    "interpolation": "bicubic",
    "norm_eps": 1e-5,
    "neumann_terms": 1,
    "rho": 0.9,
    "hidden_act": "gelu",
    "layout": "auto",
    "labels": ["zero", "one"],
    "id2label": {"0": "zero", "1": "one"},
}


def make(case: Case) -> Callable[[], int | None]:
    chance = case.chance
    data, config, _ = golden(case)
    weights, file = case.given / "model.safetensors", case.given / "config.json"
    weights.write_bytes(data)
    more = {name: MORE[name] for name in chance.sample(sorted(MORE), chance.randrange(5))}
    value = config | more | chance.choice(({}, {}, PROCESSOR, TIMM))
    kind = chance.randrange(20)
    if kind == 0:
        os.mkfifo(file)
    elif kind == 1:
        file.symlink_to(chance.choice(("/dev/zero", "config.json", ".", "/proc/self/environ")))
    elif kind < 5:
        value[chance.choice(sorted(value))] = chance.choice(INTERESTING)
        file.write_text(json.dumps(value))
    else:
        file.write_bytes(mutate_json(chance, value))
    return lambda: read(case, weights, config_file=file)
