"""Weights that a precision has no numbers for: an error that names them, or numbers that are right."""

from __future__ import annotations

import warnings

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors.torch import load_file, save_file
from support import GOLDEN, TINY, relative_error

from infexport.conversion.calibration import calibrate
from infexport.conversion.neumann_terms import measure_truncation
from infexport.conversion.passes import ActivationStats, Unrepresentable, lower, weight_key
from infexport.conversion.passes.half_precision import ToHalfPrecision
from infexport.conversion.passes.quantization import quantized_weight
from infexport.conversion.passes.token_matmuls import find_products
from infexport.errors import InfexportError
from infvit.fold import fold
from infvit.network import InfViT

PIXELS = """<ir_version: 9, opset_import: ["": 20]>
g (uint8[1, N, 4] image) => (float[1, N, 2] out) {{
    x = Cast <to = 1> (image)
    out = MatMul (x, weight)
}}"""


def product(weight: np.ndarray, tokens: bool) -> ir.Model:
    """A product of pixels, or of tokens, with a weight `[4, 2]`."""
    text = PIXELS.format().replace("{{", "{").replace("}}", "}")
    if tokens:
        text = text.replace("uint8[1, N, 4] image", "float[1, N, 4] image").replace("Cast <to = 1>", "Relu")
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, "weight"))
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


@pytest.mark.parametrize(("precision", "value", "most"), [("fp16", -1e5, "65504"), ("bf16", 3.4e38, "3.38953e+38")])
def test_a_weight_beyond_a_half_type_is_named(precision, value, most):
    weight = np.ones((4, 2), np.float32)
    weight[1, 1] = value
    model = product(weight, tokens=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(Unrepresentable) as caught:
            lower(model, precision)
    assert "weight" in caught.value.summary
    assert f"{value:g}" in caught.value.details
    assert most in caught.value.details
    assert "--precision fp32" in caught.value.hint


def with_a_second_product(last: np.ndarray) -> ir.Model:
    """Two products of tokens, of which the second has the given weight."""
    model = product(np.ones((4, 2), np.float32), tokens=True)
    (out,) = model.graph.outputs
    weight = ir.val("last", const_value=ir.tensor(last, name="last"))
    weight.shape, weight.dtype = ir.Shape(last.shape), ir.DataType.FLOAT
    model.graph.register_initializer(weight)
    more = ir.node("MatMul", [out, weight], outputs=[ir.val("more", ir.DataType.FLOAT, ir.Shape([1, "N", 2]))])
    model.graph.append(more)
    model.graph.outputs[0] = more.outputs[0]
    return model


@pytest.mark.parametrize(
    ("precision", "stats", "tensorrt", "error"),
    [("fp16", None, False, Unrepresentable), ("int8", {}, False, ValueError), ("int8", None, True, ValueError)],
)
def test_a_pass_that_cannot_run_leaves_the_graph_untouched(precision, stats, tensorrt, error):
    model = with_a_second_product(np.full((2, 2), 1e6, np.float32))
    if stats is not None:  # of the first product alone
        first = find_products(model.graph)[0]
        stats = {weight_key(first): ActivationStats(0.0, 1.0, np.zeros(4))}
    before = ir.to_proto(model).SerializeToString()
    with pytest.raises(error):
        lower(model, precision, stats, tensorrt)
    assert ir.to_proto(model).SerializeToString() == before


def test_a_pass_that_breaks_its_promise_is_found():
    class Idle(ToHalfPrecision):
        def apply(self, model: ir.Model) -> None:
            """Do nothing."""

    with pytest.raises(AssertionError, match="is in float32"):
        Idle(ir.DataType.FLOAT16)(product(np.ones((4, 2), np.float32), tokens=True))


@pytest.mark.parametrize("value", [1e5, 1e30, 3e38])
def test_products_with_pixels_are_scaled_to_any_weight(value):
    weight = np.array([[value, 1], [0, 2], [0, 3], [0, 4]], np.float32)
    model = product(weight, tokens=False)
    lower(model, "fp16")
    numbers = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in ir.to_proto(model).graph.initializer}
    lowered = numbers["weight_fp16"].astype(np.float64) * numbers["weight_fp16_unit"].astype(np.float64)
    assert relative_error(lowered[:, 0], weight[:, 0]) <= 2**-11
    assert relative_error(lowered[:, 1], weight[:, 1]) <= 2**-11


@given(arrays.arrays(np.float32, (3, 2), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)))
def test_int8_weights_never_wrap(weight):
    """Not those below 1e-38 either, whose scale has few digits."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantized, scale = quantized_weight(weight)
    assert np.isfinite(scale).all()
    assert (np.sign(quantized) * np.sign(weight) >= 0).all()
    assert (np.abs(quantized.astype(int)) <= 127).all()


@pytest.mark.slow
def test_the_command_line_names_the_network_s_weight(infexport, tmp_path):
    weights = load_file(GOLDEN / "reference_linear.safetensors")
    weights["encoder.layers.1.ff.0.weight"][3, 5] = 1e5
    save_file(weights, tmp_path / "model.safetensors")
    options = ("--config", GOLDEN / "reference_linear.json", "--no-fold", "--precision", "fp16")
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        result = infexport(
            "convert", "checkpoint", tmp_path / "model.safetensors", *options, "-o", tmp_path / "b", exit_code=2
        )
    for words in ("encoder.layers.1.ff.0.weight", "100000", "65504", "--precision fp32"):
        assert words in result.stderr
    assert not (tmp_path / "b").exists()


def test_two_projections_whose_product_is_too_large_stay_two():
    network = InfViT(TINY["pure"].__class__(**{**TINY["pure"].to_dict(), "attention_dense": True})).eval()
    with torch.no_grad():
        for attention in network.attentions:
            attention.out_proj.weight.fill_(1e30)
            attention.dense.weight.fill_(1e30)
    layer = fold(network).encoder.layers[0]
    assert layer.attn.dense is not None
    assert all(torch.isfinite(parameter).all() for parameter in layer.parameters())


def test_a_series_of_values_that_are_not_finite_has_no_bound():
    network = InfViT(TINY["pure"]).eval()
    network.set_neumann_terms(3)
    with torch.no_grad():
        network.patch_embed.weight.fill_(3e38)
    with pytest.raises(InfexportError, match="not finite"):
        measure_truncation(network)


def test_a_calibration_of_values_that_are_not_finite_is_refused(golden_bundle):
    graph = golden_bundle("reference_linear", "--input", "float32") / "model.onnx"
    with pytest.raises(InfexportError, match="not finite"):
        calibrate(graph, [np.full((1, 3, 32, 32), np.inf, np.float32)])


@pytest.mark.parametrize(("option", "value"), [("--std", "1e-30,1,1"), ("--mean", "1e30,0,0")])
def test_normalisation_that_is_not_finite_in_float32_is_refused(infexport, tmp_path, option, value):
    options = ("--config", GOLDEN / "reference_linear.json", option, value)
    checkpoint = GOLDEN / "reference_linear.safetensors"
    said = infexport("convert", "checkpoint", checkpoint, *options, "-o", tmp_path / "b", exit_code=2).stderr
    assert option.removeprefix("--") in said
    assert "expected" in said
