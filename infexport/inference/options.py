"""Options of a run: one record that checks itself, wherever it is made."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Collection
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from infexport.errors import InfexportError

Execution = Literal["auto", "whole", "stream"]
Edge = Literal["pad", "crop"]
TokenDtype = Literal["float32", "float16"]
Detail = Literal["mean", "layers", "heads"]
"""A heat map of all layers and heads, of each layer, or of each head."""
Size = Literal["trained", "native"] | int
PROVIDERS = ("auto", "cpu", "cuda", "tensorrt", "tensorrt-rtx", "engine")

MAX_PIXELS_PER_SIDE = 10**8
"""A hundred times what has been run; no number in what follows outgrows 64 bits."""
MAX_THREADS = 1024
"""Each is started, and has a stack."""
UNITS = {"": 1, "B": 1} | {
    prefix + suffix: base**power
    for power, prefix in enumerate("KMGT", start=1)
    for suffix, base in (("B", 1000), ("iB", 1024))
}

NEEDS: dict[str, tuple[Execution, ...]] = {
    "scratch": ("auto", "stream"),
    "chunk": ("auto", "stream"),
    "tokens": ("auto", "stream"),
    "batch_size": ("auto", "whole"),
}
"""Option → the executions in which it does something; in another one it is refused."""


@dataclass(frozen=True, kw_only=True)
class InferenceOptions:
    """Options of a run, checked when they are made.

    Attributes:
        size: `trained` applies the recorded evaluation transform, `native` leaves the image as it is, N is the
            transform at N pixels.
        edge: how a side becomes a whole number of patches: `pad` replicates the edge, `crop` cuts. Images are never
            padded to a common size: every token enters the pooled state.
        execution: run the whole graph, or `stream` chunks of tokens; `auto` takes the fastest way that fits.
        memory: bytes that the process may take; None for 80% of what is free when a call begins.
        chunk: tokens at a time, streamed; None for what suits what runs them.
        tokens: type in which streamed tokens are kept.
        scratch: folder for the tokens of streamed images; None keeps them in memory where they fit.
        provider: `engine`, a provider of ONNX Runtime, or `auto`.
        engine: name of a set of engines, `<target>-<precision>`; None for the one that fits.
        batch_size: images of equal grid at once, where they are run whole.
        threads: of ONNX Runtime; None for all cores.
        centrality: compute the centrality of tokens, too.
        drawing: detail of the heat maps that are drawn in this process, which takes memory; None where none are.

    Raises:
        InfexportError: a value that an option does not take, or an option that would be ignored.
    """

    size: Size = "trained"
    edge: Edge = "pad"
    execution: Execution = "auto"
    memory: int | None = None
    chunk: int | None = None
    tokens: TokenDtype = "float32"
    scratch: Path | None = None
    provider: str = "auto"
    engine: str | None = None
    batch_size: int = 1
    threads: int | None = None
    centrality: bool = False
    drawing: Detail | None = None

    def __post_init__(self) -> None:
        numbers = {"memory": 2**63, "chunk": 2**63, "threads": MAX_THREADS, "batch_size": 2**31}
        for name, most in numbers.items():
            if getattr(self, name) is not None or name == "batch_size":
                self._set(name, _number(name, getattr(self, name), most))
        if not isinstance(self.size, str) or self.size not in ("trained", "native"):
            self._set("size", _number("size", self.size, MAX_PIXELS_PER_SIDE, "trained, native or a number of pixels"))
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            if not isinstance(value, str | None) or value not in allowed:
                raise _wrong(name, value, f"one of {', '.join(map(str, allowed))}")
        for name, (kinds, expected) in _KINDS.items():
            if not isinstance(getattr(self, name), kinds):
                raise _wrong(name, getattr(self, name), expected)
        for name in self.named(NEEDS):
            if self.execution not in NEEDS[name]:
                raise InfexportError(
                    f"{name} would be ignored: execution is {self.execution}",
                    f"it is for {' or '.join(NEEDS[name])}",
                    f"leave out one of {name} and execution",
                )
        check_engine(self.provider, self.engine)

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)  # of a frozen record, while it is made

    def named(self, names: Collection[str]) -> list[str]:
        """Those of `names` that are not what they are by default."""
        return [each.name for each in fields(self) if each.name in names and getattr(self, each.name) != each.default]


_CHOICES: dict[str, tuple[str | None, ...]] = {
    "edge": get_args(Edge),
    "execution": get_args(Execution),
    "tokens": get_args(TokenDtype),
    "provider": PROVIDERS,
    "drawing": (None, *get_args(Detail)),
}
_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "scratch": ((Path, type(None)), "a folder, or None"),
    "engine": ((str, type(None)), "the name of a set of engines, or None"),
    "centrality": ((bool,), "True or False"),
}


def check_engine(provider: str, engine: str | None) -> None:
    """Refuse a set of engines together with a provider that runs none.

    Raises:
        InfexportError: they do not go together.
    """
    if engine is not None and provider not in ("auto", "engine"):
        raise InfexportError(
            f"engine {engine} with provider {provider}",
            "engines are run by provider engine, or auto",
            "leave one of the two out",
        )


def parse_size(value: Any) -> Any:
    """Return the size that a text means; what is no text is returned as it is.

    Raises:
        InfexportError: neither trained, native nor a number of pixels.
    """
    if not isinstance(value, str) or value in ("trained", "native"):
        return value
    if not re.fullmatch("[0-9]{1,9}", value) or not 1 <= int(value) <= MAX_PIXELS_PER_SIDE:
        raise InfexportError(f"neither trained, native nor a number of pixels: {_short(value)}")
    return int(value)


def parse_bytes(value: Any) -> Any:
    """Return the number of bytes that a text means, such as 4GiB or 800MB; what is no text is returned as it is.

    Raises:
        InfexportError: a text that is no amount of memory.
    """
    if not isinstance(value, str):
        return value
    found = re.fullmatch(r"(\d+(?:\.\d*)?)\s*([A-Za-z]*)", value.strip(), re.ASCII)
    unit = next((UNITS[name] for name in UNITS if found and name.lower() == found[2].lower()), None)
    if found is None or unit is None or not 1 <= float(found[1]) * unit < math.inf:
        raise InfexportError(
            f"no amount of memory: {_short(value)}", "expected a number and a unit, such as 4GiB or 800MB"
        )
    return int(float(found[1]) * unit)


def _number(name: str, value: Any, most: int, expected: str = "a whole number") -> int:
    try:
        whole = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        whole = 0
    if not 1 <= whole <= most:
        raise _wrong(name, value, f"{expected}, from 1 to {most:,}")
    return whole


def _wrong(name: str, value: Any, expected: str) -> InfexportError:
    return InfexportError(f"{name} is {_short(value)}", f"expected {expected}")


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except Exception:  # anything can be given
        text = f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:79]}…"
