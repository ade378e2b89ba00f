"""Ways to run a model, behind one interface."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from infexport.inference.streaming.driver import StageRunner

Placement = dict[str, Counter[str]]
"""Where nodes run → operator → number of nodes."""


class Runner(Protocol):
    """A context manager that leaves the device alone until it is entered."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def run(self, images: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        """`logits [B, classes]` and `features [B, E]` of uint8 RGB images `[B, H, W, 3]`, whole patches."""
        ...


class ImageRunner(Runner, Protocol):
    """A runner of what is shipped.

    Attributes:
        provider: where it runs, in words; known once it is entered.
        precision: of the layers that meet every token.
        version: of the library that runs it, in words.
    """

    provider: str
    precision: str
    version: str

    @property
    def placement(self) -> Placement:
        """Where the nodes run, once entered; on a CPU where it was opened to tell."""
        ...

    def takes(self, shape: Sequence[int]) -> bool:
        """Whether it runs images of a shape `[B, H, W, 3]` at all."""
        ...


def spread(placement: Placement) -> str:
    """Where the nodes run, in a line; empty where that is one place."""
    counts = [f"{counter.total()} nodes on {place}" for place, counter in placement.items()]
    return ", ".join(counts) if len(counts) > 1 else ""


class Stages(StageRunner, Protocol):
    """What runs stages: a context manager, too.

    Attributes:
        provider, version: as of `ImageRunner`.
        identity: what decides an answer to the last bit, besides the bundle.
    """

    provider: str
    version: str
    identity: dict[str, str]

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
