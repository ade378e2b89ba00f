"""fp16, bf16 and int8: what is rounded, what is not, and how far the answers are from float64."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx.inliner
import onnx_ir as ir
import onnxruntime
import pytest
import torch
import train_digits
from onnx import TensorProto
from PIL import Image
from safetensors.numpy import load_file
from safetensors.torch import save_file
from support import GOLDEN, MODELS, ZOO, Rounding, relative_error
from torch import nn

from infexport.conversion.calibration import calibrate
from infexport.conversion.image_model import ImageModel
from infexport.conversion.passes import ActivationStats, lower, weight_key
from infexport.conversion.passes.quantization import quantization, quantized_weight
from infexport.conversion.passes.token_matmuls import find_products
from infexport.inference.runners import onnxruntime as ort
from infexport.system import host
from infvit.checkpoint import build_network, load_checkpoint
from infvit.config import InfViTConfig
from infvit.fold import fold
from infvit.network import InfViT

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CONFIG = InfViTConfig(
    variant="linear_infsa", image_size=32, patch_size=8, depth=3, embed_dim=64, num_heads=4, mlp_dim=96,
    num_classes=10, norm_eps=1e-6,
)  # fmt: skip
VARIANTS = ("linear_infsa", "pure_infsa")


def as_it_is(network: InfViT) -> None:
    """No change."""


def random_config(**config) -> InfViTConfig:
    return dataclasses.replace(CONFIG, **config)


def random_network(change=as_it_is, **config) -> InfViT:
    torch.manual_seed(0)
    network = InfViT(random_config(**config)).eval()
    with torch.no_grad():
        change(network)
    return network


def image_model(folded=True, **config) -> ImageModel:
    network = random_network(**config)
    return ImageModel(fold(network) if folded else network, MEAN, STD, "uint8", folded).eval()


def images(count=4, height=32, width=48, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), np.uint8)


@pytest.fixture(scope="session")
def convert(infexport, made_once):
    """A bundle of a model of random weights, made once: (options, changes of network and config) → the folder."""

    def get(*options, change=as_it_is, **config):
        def make(folder):
            folder.mkdir()
            network = random_network(change, **config)
            save_file(network.state_dict(), folder / "model.safetensors")
            told = ["--variant", network.config.variant, "--num-heads", network.config.num_heads, "--norm-eps", 1e-6]
            told += ["--neumann-terms", network.config.neumann_terms]
            infexport("convert", "checkpoint", folder / "model.safetensors", *told, *options, "-o", folder / "bundle")

        return made_once(make, "precision", options, change.__name__, random_config(**config)) / "bundle"

    return get


def loaded(file: Path, *precision, **options) -> onnx.ModelProto:
    """A saved float32 graph, lowered, its weights inside."""
    model = ir.load(file)
    lower(model, *precision, **options)
    ir.external_data.load_to_model(model)
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    return proto


def run(model: onnx.ModelProto | Path, batch: np.ndarray) -> np.ndarray:
    """Logits, by ONNX Runtime."""
    model = model.SerializeToString() if isinstance(model, onnx.ModelProto) else model / "model.onnx"
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return session.run(["logits"], {session.get_inputs()[0].name: batch})[0]


def numbers(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


# Which products


LINEAR = ["attn.attention.q_proj", "ff.0", "ff.3"]
PURE = ["attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.out_proj", "ff.0", "ff.3"]
LAST = {"linear_infsa": ["q_proj"], "pure_infsa": ["q_proj", "k_proj"]}


def display_name(product) -> str:
    """The layer that a product was exported from: the exporter names the bias after it, not the weight."""
    ((add, _),) = product.node.outputs[0].uses()
    return add.inputs[1].name.removeprefix("network.").removesuffix(".bias")


@pytest.mark.parametrize(("variant", "layer"), [("linear_infsa", LINEAR), ("pure_infsa", PURE)])
def test_products_that_meet_every_token(variant, layer, convert):
    products = find_products(ir.load(convert(variant=variant) / "model.onnx").graph)
    expected = ["patch_embed.proj"]
    expected += [f"encoder.layers.{i}.{name}" for i in (0, 1) for name in layer]
    expected += [f"encoder.layers.2.layer.attn.attention.{name}" for name in LAST[variant]]
    assert sorted(map(display_name, products)) == sorted(expected)
    assert [display_name(product) for product in products if product.largest is not None] == ["patch_embed.proj"]
    center = image_model(variant=variant).network.patch_embed.center
    assert products[0].largest == max(center, 255 - center)


@pytest.mark.parametrize(
    ("name", "options"), [("digits-linear", []), ("digits-pure", []), ("digits-pure", ["--neumann-terms", "3"])]
)
def test_stages_have_the_products_of_the_whole(name, options, zoo_bundle):
    # wide enough that the class token's first projections are not folded to a constant
    bundle = zoo_bundle(name, *options)
    found = {
        file.name: [weight_key(product) for product in find_products(ir.load(file).graph)]
        for file in bundle.glob("*.onnx")
    }
    whole = found.pop("model.onnx")
    assert set(found.pop("centrality.onnx")) == set(whole)
    assert found["stream-00-start.onnx"]  # of the class token, by weights that meet every other token, too
    stages = {key for keys in found.values() for key in keys}
    assert stages <= set(whole)
    # after several terms, the whole graph projects all tokens where a stage projects the class token alone
    assert len(set(whole) - stages) == bool(options)


MATRIX = f"float[8, 4] w = {{{', '.join(['1'] * 32)}}}"


@pytest.mark.parametrize(
    ("inputs", "node"),
    [
        ("float[B, 1, 8] x", "MatMul(x, w)"),  # the class token
        ("float[B, 8] x", "MatMul(x, w)"),  # once per image
        ("float[B, N, 8] x, float[8, 4] other", "MatMul(x, other)"),  # no weight
        ("float[B, 4, N] x", "MatMul(w, x)"),  # the weight from the left
    ],
)
def test_products_that_stay(inputs, node):
    text = f"""<ir_version: 10, opset_import: ["" : 20]> g ({inputs}) => (y) <{MATRIX}> {{ y = {node} }}"""
    assert not find_products(ir.from_onnx_text(text).graph)


def test_a_graph_without_shapes_is_refused():
    text = f"""<ir_version: 10, opset_import: ["" : 20]> g (float[B, N, 8] x) => (y) <{MATRIX}>
    {{ z = Relu(x) y = MatMul(z, w) }}"""
    with pytest.raises(ValueError, match="unknown shape"):
        lower(ir.from_onnx_text(text), "fp16")


# Calibration


def test_ranges_are_those_of_all_images(convert):
    bundle, model = convert(), image_model()
    sizes = [images(1, 32, 48), images(2, 24, 32, seed=1)]
    stats = calibrate(bundle / "model.onnx", sizes)
    first = model.network.encoder.layers[0]
    with torch.no_grad():
        tokens = torch.cat([first.norm1(model.network.embed(torch.from_numpy(x).float())).flatten(0, 1) for x in sizes])
    keys = {
        display_name(product): weight_key(product) for product in find_products(ir.load(bundle / "model.onnx").graph)
    }
    assert stats.keys() == {key for name, key in keys.items() if name != "patch_embed.proj"}
    found = stats[keys["encoder.layers.0.attn.attention.q_proj"]]
    assert (found.low, found.high) == pytest.approx((float(tokens.min()), float(tokens.max())), rel=1e-5)
    torch.testing.assert_close(torch.from_numpy(found.mean), tokens.double().mean(0), rtol=1e-4, atol=1e-5)


def test_a_calibration_of_another_model_is_refused(convert):
    stats = calibrate(convert() / "model.onnx", [images()])
    stats.popitem()
    with pytest.raises(ValueError, match="another model"):
        loaded(convert() / "model.onnx", "int8", stats)


def test_signed_needs_fixed_ranges(convert):
    with pytest.raises(ValueError, match="ranges that are fixed"):
        loaded(convert() / "model.onnx", "int8", tensorrt=True)


# One product


def linear_graph(linear: nn.Linear) -> ir.Model:
    """x `[B, N, K]` by a linear layer."""
    x = ir.val("x", ir.DataType.FLOAT, ["B", "N", linear.in_features])
    weight = ir.val("w", const_value=ir.tensor(linear.weight.detach().numpy().T.copy(), name="w"))
    shape = ["B", "N", linear.out_features]
    out = ir.val("product", ir.DataType.FLOAT, shape)
    nodes, initializers = [ir.node("MatMul", [x, weight], outputs=[out])], [weight]
    if linear.bias is not None:
        bias = ir.val("b", const_value=ir.tensor(linear.bias.detach().numpy(), name="b"))
        nodes.append(ir.node("Add", [out, bias], outputs=[ir.val("y", ir.DataType.FLOAT, shape)]))
        initializers.append(bias)
    graph = ir.Graph([x], nodes[-1].outputs, nodes=nodes, initializers=initializers, opset_imports={"": 20}, name="g")
    return ir.Model(graph, ir_version=10)


def int8(linear: nn.Linear, range_=None, mean=None, signed=False) -> onnx.ModelProto:
    model, stats = linear_graph(linear), None
    if range_ is not None:
        (product,) = find_products(model.graph)
        mean = np.zeros(linear.in_features) if mean is None else mean
        stats = {weight_key(product): ActivationStats(*range_, mean)}
    lower(model, "int8", stats, tensorrt=signed)
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    return proto


def applied(model: onnx.ModelProto, x: torch.Tensor) -> torch.Tensor:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


def rounded_weight(model: onnx.ModelProto) -> torch.Tensor:
    """`[K, N]`."""
    found = numbers(model)
    return torch.from_numpy(found["w_int8"] * found["w_int8_scale"])


def test_quantization_holds_zero_and_both_ends():
    scale, zero_point = quantization(-1.0, 3.0)
    assert (scale.dtype, zero_point.dtype) == (np.float32, np.uint8)
    steps = np.arange(256) - int(zero_point)
    assert steps.min() * scale == pytest.approx(-1, abs=float(scale) / 2)
    assert steps.max() * scale == pytest.approx(3, abs=float(scale) / 2)
    assert quantization(1.0, 3.0) == quantization(0.0, 3.0)
    assert quantization(0.0, 0.0)[0] == 1  # nothing but zeros


def test_signed_quantization_is_symmetric():
    for low, high in ((-1.0, 3.0), (-3.0, 1.0), (1.0, 3.0)):
        scale, zero_point = quantization(low, high, signed=True)
        assert (zero_point.dtype, zero_point) == (np.int8, 0)
        assert scale * 127 == pytest.approx(3)
    assert quantization(0.0, 0.0, signed=True)[0] == 1


@pytest.mark.parametrize(("range_", "signed"), [(None, False), ((-4.0, 4.0), False), ((-4.0, 4.0), True)])
@pytest.mark.parametrize("bias", [True, False])
def test_int8_product_is_near_the_one_it_replaces(range_, signed, bias):
    torch.manual_seed(0)
    linear, x = nn.Linear(256, 64, bias=bias), torch.randn(3, 50, 256).clamp(-4, 4)
    lowered = int8(linear, range_, signed=signed)
    with torch.no_grad():
        found, truth, weight = applied(lowered, x), linear(x), rounded_weight(lowered)
        assert 1e-3 < relative_error(found, truth) < 2e-2
        lost = numbers(lowered).get("product_bias", numbers(lowered).get("b", np.zeros(64, np.float32)))
        exact = x @ weight + torch.from_numpy(lost)
    # what is left is the rounding of x: at most half a step in every product
    step = (8 / 254 if signed else 8 / 255) if range_ else float(x.max() - x.min()) / 255
    bound = step / 2 * weight.abs().sum(0)
    assert ((found - exact).abs() <= 1.01 * bound + 1e-5).all()


@pytest.mark.parametrize("bias", [True, False])
def test_the_average_input_keeps_its_output(bias):
    torch.manual_seed(0)
    linear, mean = nn.Linear(64, 32, bias=bias), torch.randn(64)
    lowered = int8(linear, (-4.0, 4.0), mean.double().numpy())
    exact = mean @ rounded_weight(lowered) + torch.from_numpy(numbers(lowered)["product_bias"])
    torch.testing.assert_close(exact, linear(mean).detach(), rtol=1e-5, atol=1e-5)


def test_weights_of_zero_stay_zero():
    linear = nn.Linear(4, 3)
    nn.init.zeros_(linear.weight)
    for lowered in (int8(linear), int8(linear, (-1.0, 1.0)), int8(linear, (-1.0, 1.0), signed=True)):
        torch.testing.assert_close(applied(lowered, torch.ones(1, 2, 4)), linear.bias.detach().expand(1, 2, 3))
    weight, scale = quantized_weight(np.zeros((4, 3), np.float32))
    assert (weight == 0).all()
    assert (scale == 1).all()


@pytest.mark.parametrize("signed", [False, True])
def test_values_out_of_a_fixed_range_saturate(signed):
    linear = nn.Linear(1, 1, bias=False)
    nn.init.ones_(linear.weight)
    found = applied(int8(linear, (-1.0, 1.0), signed=signed), torch.tensor([[[5.0], [-5.0]]]))
    assert found.flatten().tolist() == pytest.approx([1, -1], abs=0.01)


def test_small_weights_of_pixels_keep_their_digits():
    """Most would be subnormal in float16, and sums of others overflow."""
    text = """<ir_version: 10, opset_import: ["" : 20]> g (float[64, 4] w, uint8[B, N, 64] image) => (y)
    <float c = {114}, float[B, N, 64] f, float[B, N, 64] x>
    { f = Cast<to = 1>(image) x = Sub(f, c) y = MatMul(x, w) }"""
    scales = np.array([1e-9, 1e-6, 1, 300], np.float32)
    weight = np.random.default_rng(0).standard_normal((64, 4)).astype(np.float32) * scales
    model = ir.from_onnx_text(text)
    w = model.graph.inputs.pop(0)
    w.const_value = ir.tensor(weight, name="w")
    model.graph.register_initializer(w)
    batch = images(1, 8, 24).reshape(1, -1, 64)
    truth = (batch.astype(np.float64) - 114) @ weight
    for precision, limit in (("fp16", 2e-3), ("bf16", 2e-2)):
        lowered = model.clone()
        lower(lowered, precision)
        (found,) = Rounding(ir.to_proto(lowered)).run({"image": batch})
        for column in range(4):
            assert relative_error(found[..., column], truth[..., column]) <= limit


# Whole graphs and stages


def pictures(folder: Path, batch: np.ndarray) -> None:
    """Make a folder of the images."""
    folder.mkdir()
    for i, image in enumerate(batch):
        Image.fromarray(image).save(folder / f"{i:03}.png")


@pytest.mark.parametrize("calibrated", [False, True])
def test_a_fixed_range_makes_an_image_independent_of_its_batch(calibrated, convert):
    file = convert() / "model.onnx"
    model = loaded(file, "int8", calibrate(file, images(8, seed=1)[:, None]) if calibrated else None)
    alone, together = run(model, images()[:1]), run(model, images())[:1]
    assert np.allclose(alone, together, rtol=1e-5, atol=1e-6) == calibrated


def contents(file: Path) -> tuple[Counter, Counter]:
    """The nodes of a graph and its numbers, each with how often; equal numbers may have either's name."""
    model = onnx.load(file)
    kinds = Counter((function.name, node.op_type) for function in model.functions for node in function.node)
    kinds += Counter(node.op_type for node in model.graph.node)
    tensors = (onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer)
    return kinds, Counter((x.dtype.str, x.shape, hashlib.sha256(x.tobytes()).hexdigest()) for x in tensors)


