"""What options and config files say, each setting with where it comes from."""

from __future__ import annotations

import reprlib
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infvit.checkpoint.files import RawCheckpoint, read_json, reading
from infvit.errors import CheckpointError

NAMES: dict[str, tuple[str, ...]] = {
    "variant": (),
    "num_heads": ("num_attention_heads",),
    "layout": (),
    "rho": (),
    "norm_eps": ("layer_norm_eps",),
    "neumann_terms": (),
    "image_size": (),
    "patch_size": (),
    "depth": ("num_hidden_layers",),
    "embed_dim": ("hidden_size",),
    "mlp_dim": ("intermediate_size",),
    "num_classes": ("num_labels",),
    "attention_dense": (),
    "pooler": (),
    "qkv_bias": (),
    "rho_per_head": (),
    "hidden_act": (),
    "pooler_act": (),
    "labels": ("id2label", "label_names"),
}
"""Our name of each setting → what Hugging Face (and, for labels, timm) call it."""


@dataclass(frozen=True)
class Source:
    """One place settings come from.

    Attributes:
        name: as errors name it.
        values: as found.
        path: the file, for a source that is one.
    """

    name: str
    values: Mapping[str, Any]
    path: Path | None = None


@dataclass(frozen=True)
class Setting:
    """A value, and the name it was found under, with its source."""

    value: Any
    found: str

    def __str__(self) -> str:
        return f"{self.found}: {reprlib.repr(self.value)}"


def config_sources(weights: RawCheckpoint, config_file: Path | None) -> list[Source]:
    """The configs there are, the most telling first: `--config`, the checkpoint's own, sidecar files.

    Raises:
        CheckpointError: a file that is not a JSON object.
    """
    sources = []
    if config_file is not None:
        sources.append(Source(str(config_file), read_json(config_file), config_file))
    if weights.config:
        sources.append(Source("the checkpoint's config", weights.config))
    for name in ("preprocessor_config.json", "config.json"):
        sidecar = weights.folder / name
        with reading(sidecar):
            present = sidecar.is_file() and not (config_file is not None and sidecar.samefile(config_file))
        if present:
            sources.append(Source(str(sidecar), read_json(sidecar), sidecar))
    return sources


def merge_settings(sources: Iterable[Source]) -> dict[str, Setting]:
    """Every setting of `NAMES` from the first source that has it; None counts as not having it."""
    merged: dict[str, Setting] = {}
    for source in sources:
        for name, others in NAMES.items():
            found = next((key for key in (name, *others) if source.values.get(key) is not None), None)
            if found is not None and name not in merged:
                merged[name] = Setting(source.values[found], f"{found} in {source.name}")
    return merged


def integer(setting: Setting) -> int:
    """A whole number of at least 1.

    Raises:
        CheckpointError: anything else.
    """
    if type(setting.value) is not int or setting.value < 1:
        raise CheckpointError(f"received {setting}", "expected: a whole number of at least 1")
    return int(setting.value)


def number(setting: Setting, below: float = sys.float_info.max) -> float:
    """A number above 0 and below `below`.

    Raises:
        CheckpointError: anything else.
    """
    if type(setting.value) not in (int, float) or not 0 < setting.value < below:
        limit = "" if below == sys.float_info.max else f" and below {below:g}"
        raise CheckpointError(f"received {setting}", f"expected: a number above 0{limit}")
    return float(setting.value)


def _is_text(value: str) -> bool:
    """Whether it can be written: JSON may have halves of surrogate pairs."""
    return value == value.encode("utf-8", "replace").decode()


def read_labels(setting: Setting | None, num_classes: int) -> tuple[str, ...] | None:
    """Class names, from a list or from Hugging Face's `{"0": name, …}`.

    Raises:
        CheckpointError: another form, or not one name per class.
    """
    if setting is None:
        return None
    labels = setting.value
    if isinstance(labels, Mapping):
        by_index = {str(index): label for index, label in labels.items()}
        labels = [by_index.get(str(index)) for index in range(len(by_index))]
    if not isinstance(labels, list) or not all(isinstance(label, str) and _is_text(label) for label in labels):
        raise CheckpointError(
            f"cannot read {setting.found}",
            "expected: a list of names, or an object with a name for each of 0, 1, …",
        )
    if len(labels) != num_classes:
        raise CheckpointError(
            f"{setting.found} and the weights contradict each other",
            f"received {len(labels)} labels, expected {num_classes}, one for every class of the head",
            "Give the right ones with --labels FILE: a line each, or a JSON list.",
        )
    return tuple(labels)
