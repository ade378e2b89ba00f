"""A rewrite of a graph with a contract."""

from __future__ import annotations

from abc import ABC, abstractmethod

import onnx_ir as ir


class Pass(ABC):
    """Rewrites a graph in place; states what it requires and what it ensures."""

    def __call__(self, model: ir.Model) -> None:
        """Check what is required, rewrite the graph, and check what is ensured.

        Raises:
            ValueError, Unrepresentable: the pass cannot run; the graph is as it was.
            AssertionError: the graph is not as the pass promises, which is a bug in it.
        """
        self.requires(model)
        self.apply(model)
        self.ensures(model)

    def requires(self, model: ir.Model) -> None:  # noqa: B027
        """Raise an error if the pass cannot run; do not touch the graph."""

    @abstractmethod
    def apply(self, model: ir.Model) -> None:
        """Rewrite the graph."""

    def ensures(self, model: ir.Model) -> None:  # noqa: B027
        """Raise an AssertionError if the graph is not as promised."""