NO_BIAS = "random weights without biases of queries, keys and values"


@pytest.mark.parametrize(
    ("name", "options", "precision"),
    [
        ("digits-linear", [], "fp16"),
        ("digits-linear", [], "int8"),
        ("digits-linear", [], "calibrated"),
        (NO_BIAS, [], "calibrated"),
        ("digits-pure", [], "fp16"),
        ("digits-pure", ["--neumann-terms", "3"], "fp16"),
        ("digits-pure", [], "calibrated"),
    ],
)
def test_a_bundle_is_lowered_as_at_convert(name, options, precision, convert, zoo_bundle, tmp_path):
    """No checkpoint is needed: the float32 bundle gives what the conversion to another precision gives."""
    folder = ZOO / "digits-held-out"
    kind = precision.replace("calibrated", "int8")
    told = [*options, "--precision", kind, *(["--calibrate", folder] if precision == "calibrated" else [])]
    plain, bundle = (
        convert(*said, qkv_bias=False) if name == NO_BIAS else zoo_bundle(name, *said) for said in (options, told)
    )
    batch = np.stack([np.asarray(Image.open(file)) for file in sorted(folder.glob("*.png"))])
    stats = calibrate(plain / "model.onnx", batch[:, None]) if precision == "calibrated" else None
    assert np.array_equal(run(loaded(plain / "model.onnx", kind, stats), images()), run(bundle, images()))
    assert {file.name for file in plain.glob("*.onnx")} == {file.name for file in bundle.glob("*.onnx")}
    for file in plain.glob("*.onnx"):
        onnx.save(loaded(file, kind, stats), tmp_path / file.name)
        assert contents(tmp_path / file.name) == contents(bundle / file.name), file.name


