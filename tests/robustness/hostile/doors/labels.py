"""Labels: `--labels`, those of a bundle, and the CSV of `validate accuracy`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from hostile.cases import Case
from hostile.doors.reading import golden, read
from hostile.mutate import TEXTS, mutate_bytes, mutate_json
from hostile.seeds import seal_again
from infexport.bundle.manifest import LABELS


def make(case: Case) -> Callable[[], int | None]:
    return case.chance.choice((_given, _of_bundle, _csv))(case)


def _given(case: Case) -> Callable[[], int | None]:
    chance = case.chance
    data, _, config = golden(case)
    weights, file = case.given / "model.safetensors", case.given / "labels.txt"
    weights.write_bytes(data)
    names = [f"class {i}" for i in range(7)]
    kind = chance.randrange(8)
    if kind == 0:
        _special(case, file)
    elif kind < 4:
        file.write_bytes(mutate_json(chance, chance.choice((names, {str(i): name for i, name in enumerate(names)}))))
    else:
        names[chance.randrange(7)] = chance.choice(TEXTS)
        file.write_bytes(mutate_bytes(chance, "\n".join(names).encode("utf-8", "surrogatepass")))
    return lambda: read(case, weights, config_file=config, labels_file=file)


def _of_bundle(case: Case) -> Callable[[], int | None]:
    chance = case.chance
    names = [str(i) for i in range(10)]
    if chance.random() < 0.4:
        names[chance.randrange(10)] = chance.choice(TEXTS)
        content = json.dumps(names).encode()
    else:
        content = mutate_json(chance, names)
    bundle = case.seeds.copy_bundle(case.given / "bundle", {LABELS: content})
    seal_again(bundle)
    image = chance.choice(case.seeds.digits)
    output = ("-o", case.made / f"out{chance.choice(('.json', '.csv', '.npz', '.parquet'))}")
    more = chance.choice(((), ("--json",), output, ("--top-k", "10")))
    if chance.random() < 0.2:
        return lambda: case.cli("inspect", bundle, *more[:1] if more == ("--json",) else ())
    return lambda: case.cli("run-engine", bundle, image, "--threads", "1", *more)


def _csv(case: Case) -> Callable[[], int | None]:
    chance = case.chance
    lines = [["file", "label"], *([str(file), file.name[0]] for file in case.seeds.digits[:3])]
    for _ in range(chance.choice((0, 1, 2))):
        line = chance.choice(lines)
        line[chance.randrange(2)] = chance.choice((*TEXTS, '"' + "x" * 200_000, "1" * 5000, '"open'))
    text = "\n".join(",".join(line) for line in lines).encode("utf-8", "surrogatepass")
    file = case.given / "labels.csv"
    if chance.random() < 0.05:
        _special(case, file)
    else:
        file.write_bytes(mutate_bytes(chance, text) if chance.random() < 0.6 else text)
    more = chance.choice(((), ("--json",), ("--min-top1", "0.5")))
    return lambda: case.cli("validate", "accuracy", case.seeds.bundle, file, "--no-pytorch", "--threads", "1", *more)


def _special(case: Case, file: Path) -> None:
    """What is no file, and may be read for ever."""
    if case.chance.random() < 0.5:
        os.mkfifo(file)
    else:
        file.symlink_to(case.chance.choice(("/dev/zero", file.name, ".")))
