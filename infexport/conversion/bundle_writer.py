"""Files of a bundle: graphs that share one file of weights, labels and, last, the manifest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import onnx
import onnx_ir as ir

from infexport.bundle import Manifest, seal
from infexport.bundle.manifest import LABELS

INLINE = 1024
"""Bytes. Tensors below that stay in their own graph."""


class BundleWriter:
    """Writes the files of a bundle, each once.

    The first graph brings a file of external data. Graphs that are added later find their tensors there by content, so
    that a weight lies on the disk once.

    Args:
        folder: an empty folder, which becomes the bundle.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._has_weights = False
        self._shared: dict[tuple[Any, ...], ir.ExternalTensor] = {}
        # weak: the first graph need not stay in memory
        self._known: WeakKeyDictionary[Any, tuple[Any, ...]] = WeakKeyDictionary()

    def add_labels(self, labels: Sequence[str]) -> None:
        """Write the names of the classes."""
        text = json.dumps(labels, indent=0, ensure_ascii=False)
        (self._folder / LABELS).write_text(text + "\n", encoding="utf-8")

    def add_graph(self, graph: ir.Model, name: str) -> None:
        """Write a graph to the file of this name, and check it as ONNX does.

        Args:
            graph: in the precision of the first one.
            name: of the file; the first graph's weights are in `<name>.data`.

        Raises:
            onnx.checker.ValidationError: the graph is not valid, which is a bug.
        """
        file = self._folder / name
        if self._has_weights:
            self._share(graph)
            ir.save(graph, file)
        else:
            self._has_weights = True
            ir.save(graph, file, external_data=f"{name}.data")
            self._remember(graph, file)
        onnx.checker.check_model(file, full_check=True)

    def finish(self, manifest: Manifest) -> None:
        """Hash every file and write the manifest, last."""
        seal(self._folder, manifest)

    def _remember(self, graph: ir.Model, file: Path) -> None:
        own = graph.graph.initializers
        for name, value in ir.load(file).graph.initializers.items():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor):
                content = _content(tensor)
                self._shared[content] = tensor
                self._known[own[name].const_value] = content

    def _share(self, graph: ir.Model) -> None:
        for name, value in graph.graph.initializers.items():
            tensor = value.const_value
            assert tensor is not None, f"{name} has no value"
            if tensor.nbytes < INLINE:
                continue
            # the first graph's own tensors are not read again: of a large model they are gigabytes
            found = self._shared.get(self._known.get(tensor) or _content(tensor))
            if found is not None:
                value.const_value = ir.ExternalTensor(
                    found.location, found.offset, found.length, found.dtype,
                    shape=found.shape, name=name, base_dir=found.base_dir,
                )  # fmt: skip


def _content(tensor: ir.TensorProtocol) -> tuple[Any, ...]:
    digest = hashlib.sha256(np.ascontiguousarray(tensor.numpy()).data).digest()
    return tensor.dtype, tuple(tensor.shape), digest