def values(graph: onnx.GraphProto, outer: dict[str, int] | None = None):
    """Every node of a graph and of the graphs inside, with the element types that its inputs and outputs have."""
    known = dict(outer or {})
    for info in (*graph.value_info, *graph.input, *graph.output):
        known[info.name] = info.type.tensor_type.elem_type
    known |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    for node in graph.node:
        yield node, [known.get(name) for name in (*node.input, *node.output) if name]
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from values(attribute.g, known)


@pytest.mark.parametrize("folded", [True, False], ids=["folded", "unfolded"])
@pytest.mark.parametrize("config", [{}, {"variant": "pure_infsa"}, {"variant": "pure_infsa", "neumann_terms": 3}])
@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8", "signed"])
def test_norms_energies_states_and_sums_are_float32(config, precision, folded, convert):
    bundle = convert(*([] if folded else ["--no-fold"]), **config)
    stats = calibrate(bundle / "model.onnx", [images()]) if precision == "signed" else None
    exact = {"LayerNormalization", "ReduceL2", "ReduceSum", "Add", "Gelu", "Softmax", "Sqrt", "Tanh"}
    seen = Counter()
    for file in bundle.glob("*.onnx"):
        model = loaded(file, precision.replace("signed", "int8"), stats, tensorrt=precision == "signed")
        for node, found in values(model.graph):
            if node.op_type == "LinearInfSAStateUpdate":
                assert set(found) == {TensorProto.FLOAT}, f"{node.name} of {file.name}"
        model = onnx.shape_inference.infer_shapes(onnx.inliner.inline_local_functions(model), data_prop=True)
        for node, found in values(model.graph):
            seen[node.op_type] += 1
            if node.op_type in exact:
                assert None not in found, f"{node.op_type} {node.name} of {file.name}"
                assert set(found) <= {TensorProto.FLOAT, TensorProto.INT64}, (
                    f"{node.op_type} {node.name} of {file.name}"
                )
        if precision == "signed":
            zeros = [x for name, x in numbers(model).items() if name.endswith("_zero")]
            assert all(zero.dtype == np.int8 and zero == 0 for zero in zeros)
    assert {"LayerNormalization", "ReduceSum"} <= set(seen)
    assert ("MatMulInteger" in seen) == (precision == "int8")
    assert ("QuantizeLinear" in seen) == (precision == "signed")


