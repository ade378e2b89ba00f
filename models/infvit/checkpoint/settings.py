"""Settings from options and config files, each with its source."""

from __future__ import annotations

import re
import reprlib
import sys
from collections.abc import Iterable, Mapping, Sequence
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
    "image_size": ("img_size",),
    "patch_size": (),
    "depth": ("num_hidden_layers", "num_layers"),
    "embed_dim": ("hidden_size", "hidden_dim", "num_features"),
    "mlp_dim": ("intermediate_size",),
    "num_classes": ("num_labels",),
    "attention_dense": (),
    "pooler": (),
    "qkv_bias": (),
    "rho_per_head": (),
    "labels": ("id2label", "label_names"),
}
"""Our name of each setting → what Hugging Face, timm and torchvision call it."""


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

    @property
    def short(self) -> str:
        """The name without a folder, which is the same wherever the file lies."""
        return self.name if self.path is None else self.name.replace(str(self.path), self.path.name)


@dataclass(frozen=True)
class Setting:
    """A value, and the name it was found under, with its source."""

    value: Any
    key: str
    source: Source

    @property
    def found(self) -> str:
        return f"{self.key} in {self.source.name}"

    @property
    def short(self) -> str:
        """Text of the setting, without a folder."""
        return f"{self.key} in {self.source.short}: {reprlib.repr(self.value)}"

    def __str__(self) -> str:
        return f"{self.found}: {reprlib.repr(self.value)}"


def config_sources(weights: RawCheckpoint, config_file: Path | None) -> list[Source]:
    """Read the configs, in order of precedence: `--config`, the checkpoint's own, sidecar files.

    Raises:
        CheckpointError: a file that is not a JSON object.
    """
    sources = []
    if config_file is not None:
        sources.append(Source(f"--config {config_file}", read_json(config_file), config_file))
    if weights.config:
        sources.append(Source("the checkpoint's config", weights.config))
    for name in ("preprocessor_config.json", "config.json"):
        sidecar = weights.folder / name
        with reading(sidecar):
            present = sidecar.is_file() and not (config_file is not None and sidecar.samefile(config_file))
        if present:
            sources.append(Source(str(sidecar), read_json(sidecar), sidecar))
    return [part for source in sources for part in _parts(source)]


def _parts(source: Source) -> list[Source]:
    """Split a config: timm's `model_args`, if any, take precedence over its other words."""
    arguments = source.values.get("model_args")
    if not isinstance(arguments, Mapping):
        return [source]
    return [Source(f"model_args of {source.name}", arguments, source.path), source]


def merge_settings(
    sources: Iterable[Source], words: Mapping[str, Sequence[str]], synonyms: Mapping[str, Sequence[Any]]
) -> tuple[dict[str, Setting], list[str]]:
    """Merge what sources say; None counts as not saying it.

    Args:
        sources: the first that has a word wins.
        words: names of settings, and other names of each.
        synonyms: name of a setting → values that mean the same.

    Returns:
        Every setting that was found, and a sentence for each that another one contradicts.
    """
    merged: dict[str, Setting] = {}
    overridden = []
    for source in sources:
        for name, others in words.items():
            for key in (key for key in (name, *others) if source.values.get(key) is not None):
                setting = Setting(source.values[key], key, source)
                winner = merged.setdefault(name, setting)
                same = synonyms.get(name, ())
                meant = winner.value in same and setting.value in same
                if not meant and not _agree(name, winner.value, setting.value):
                    overridden.append(f"{winner.short} is used, not {setting.short}")
    return merged, overridden


_PLACEHOLDER = re.compile(r"LABEL_\d+")


def _agree(name: str, value: Any, other: Any) -> bool:
    """Return whether two values of a setting say the same, or the second says nothing."""
    if name == "variant" and other == "softmax":
        return True  # what it was trained as: the attention is for the user to choose
    if name == "labels":
        names = [_names(labels) for labels in (value, other)]
        return names[0] == names[1] or all(_PLACEHOLDER.fullmatch(str(label)) for label in names[1] or [])
    return equal(*(v[0] if isinstance(v, list) and len(v) == 2 and equal(*v) else v for v in (value, other)))


def equal(value: Any, other: Any) -> bool:
    """Return whether two values of a config are equal; a tuple equals a list."""
    sides = [list(v) if isinstance(v, tuple) else v for v in (value, other)]
    try:
        return bool(sides[0] == sides[1])
    except RecursionError:  # nested too deeply to compare, and no setting is
        return False


def integer(setting: Setting) -> int:
    """Return a whole number of at least 1.

    Raises:
        CheckpointError: anything else.
    """
    if type(setting.value) is not int or setting.value < 1:
        raise CheckpointError(f"received {setting}", "expected: a whole number of at least 1")
    return int(setting.value)


def number(setting: Setting, below: float = sys.float_info.max) -> float:
    """Return a number above 0 and below `below`.

    Raises:
        CheckpointError: anything else.
    """
    if type(setting.value) not in (int, float) or not 0 < setting.value < below:
        limit = "" if below == sys.float_info.max else f" and below {below:g}"
        raise CheckpointError(f"received {setting}", f"expected: a number above 0{limit}")
    return float(setting.value)


def _is_text(value: str) -> bool:
    """Tell whether a string can be encoded: JSON may contain halves of surrogate pairs."""
    return value == value.encode("utf-8", "replace").decode()


def _names(labels: Any) -> list[str] | None:
    """Class names in order, of any form that `read_labels` reads; None of another."""
    if isinstance(labels, Mapping):
        named = {str(key): value for key, value in labels.items()}
        if all(type(index) is int for index in named.values()):  # name → index
            named = {str(index): name for name, index in named.items()}
            if len(named) != len(labels):
                return None
        labels = [named.get(str(index)) for index in range(len(named))]
    if not isinstance(labels, list):
        return None
    # Keras' imagenet_class_index.json has [WordNet ID, name]
    labels = [label[1] if isinstance(label, list) and _is_pair(label) else label for label in labels]
    return labels if all(isinstance(label, str) and _is_text(label) for label in labels) else None


def _is_pair(label: list[Any]) -> bool:
    return len(label) == 2 and isinstance(label[0], str) and re.fullmatch(r"n\d{8}", label[0]) is not None


def read_labels(setting: Setting | None, num_classes: int) -> tuple[str, ...] | None:
    """Read class names: a list of them, `{"0": name, …}`, `{name: 0, …}`, or either of the first with Keras' pairs.

    A pair is `["n01440764", "tench"]`, a WordNet ID and a name; the name is taken.

    Raises:
        CheckpointError: another form, or not one name per class.
    """
    if setting is None:
        return None
    labels = _names(setting.value)
    if labels is None:
        raise CheckpointError(
            f"cannot read {setting.found}",
            f"received: {reprlib.repr(setting.value)}\n"
            'expected: a list of names, {"0": name, …} or {name: 0, …} with 0, 1, … once each; '
            'a name may be a pair such as ["n01440764", "tench"]',
            "Give the right ones with --labels FILE: a line each, or JSON in one of these forms.",
        )
    if len(labels) != num_classes:
        raise CheckpointError(
            f"{setting.found} and the weights contradict each other",
            f"received {len(labels)} labels, expected {num_classes}, one for every class of the head",
            "Give the right ones with --labels FILE: a line each, or a JSON list.",
        )
    return tuple(labels)
