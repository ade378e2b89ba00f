"""Ways to run a model, behind one interface."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray


class Runner(Protocol):
    """A context manager that leaves the device alone until it is entered."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def run(self, images: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        """`logits [B, classes]` and `features [B, E]` of uint8 RGB images `[B, H, W, 3]`, whole patches."""
        ...