@pytest.mark.parametrize("config", [{}, {"variant": "pure_infsa"}, {"variant": "pure_infsa", "neumann_terms": 3}])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_tensorrt_is_asked_to_sum_products_in_float32(config, precision, convert):
    """No product has factors in half precision; those that had are the same but for where they are rounded."""
    bundle = convert(**config)
    half = {TensorProto.FLOAT16, TensorProto.BFLOAT16}
    for file in sorted(bundle.glob("*.onnx")):
        plain, asked = loaded(file, precision), loaded(file, precision, tensorrt=True)
        counts = []
        for model in (plain, asked):
            model = onnx.shape_inference.infer_shapes(onnx.inliner.inline_local_functions(model), data_prop=True)
            found = [(node, set(types)) for node, types in values(model.graph) if node.op_type == "MatMul"]
            counts.append((len(found), sum(bool(types & half) for _, types in found)))
        (products, low), (same, none) = counts
        assert same == products
        assert none == 0
        assert low > 0 or not file.stem.endswith(("model", "embed", "apply", "attend"))
        if precision == "fp16" and file.stem == "model":  # ONNX Runtime has no bfloat16 here
            batch = images()
            assert relative_error(run(asked, batch), run(plain, batch)) < 2e-3  # each is as far from float64


@pytest.mark.parametrize(
    ("precision", "kind"),
    [("fp16", TensorProto.FLOAT16), ("bf16", TensorProto.BFLOAT16), ("int8", TensorProto.INT8)],
)
@pytest.mark.parametrize(("variant", "count"), [("linear_infsa", 7), ("pure_infsa", 14)])
def test_which_weights_are_lowered(variant, count, precision, kind, convert):
    model = loaded(convert(variant=variant) / "model.onnx", precision)
    weights = [tensor for tensor in model.graph.initializer if tensor.data_type == kind and len(tensor.dims) == 2]
    assert len(weights) == count + (precision != "int8")  # the patch embedding is never int8


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_nothing_is_cast_twice(variant, precision, convert):
    for file in convert(variant=variant).glob("*.onnx"):
        graph = loaded(file, precision).graph
        casts = [node for node in graph.node if node.op_type == "Cast"]
        made = {name for node in casts for name in node.output}
        assert not [node for node in casts if node.input[0] in made], file.name
        assert max(Counter((node.input[0], node.attribute[0].i) for node in casts).values(), default=1) == 1, file.name


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_what_stages_exchange(precision, convert):
    """Queries, keys and values are stored in float16; numpy has no bfloat16."""
    expected = TensorProto.FLOAT16 if precision == "fp16" else TensorProto.FLOAT
    seen = set()
    for file in convert(variant="pure_infsa").glob("stream-*.onnx"):
        graph = loaded(file, precision).graph
        for value in (*graph.input, *graph.output):
            kernel = value.name in ("q", "k", "v", "query")
            seen |= {value.name} if kernel else set()
            wanted = TensorProto.UINT8 if value.name == "image" else expected if kernel else TensorProto.FLOAT
            assert value.type.tensor_type.elem_type == wanted, (file.name, value.name)
    assert seen == {"q", "k", "v", "query"}


