"""What stands beside an engine and says what it is."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

from hostile.cases import Case
from hostile.mutate import mutate_json
from hostile.seeds import sealed_again
from infexport.bundle import open_bundle
from infexport.inference.engine_selection import choose
from infexport.system.gpus import Gpu

GPU = Gpu("NVIDIA A100-SXM4-40GB", 40 * 2**30, "580.00", "8.0")


def make(case: Case) -> Callable[[], int | None]:
    chance = case.chance
    bundle = case.seeds.copy_bundle(case.given / "bundle")
    engines = bundle / "engines"
    engines.mkdir()
    engine = chance.randbytes(100)
    for name in ("model-a100-fp16", "model-a100-fp32")[: chance.choice((1, 1, 2))]:
        (engines / f"{name}.engine").write_bytes(engine)
        facts = _facts(case, engine)
        text = mutate_json(chance, facts)
        text = sealed_again(text) if chance.random() < 0.8 else text
        (engines / f"{name}.engine.json").write_bytes(text)
    more = chance.choice(((), ("--json",), ("--sizes", "32")))
    if chance.random() < 0.15:
        image = case.seeds.digits[0]
        return lambda: case.cli("run-engine", bundle, image, "--provider", "engine", "--threads", "1")
    if chance.random() < 0.3:
        return lambda: case.cli("inspect", bundle, *more)

    def act() -> None:
        kind = chance.choice(("whole", "stream"))
        name = chance.choice((None, "a100-fp16"))
        case.reads(lambda: choose(open_bundle(bundle, verify=False), kind, name, gpu=GPU))

    return act


def _facts(case: Case, engine: bytes) -> dict[str, Any]:
    files = case.seeds.manifest["files"]
    return {
        "target": "a100",
        "compute_capability": "8.0",
        "precision": "fp16",
        "calibration": None,
        "chunk": None,
        "backend": "tensorrt-rtx",
        "backend_version": "1.7.1.116",
        "versions": {"infexport": "0.1.0"},
        "gpu": None,
        "caveat": "",
        "checkpoint": case.seeds.manifest["checkpoint"]["files"],
        "graph": {name: files[name] for name in ("model.onnx", "model.onnx.data")},
        "profile": {"image": [[1, 32, 32, 3], [1, 224, 224, 3], [8, 512, 512, 3]]},
        "sha256": hashlib.sha256(engine).hexdigest(),
        "bytes": len(engine),
        "seconds": 2.5,
        "layers": {"fp32": {"fp32": 10}, "fp16": {"fp16": 3}},
        "log": [],
        "digest": "0123456789abcdef" * 4,
    }
