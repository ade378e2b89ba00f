"""Weights that several graphs of a bundle share."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import onnx
import onnx_ir as ir

from infexport.bundle.manifest import Stage

INLINE = 1024
"""Bytes. Tensors below that stay in their own graph."""


class SharedWeightsWriter:
    """Writes graphs beside the whole graph; what they have in common with it stays where that has it.

    Args:
        whole: the file, its weights in one file of external data.
        graph: what was saved there.
    """

    def __init__(self, whole: Path, graph: ir.Model) -> None:
        self._whole = whole
        self._shared: dict[tuple[Any, ...], ir.ExternalTensor] = {}
        # weak: the whole graph need not stay in memory
        self._known: WeakKeyDictionary[Any, tuple[Any, ...]] = WeakKeyDictionary()
        here = graph.graph.initializers
        for name, value in ir.load(whole).graph.initializers.items():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor):
                content = _content(tensor)
                self._shared[content] = tensor
                self._known[here[name].const_value] = content

    def save(self, graph: ir.Model, name: str) -> None:
        """Write a graph, in the precision of the whole one, to the file of this name."""
        for tensor_name, value in graph.graph.initializers.items():
            tensor = value.const_value
            assert tensor is not None, f"{tensor_name} has no value"
            found = self._shared.get(self._content(tensor)) if tensor.nbytes >= INLINE else None
            if found is not None:
                value.const_value = ir.ExternalTensor(
                    found.location, found.offset, found.length, found.dtype,
                    shape=found.shape, name=tensor_name, base_dir=found.base_dir,
                )  # fmt: skip
        file = self._whole.with_name(name)
        ir.save(graph, file)
        onnx.checker.check_model(file, full_check=True)

    def _content(self, tensor: ir.TensorProtocol) -> tuple[Any, ...]:
        # the whole graph's own tensors are not read again: of a large model they are gigabytes
        return self._known.get(tensor) or _content(tensor)

    def save_stages(self, stages: Iterable[tuple[Stage, ir.Model | None]]) -> list[Stage]:
        """Write what `export_stages` gives; the stages."""
        written = []
        for stage, graph in stages:
            if graph is not None:
                self.save(graph, stage.graph)
            written.append(stage)
        return written


def _content(tensor: ir.TensorProtocol) -> tuple[Any, ...]:
    digest = hashlib.sha256(np.ascontiguousarray(tensor.numpy()).data).digest()
    return tensor.dtype, tuple(tensor.shape), digest