@pytest.mark.parametrize("calibrated", [False, True])
def test_int8_products_are_fused_in_onnx_runtime(calibrated, zoo_bundle, tmp_path):
    """Unfused, the sums would go through memory as int32 and again as float32."""
    told = ["--calibrate", ZOO / "digits-held-out"] if calibrated else []
    bundle = zoo_bundle("digits-linear", "--precision", "int8", *told)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    onnxruntime.InferenceSession(bundle / "model.onnx", options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(tmp_path / "optimised.onnx", load_external_data=False).graph.node]
    # three in each of three layers, and one in the last
    assert kinds.count("DynamicQuantizeMatMul") + kinds.count("MatMulIntegerToFloat") == 10
    assert not {"MatMulInteger", "DequantizeLinear"} & set(kinds)


# Fidelity


@pytest.mark.parametrize("name", MODELS)
def test_golden_models(name, golden_bundle):
    io, file = load_file(GOLDEN / f"{name}.io.safetensors"), golden_bundle(name) / "model.onnx"
    stats = calibrate(file, io["images"][:, None])
    for precision, limit in (("fp16", 2e-3), ("int8", 3e-2)):
        assert relative_error(run(loaded(file, precision), io["images"]), io["logits_f64"]) <= limit
    assert relative_error(run(loaded(file, "int8", stats, tensorrt=True), io["images"]), io["logits_f64"]) <= 3e-2
    for precision, limit in (("fp16", 2e-3), ("bf16", 2e-2)):
        logits = Rounding(loaded(file, precision, tensorrt=True)).run({"image": io["images"]})[0]
        assert relative_error(logits, io["logits_f64"]) <= limit


