"""No images, heads, tokens, keys or values: bodies, whole graphs and stages answer with empty arrays or zeros."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn
from torch.export import Dim

import infexport
import infsa_ops
from infexport.bundle import open_bundle
from infexport.inference.runners.onnxruntime import OrtRunner
from infsa_ops.affinity_product import reference as product
from infsa_ops.affinity_squared_norm import reference as squared_norm
from infsa_ops.linear_state import reference as linear
from infsa_ops.neumann_kernel import reference as pure

WIDTH = 8
SIZES = {"B": 2, "H": 3, "N": 5, "M": 7, "d_v": 4}
EMPTY = [axes for n in range(1, len(SIZES) + 1) for axes in itertools.combinations(SIZES, n)]


class AllOperators(nn.Module):
    """Every operator; with `truth` its reference."""

    def __init__(self, truth: bool = False) -> None:
        super().__init__()
        self.truth = truth

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, weights: Tensor, mass: Tensor, moment: Tensor
    ) -> tuple[Tensor, ...]:
        if self.truth:
            return (
                pure.neumann_kernel(q, q, x, 0.5, 2),
                *linear.linear_state_update(weights, x, mass, moment),
                *product.affinity_product(q, k, v),
                squared_norm.affinity_squared_norm(q, k),
            )
        return (
            infsa_ops.neumann_kernel(q, q, x, 0.5, 2),
            *infsa_ops.linear_state_update(weights, x, mass, moment),
            *infsa_ops.affinity_product(q, k, v),
            infsa_ops.affinity_squared_norm(q, k),
        )


def arguments(dtype: torch.dtype, sizes: dict[str, int]) -> tuple[Tensor, ...]:
    b, h, n, m, d_v = sizes.values()
    generator = torch.Generator().manual_seed(0)
    shapes = [(b, h, n, WIDTH), (b, h, m, WIDTH), (b, h, m, d_v), (b, h, n, d_v), (b, h, n), (b, h), (b, h, d_v)]
    made = [torch.randn(shape, generator=generator) for shape in shapes]
    return (*(x.to(dtype) for x in made[:5]), *made[5:])


@pytest.fixture(scope="module", params=[torch.float32, torch.float16], ids=str)
def exported(request: pytest.FixtureRequest) -> tuple[torch.dtype, onnx.ModelProto]:
    example = arguments(request.param, SIZES)
    shapes = tuple({i: Dim.DYNAMIC for i, size in enumerate(x.shape) if size != WIDTH} for x in example)
    return request.param, infexport.export(AllOperators(), example, dynamic_shapes=shapes)


@pytest.fixture(scope="module", params=["ONNX Runtime", "ONNX's evaluator"])
def runtime(request: pytest.FixtureRequest, exported: tuple[torch.dtype, onnx.ModelProto]) -> Any:
    """The dtype, and the graph of all operators as a function."""
    dtype, model = exported
    if request.param == "ONNX Runtime":
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    else:
        session = ReferenceEvaluator(model)
    names = [value.name for value in model.graph.input]

    def run(given: tuple[Tensor, ...]) -> list[np.ndarray]:
        # an integer division by zero, which ends the process of ONNX Runtime 1.24, is an error of NumPy's
        with np.errstate(divide="raise", invalid="raise"):
            return session.run(None, {name: x.numpy() for name, x in zip(names, given, strict=True)})

    return dtype, run


@pytest.mark.parametrize("empty", [(), *EMPTY], ids="-".join)
def test_bodies_are_the_reference(empty: tuple[str, ...], runtime: Any) -> None:
    dtype, run = runtime
    given = arguments(dtype, SIZES | dict.fromkeys(empty, 0))
    expected = AllOperators(truth=True)(*(x.double() for x in given))
    tolerance = 8 * (2.0**-10 if dtype == torch.float16 else 2.0**-22)
    for found, truth in zip(run(given), expected, strict=True):
        assert found.shape == truth.shape
        np.testing.assert_allclose(found.astype(np.float64), truth.numpy(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("empty", EMPTY, ids="-".join)
def test_torch_operators_are_the_reference(empty: tuple[str, ...]) -> None:
    given = arguments(torch.float64, SIZES | dict.fromkeys(empty, 0))
    given = tuple(x.double() for x in given)
    for found, truth in zip(AllOperators()(*given), AllOperators(truth=True)(*given), strict=True):
        assert found.shape == truth.shape
        torch.testing.assert_close(found, truth)


# Bundles

BUNDLES = ("digits-linear", "digits-pure")


@pytest.mark.parametrize("centrality", [False, True], ids=["model", "centrality"])
@pytest.mark.parametrize("name", BUNDLES)
def test_a_runner_answers_no_images(name: str, centrality: bool, zoo_bundle: Callable[..., Path]) -> None:
    bundle = open_bundle(zoo_bundle(name))
    size = 32
    with OrtRunner(bundle, "cpu", centrality=centrality) as runner:
        one = runner.run(np.zeros((1, size, size, 3), np.uint8))
        none = runner.run(np.zeros((0, size, size, 3), np.uint8))
    assert {key: (0, *value.shape[1:]) for key, value in one.items()} == {key: v.shape for key, v in none.items()}
    assert all(value.dtype == none[key].dtype for key, value in one.items())


@pytest.mark.parametrize("name", BUNDLES)
def test_onnx_evaluates_a_graph_of_no_images(name: str, zoo_bundle: Callable[..., Path]) -> None:
    evaluator = ReferenceEvaluator(onnx.load(open_bundle(zoo_bundle(name)).model))
    with np.errstate(divide="raise"):
        answers = evaluator.run(None, {"image": np.zeros((0, 32, 32, 3), np.uint8)})
    assert [answer.shape[0] for answer in answers] == [0] * len(answers)


@pytest.mark.parametrize("name", BUNDLES)
def test_stages_take_no_tokens(name: str, zoo_bundle: Callable[..., Path]) -> None:
    bundle = open_bundle(zoo_bundle(name))
    seen = 0
    for graph in {stage.graph for stage in bundle.manifest.stages or ()}:
        session = onnxruntime.InferenceSession(bundle.path / graph, providers=["CPUExecutionProvider"])
        inputs = session.get_inputs()
        for axis in {size for value in inputs for size in value.shape if isinstance(size, str)}:
            feeds = {
                value.name: np.ones(
                    [0 if size == axis else 16 if isinstance(size, str) else size for size in value.shape],
                    np.uint8 if "uint8" in value.type else np.float32,
                )
                for value in inputs
            }
            assert all(np.isfinite(found).all() for found in session.run(None, feeds)), (graph, axis)
            seen += 1
    assert seen > 5
