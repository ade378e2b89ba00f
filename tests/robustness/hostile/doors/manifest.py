"""infexport.json, mutated: beside files whose hashes are those it has, or not."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

from hostile.cases import Case
from hostile.mutate import CONTROLS, INTERESTING, TEXTS, mutate_json
from hostile.seeds import sealed_again, write_manifest


def make(case: Case) -> Callable[[], int | None]:
    chance = case.chance
    value = copy.deepcopy(case.seeds.manifest)
    bundle = case.seeds.copy_bundle(case.given / "bundle")
    kind = chance.randrange(3)
    text = mutate_json(chance, value) if kind else _plausible(case, value)
    if chance.random() < 0.8:
        text = sealed_again(text)
    write_manifest(bundle, text)
    image = chance.choice((*case.seeds.digits, case.seeds.image))
    output = ("-o", case.made / f"out{chance.choice(('.json', '.csv', '.npz'))}", "--features")
    more = chance.choice(((), ("--json",), output, ("--size", "native"), ("--top-k", "3")))
    stream = ("--execution", "stream", "--size", "native")
    commands: list[tuple[Any, ...]] = [
        ("inspect", bundle),
        ("inspect", bundle, "--json"),
        ("inspect", bundle, "--sizes", "40,8x16"),
        ("run-engine", bundle, image, "--threads", "1", *more),
        ("run-engine", bundle, image, "--threads", "1", *more),
        ("run-engine", bundle, image, "--threads", "1", *stream),
        ("run-engine", bundle, image, "--threads", "1", "--centrality", "-o", case.made / "out.npz"),
        ("package", "triton", bundle, "-o", case.made / "repository"),
    ]
    command = chance.choice(commands)
    return lambda: case.cli(*command)


def _plausible(case: Case, value: dict[str, Any]) -> bytes:
    """Fields of the right type that do not fit the graph."""
    chance = case.chance
    for _ in range(chance.choice((1, 1, 2))):
        part = chance.choice(("config", "config", "preprocessing", "stages", "checkpoint", "files", "top"))
        if part == "config":
            name = chance.choice(sorted(value["config"]))
            numbers = (1, 2, 3, 7, 9, 11, 127, 129, 10**6, 2**31, 10**12, 2**63)
            value["config"][name] = chance.choice((*numbers, "pure_infsa", "softmax", True, 1e-300, 1e300))
        elif part == "preprocessing":
            name = chance.choice(sorted(value["preprocessing"]))
            values = (
                1,
                31,
                10**5,
                10**9,
                10**18,
                [1e30] * 3,
                [1e-30] * 3,
                [0, 0, 0],
                "shortest",
                "nearest",
                *TEXTS[:3],
            )
            value["preprocessing"][name] = chance.choice(values)
        elif part == "stages":
            stage = chance.choice(value["stages"])
            name = chance.choice(sorted(stage))
            others = [other[name] for other in value["stages"]]
            stage[name] = chance.choice((*others, [], ["tokens"], "nothing", "pairs", "tokens", "image", True, "x"))
            if chance.random() < 0.3:
                chance.shuffle(value["stages"])
        elif part == "checkpoint":
            files = {chance.choice((*TEXTS[:-1], "/dev/zero", "../model.onnx")): "0" * 64}
            value["checkpoint"] = {"path": chance.choice((*TEXTS, "/dev", str(case.given))), "files": files}
        elif part == "files":
            name = chance.choice(("../../outside", "/etc/passwd", "/dev/zero", f"x{CONTROLS}", "model.onnx"))
            value["files"][name] = chance.choice(("0" * 64, "", CONTROLS))
        else:
            name = chance.choice(
                ("layout", "rho", "finetuned", "assumed", "input", "precision", "parameters", "neumann")
            )
            value[name] = chance.choice(
                ("float32", "int8", "fp16", CONTROLS, True, {CONTROLS: CONTROLS}, {"terms": 3, "a": "b", "c": None},
                 *INTERESTING, 0.5)
            )  # fmt: skip
    return json.dumps(value).encode()