@pytest.fixture(scope="session")
def digits(made_once):
    """A folder of 512 training digits to calibrate with, one of the held-out ones, and these as an array."""
    train, _, held_out, _ = train_digits.digits()
    folders = [
        made_once(lambda folder, array=array: pictures(folder, array), f"digits {kind}")
        for kind, array in (("train", train[:512]), ("held out", held_out))
    ]
    return *folders, torch.from_numpy(held_out)


def on_the_edge(network: InfViT, pixels: torch.Tensor) -> torch.Tensor:
    """Which images have a layer and head whose largest score is near 0, by 3% of the scores' root mean square.

    Where it passes 0, Linear-InfSA jumps: a lone score of 1e-5 weighs as much as one of 1.
    """
    found, tokens = torch.zeros(len(pixels), dtype=torch.bool), network.embed(pixels)
    for layer in network.encoder.layers:
        if network.config.variant == "linear_infsa":
            q, k, _ = layer.attn.project(layer.norm1(tokens))
            energy = q.norm(dim=-1, keepdim=True)
            score = ((energy * q).sum(-2, keepdim=True) * k).sum(-1)
            found |= (score.amax(-1).abs() < 0.03 * score.square().mean(-1).sqrt()).any(-1)
        tokens = layer(tokens)
    return found


