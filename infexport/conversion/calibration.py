"""Statistics of activations, by running the float32 graph on images: ranges, and the average token."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from infexport.conversion.passes import ActivationStats, weight_key
from infexport.conversion.passes.graph_editor import Editor
from infexport.conversion.passes.token_matmuls import find_products
from infexport.errors import InfexportError
from infexport.images.decode import read_image
from infexport.images.preprocess import fit, normalise
from infexport.images.transform import Preprocessing
from infexport.inference.runners.onnxruntime import open_memory_session
from infexport.system.progress import (
    ItemsDone,
    ProgressListener,
)


def batches(
    files: Sequence[Path],
    patch: int,
    preprocessing: Preprocessing,
    takes: str,
    listener: ProgressListener,
) -> Iterator[NDArray[Any]]:
    """Yield images by the evaluation transform, one at a time, as a graph of `uint8` or `float32` takes them.

    Raises:
        InfexportError: one that cannot be read.
    """
    transform = preprocessing.transform
    for file in files:
        image = fit(read_image(file), patch, "trained", transform, "pad").pixels[None]
        yield image if takes == "uint8" else normalise(image, preprocessing)
        listener.on_event(ItemsDone())


def calibrate(graph: Path, images: Iterable[NDArray[Any]]) -> dict[str, ActivationStats]:
    """Run a whole graph on images; measure the inputs of its products, but for the patch embedding.

    Args:
        graph: a saved float32 model, beside its weights.
        images: batches of them as the graph takes them, at least one.

    Returns:
        By `infexport.conversion.passes.weight_key`, which is the same in every graph of a model: stages need no other.

    Raises:
        InfexportError: ONNX Runtime is not installed, or a product is given values that are not finite.
    """
    model = ir.load(graph)
    products = [product for product in find_products(model.graph) if product.largest is None]
    keys = [weight_key(product) for product in products]
    measures = {x: _measures(model.graph, x) for x in dict.fromkeys(product.x for product in products)}
    session = open_memory_session(ir.to_proto(model).SerializeToString(), graph.parent)
    found = {key: _Met() for key in keys}
    for batch in images:
        values = session.run(
            [name for names in measures.values() for name in names], {model.graph.inputs[0].name: batch}
        )
        given = {x: values[4 * i : 4 * i + 4] for i, x in enumerate(measures)}
        for key, product in zip(keys, products, strict=True):
            found[key].add(*given[product.x])
            if not np.isfinite([found[key].low, found[key].high, *np.atleast_1d(found[key].total)]).all():
                raise InfexportError(
                    "the model's activations are not finite on a calibration image",
                    f"received values from {found[key].low:g} to {found[key].high:g} at {product.node.name}, expected "
                    "finite ones",
                    "check the checkpoint: its weights may be too large for float32",
                )
    return {key: ActivationStats(one.low, one.high, np.asarray(one.total / one.tokens)) for key, one in found.items()}


@dataclass
class _Met:
    low: float = math.inf
    high: float = -math.inf
    total: NDArray[np.float64] | float = 0.0
    tokens: int = 0

    def add(self, low: float, high: float, mean: NDArray[np.float32], shape: NDArray[np.int64]) -> None:
        tokens = int(np.prod(shape[:-1]))
        self.low, self.high = min(self.low, float(low)), max(self.high, float(high))
        self.total, self.tokens = self.total + tokens * mean.astype(np.float64), self.tokens + tokens


def _measures(graph: ir.Graph, x: ir.Value) -> list[str]:
    """Make outputs of the smallest and largest number of x `[…, N, K]`, of its mean token `[K]`, and of its shape."""
    edit = Editor(graph)
    assert x.shape is not None
    axes = edit.initializer(f"{x.name}_axes", np.arange(len(x.shape) - 1))
    for op_type, inputs in (("ReduceMin", [x]), ("ReduceMax", [x]), ("ReduceMean", [x, axes]), ("Shape", [x])):
        dtype = ir.DataType.INT64 if op_type == "Shape" else ir.DataType.FLOAT
        attributes = {} if op_type == "Shape" else {"keepdims": 0}
        graph.outputs.append(edit.add(op_type, inputs, ir.val(f"{x.name}_{op_type}", dtype), attributes))
    return [str(output.name) for output in graph.outputs[-4:]]
