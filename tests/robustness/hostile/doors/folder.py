"""Hugging Face's folders: shards, their index, config.json and preprocessor_config.json."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors.torch import load, save

from hostile.cases import Case
from hostile.doors import pth
from hostile.doors.reading import golden, read
from hostile.doors.safetensors import damaged
from hostile.mutate import TEXTS, mutate_json

PROCESSOR = {
    "do_resize": True,
    "size": {"height": 32, "width": 32},
    "resample": 3,
    "do_center_crop": False,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "image_processor_type": "ViTImageProcessor",
}
TIMM = {"pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "input_size": [3, 32, 32], "crop_pct": 0.9}}
INDEX = "model.safetensors.index.json"


def make(case: Case) -> Callable[[], int | None]:
    chance = case.chance
    data, config, _ = golden(case)
    folder = case.given / "model"
    folder.mkdir()
    tensors = load(data)
    names = list(tensors)
    sharded = chance.random() < 0.5
    suffix = "bin" if chance.random() < 0.3 else "safetensors"
    index: dict[str, Any] = {"metadata": {"total_size": len(data)}, "weight_map": {}}
    for i, part in enumerate((names[::2], names[1::2]) if sharded else (names,), 1):
        name = f"model-0000{i}-of-00002.{suffix}" if sharded else f"model.{suffix}"
        shard: Any = {key: tensors[key].contiguous() for key in part}
        if suffix == "bin":
            if chance.random() < 0.3:
                shard[part[0]] = pth.payload(case)
            (folder / name).write_bytes(pth.saved(shard))
        else:
            (folder / name).write_bytes(save(shard))
        index["weight_map"] |= dict.fromkeys(part, name)
    if sharded:
        name = INDEX if suffix == "safetensors" else "pytorch_model.bin.index.json"
        (folder / name).write_bytes(_json(case, index, 0.5))
    (folder / "config.json").write_bytes(_json(case, config | chance.choice(({}, TIMM)), 0.4))
    if chance.random() < 0.6:
        (folder / "preprocessor_config.json").write_bytes(_json(case, PROCESSOR, 0.7))
    for _ in range(chance.choice((0, 0, 1, 1, 2))):
        _disturb(case, folder, index)
    return lambda: read(case, folder)


def _json(case: Case, value: Any, share: float) -> bytes:
    return mutate_json(case.chance, value) if case.chance.random() < share else json.dumps(value).encode()


def _disturb(case: Case, folder: Path, index: dict[str, Any]) -> None:
    """Something among the files that is not one, is not there or leads away."""
    chance = case.chance
    file = chance.choice(sorted(folder.iterdir()))
    outside = case.given / "outside"
    kind = chance.randrange(9)
    if kind == 0:
        remove(file)
    elif kind == 1:
        remove(file)
        os.mkfifo(file)
    elif kind == 2:
        remove(file)
        file.symlink_to(chance.choice(("/dev/zero", "/dev/full", "/proc/self/mem", "/etc/passwd", ".", file.name)))
    elif kind == 3 and file.is_file() and not outside.exists():
        file.rename(outside)
        file.symlink_to(outside)
    elif kind == 4:
        remove(file)
        file.mkdir()
    elif kind == 5:
        index["weight_map"][next(iter(index["weight_map"]))] = chance.choice((*TEXTS, "../outside", "/etc/passwd"))
        remove(folder / INDEX)
        (folder / INDEX).write_bytes(json.dumps(index).encode("utf-8", "surrogatepass"))
    elif kind == 6 and file.suffix == ".safetensors" and file.is_file() and not file.is_symlink():
        with suppress(ValueError, struct.error):  # damaged before
            file.write_bytes(damaged(case, file.read_bytes()))
    elif kind == 7:
        (folder / chance.choice(("training_args.bin", "other.pth", "\x1b[2J.bin"))).write_bytes(b"\x80\x02N.")
    else:
        with open(os.fsencode(folder) + b"/\xff.safetensors", "wb") as made:  # noqa: PTH123  no Path takes bytes
            made.write(b"")


def remove(file: Path) -> None:
    if file.is_dir() and not file.is_symlink():
        file.rmdir()
    else:
        file.unlink(missing_ok=True)