@pytest.mark.parametrize("name", ["digits-linear", "digits-pure"])
@pytest.mark.parametrize(
    ("options", "limit", "typical"),
    [(["fp16"], 2e-3, 1e-3), (["int8"], 3e-2, 1e-2), (["int8", "--calibrate"], 1e-2, 1e-2)],
    ids=["fp16", "dynamic", "calibrated"],
)
def test_held_out_digits(name, options, limit, typical, infexport, zoo_bundle, digits, tmp_path):
    train, held_out, pixels = digits
    calibrate = [train] if "--calibrate" in options else []
    infexport(
        "run-engine",
        zoo_bundle(name, "--precision", *options, *calibrate),
        held_out,
        "-o",
        tmp_path / "o.npz",
        "--batch-size",
        50,
    )
    logits = np.load(tmp_path / "o.npz")["logits"]
    network = build_network(load_checkpoint(ZOO / name)).double().eval()
    with torch.no_grad():
        truth = network(train_digits.normalise(pixels).double()).numpy()
        jumps = on_the_edge(network, train_digits.normalise(pixels).double()).numpy()
    assert (logits.argmax(-1) == truth.argmax(-1)).mean() >= 0.99
    assert relative_error(logits[~jumps], truth[~jumps]) <= typical
    # float16 does not tell a score of 1e-5 from 0 either: one held-out digit of 450 jumps
    errors = np.linalg.norm(logits - truth, axis=1) / np.linalg.norm(truth, axis=1)
    judged = errors < 0.05 if options[0] == "fp16" else np.ones_like(jumps)
    assert (~judged).sum() <= 1
    assert relative_error(logits[judged], truth[judged]) <= limit


@pytest.mark.parametrize("name", ["digits-linear", "digits-pure"])
def test_held_out_digits_in_signed_int8(name, zoo_bundle, digits):
    """For TensorRT; run here by ONNX Runtime."""
    train, _, pixels = digits
    calibration = [np.asarray(Image.open(file))[None] for file in sorted(train.iterdir())]
    file = zoo_bundle(name) / "model.onnx"
    logits = run(loaded(file, "int8", calibrate(file, calibration), tensorrt=True), pixels.numpy())
    network = build_network(load_checkpoint(ZOO / name)).double().eval()
    with torch.no_grad():
        truth = network(train_digits.normalise(pixels).double()).numpy()
        jumps = on_the_edge(network, train_digits.normalise(pixels).double()).numpy()
    assert (logits.argmax(-1) == truth.argmax(-1)).mean() >= 0.99
    assert relative_error(logits[~jumps], truth[~jumps]) <= 1e-2
    # half the steps for what GELU gives, which is positive but for little: more images jump
    assert relative_error(logits, truth) <= 2e-2


# Extremes


MANY = {"image_size": 64, "patch_size": 2, "depth": 2, "embed_dim": 16, "num_heads": 2, "mlp_dim": 32}


@pytest.mark.parametrize("folded", [True, False], ids=["folded", "unfolded"])
def test_fp16_at_332k_tokens(folded, convert):
    """9216² pixels' worth of tokens at patch 16: plain float16 sums overflow or lose 1/N."""
    options, batch = [] if folded else ["--no-fold"], images(1, 1152, 1152)
    with torch.no_grad():
        truth = image_model(folded=False, **MANY).double()(torch.from_numpy(batch))[0]
    lowered = loaded(convert(*options, **MANY) / "model.onnx", "fp16")
    # folded, the conversion gives the lowered graph bit for bit (test_a_bundle_is_lowered_as_at_convert)
    plain = lowered if folded else convert(*options, "--precision", "fp16", **MANY)
    for logits in (run(plain, batch), Rounding(lowered).run({"image": batch})[0]):
        assert np.isfinite(logits).all()
        assert relative_error(logits, truth) <= 2e-3


