"""Layouts of tensor names, and the matching of a checkpoint's keys with them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from infvit.errors import CheckpointError

# The first number of a key is its layer in every layout. No more than 9999 layers, and no "00".
_LAYER = re.compile(r"(?<=[._])(?:0|[1-9][0-9]{0,3})(?=\.)")
_LISTED = 8


@dataclass(frozen=True)
class Layout:
    """One way of naming an InfViT's tensors.

    Patterns map a file's key to the canonical one, that of `infvit.network.InfViT`. `{i}` stands for the
    layer, a final `*` for `weight` and `bias`. A canonical `attn.qkv` is no tensor of the network: it holds
    queries, keys and values one above the other, `[3E, E]` and `[3E]`, and is split after renaming.

    Attributes:
        name: as given to `--layout`.
        norm_eps: epsilon of every LayerNorm in the code this layout comes from.
        required: patterns every checkpoint has.
        optional: groups of patterns; of a group a checkpoint has all (in every layer) or none.
        ignored: keys that do not take part in inference.
    """

    name: str
    norm_eps: float
    required: Mapping[str, str]
    optional: tuple[Mapping[str, str], ...] = ()
    ignored: tuple[str, ...] = ()


@dataclass(frozen=True)
class Match:
    """Match of a checkpoint's keys with a layout: file key → canonical key, missing and unexpected keys."""

    layout: Layout
    renamed: Mapping[str, str]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]

    @property
    def distance(self) -> int:
        return len(self.missing) + len(self.unexpected)


def match_layout(layout: Layout, keys: Collection[str]) -> Match:
    """Compare `keys` with what `layout` has at as many layers as the keys speak of."""
    required = _with_suffixes(layout.required)
    groups = [_with_suffixes(group) for group in layout.optional]
    known = set(chain(required, *groups))
    split = {key: _split_layer(key) for key in keys}
    seen = {pattern for pattern, _ in split.values() if pattern in known}
    # The number of different layers, not the highest: a stray large number must not make a long list.
    depth = len({layer for pattern, layer in split.values() if pattern in known and layer is not None})
    expected = _at_every_layer(required, depth)
    for group in groups:
        if seen & group.keys():
            expected |= _at_every_layer(group, depth)
    return Match(
        layout,
        renamed={key: canonical for key, canonical in expected.items() if key in split},
        missing=tuple(key for key in expected if key not in split),
        unexpected=tuple(key for key in keys if key not in expected and key not in layout.ignored),
    )


def choose_layout(keys: Collection[str], readers: Sequence[Layout], name: str = "auto") -> Match:
    """Choose the reader that matches `keys` best, in full.

    Args:
        keys: of the checkpoint.
        readers: in order of preference; several may share a name.
        name: `auto`, or the only layout to consider.

    Raises:
        CheckpointError: an unknown name; or missing and unexpected keys, listed together.
    """
    names = tuple(dict.fromkeys(reader.name for reader in readers))
    if name != "auto" and name not in names:
        raise CheckpointError(f"unknown layout {name!r}", hint=f"Give --layout one of auto, {', '.join(names)}.")
    matches = [match_layout(reader, keys) for reader in readers]
    nearest = min(matches, key=lambda match: match.distance)
    chosen = nearest
    if name != "auto":
        chosen = min((m for m in matches if m.layout.name == name), key=lambda match: match.distance)
    if not chosen.distance:
        return chosen
    if name != "auto":
        fits = "fits the checkpoint" if not nearest.distance else "is the nearest"
        hint = f"{nearest.layout.name!r} {fits}: give --layout {nearest.layout.name}, or leave --layout out."
        raise CheckpointError(f"the checkpoint is not in layout {name!r}", _describe(chosen), hint)
    if not any(match.renamed for match in matches):
        raise CheckpointError(
            "this is not a vision transformer in a known layout: none of its tensor names is known",
            f"received: {_listing(tuple(keys))}\nexpected: one of the layouts {', '.join(names)}",
            "Rename the tensors to one of these layouts, `reference` being the network's own names, "
            "and name it with --layout.",
        )
    raise CheckpointError(
        f"the checkpoint fits no known layout, the nearest being {chosen.layout.name!r}",
        _describe(chosen),
        f"Rename or complete the tensors, or name another layout with --layout: {', '.join(names)}.",
    )


def _split_layer(key: str) -> tuple[str, int | None]:
    """A key's pattern and layer, if it has one."""
    found = _LAYER.search(key)
    if found is None:
        return key, None
    return f"{key[: found.start()]}{{i}}{key[found.end() :]}", int(found[0])


def _with_suffixes(patterns: Mapping[str, str]) -> dict[str, str]:
    """Expand `*` to `weight` and `bias`."""
    written: dict[str, str] = {}
    for pattern, canonical in patterns.items():
        suffixes: Iterable[str] = ("weight", "bias") if pattern.endswith("*") else ("",)
        for suffix in suffixes:
            written[pattern.removesuffix("*") + suffix] = canonical.removesuffix("*") + suffix
    return written


def _at_every_layer(patterns: Mapping[str, str], depth: int) -> dict[str, str]:
    """Expand patterns for `depth` layers, at least one."""
    written: dict[str, str] = {}
    for pattern, canonical in patterns.items():
        for layer in range(max(depth, 1)) if "{i}" in pattern else (0,):
            written[pattern.replace("{i}", str(layer))] = canonical.replace("{i}", str(layer))
    return written


def _describe(match: Match) -> str:
    return f"missing: {_listing(match.missing)}\nunexpected: {_listing(match.unexpected)}"


def _listing(keys: Sequence[str]) -> str:
    if not keys:
        return "none"
    shown = ", ".join(key if len(key) <= 120 else f"{key[:117]}..." for key in keys[:_LISTED])
    rest = f", and {len(keys) - _LISTED} more" if len(keys) > _LISTED else ""
    return f"{len(keys)}: {shown}{rest}"