def massive(network: InfViT) -> None:
    """A few channels thousands of times larger than the rest, in the residual stream and inside the MLP."""
    for layer in network.encoder.layers[:-1]:
        layer.ff[0].bias[5] += 3000
        layer.ff[3].weight[9, 5] += 5
        layer.ff[3].bias[11] += 1e5  # above what float16 holds


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("precision", "limit"), [("fp16", 2e-3), ("bf16", 2e-2)])
def test_massive_activations(variant, precision, limit, convert):
    model = image_model(variant=variant, change=massive)
    with torch.no_grad():
        residual = model.network.encoder.layers[0](model.network.embed(torch.from_numpy(images()).float()))
        truth = model.double()(torch.from_numpy(images()))[0]
    lowered = loaded(convert(variant=variant, change=massive) / "model.onnx", precision)
    logits = Rounding(lowered).run({"image": images()})[0]
    assert residual.max() > torch.finfo(torch.float16).max
    assert np.isfinite(logits).all()
    assert relative_error(logits, truth) <= limit


# What is said


@pytest.mark.slow
def test_options_that_do_not_fit(infexport, tmp_path):
    convert = ("convert", "checkpoint", ZOO / "digits-linear", "-o", tmp_path / "b")
    wrong = infexport(*convert, "--calibrate", tmp_path, exit_code=2)
    assert "--precision int8" in wrong.stderr
    wrong = infexport(*convert, "--precision", "int8", "--calibrate", tmp_path, exit_code=2)
    assert "no images" in wrong.stderr
    (tmp_path / "bad.png").write_bytes(b"not a picture")
    wrong = infexport(*convert, "--precision", "int8", "--calibrate", tmp_path, exit_code=2)
    assert "bad.png" in wrong.stderr
    assert not (tmp_path / "b").exists()


def test_a_bundle_says_how_it_computes(infexport, zoo_bundle):
    pictures = ZOO / "digits-held-out"
    for options, told in (
        (["int8"], "int8, ranges of activations found at run time"),
        (["int8", "--calibrate", pictures], "int8, ranges of activations fixed by 20 images"),
        (["fp16"], "fp16, folded"),
    ):
        bundle = zoo_bundle("digits-linear", "--precision", *options)
        assert told in infexport("inspect", bundle).stdout
        facts = json.loads(infexport("inspect", bundle, "--json").stdout)
        assert facts["precision"] == options[0]
        assert facts["calibration"] == ({"images": 20} if "--calibrate" in options else None)
        report = json.loads(infexport("validate", "parity", bundle, "--json").stdout)
        assert report["passed"]
        assert report["tolerance"]["precision"] == options[0]
        refused = infexport("build-engine", bundle, "--target", "a100", exit_code=2)
        assert "--precision fp32" in refused.stderr
        ran = infexport("run-engine", bundle, pictures / "0-a.png")
        assert ("computed in float32" in ran.stderr) == (options[0] == "fp16")


@pytest.mark.parametrize(
    ("precision", "provider", "flags", "told"),
    [
        ("fp32", "cpu", "avx2", ""),
        ("fp16", "cuda", "avx2", ""),
        ("fp16", "cpu", "avx2", "computed in float32"),
        ("int8", "cuda", "avx2", "for the CPU"),
        ("int8", "engine a100-int8", "avx2", ""),
        ("int8", "cpu", "avx2", "no int8 dot products"),
        ("int8", "cpu", "avx2 avx512_vnni", ""),
        ("int8", "cpu", "avx2 avx_vnni", ""),
    ],
)
def test_remarks(precision, provider, flags, told, tmp_path, monkeypatch):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"model name : some\nflags : fpu {flags}\n")
    monkeypatch.setattr(host, "CPUINFO", cpuinfo)
    assert told in " ".join(ort.remarks(precision, provider))
    assert bool(told) == bool(ort.remarks(precision, provider))
