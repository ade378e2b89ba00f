"""fp16 and int8: what is rounded, what is not, and how far the answers are from float64."""

from __future__ import annotations

import copy
import dataclasses
import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto
from PIL import Image
from safetensors.numpy import load_file
from safetensors.torch import save_file
from support import GOLDEN, MODELS, ZOO, relative_error
from torch import nn

from infexport.image_model import ImageModel
from infexport.int8_linear import Int8Linear, int8_linear, quantization
from infexport.precision import HalfLinear, to_fp16, to_int8, token_layers
from infexport.runners import ort
from infvit.checkpoint import build_network, load_checkpoint
from infvit.config import InfViTConfig
from infvit.fold import fold
from infvit.network import InfViT

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CONFIG = InfViTConfig(
    variant="linear_infsa", image_size=32, patch_size=8, depth=3, embed_dim=64, num_heads=4, mlp_dim=96,
    num_classes=10, norm_eps=1e-6,
)  # fmt: skip


def image_model(takes="uint8", folded=True, **changes) -> ImageModel:
    torch.manual_seed(0)
    network = InfViT(dataclasses.replace(CONFIG, **changes)).eval()
    return ImageModel(fold(network) if folded else network, MEAN, STD, takes, folded).eval()


def images(count=4, height=32, width=48, seed=0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, height, width, 3), generator=generator, dtype=torch.uint8)


def names(model: ImageModel, kind: type) -> list[str]:
    return [name.removeprefix("network.") for name, module in model.named_modules() if isinstance(module, kind)]


# Which layers


LINEAR = ["attn.attention.q_proj", "ff.0", "ff.3"]
PURE = ["attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.out_proj", "ff.0", "ff.3"]
LAST = {"linear_infsa": ["q_proj"], "pure_infsa": ["q_proj", "k_proj"]}


@pytest.mark.parametrize("kind", [HalfLinear, Int8Linear])
@pytest.mark.parametrize(("variant", "layer"), [("linear_infsa", LINEAR), ("pure_infsa", PURE)])
def test_layers_that_meet_every_token(kind, variant, layer):
    model = image_model(variant=variant)
    lower = to_fp16(model) if kind is HalfLinear else to_int8(model)
    expected = ["patch_embed.proj"] if kind is HalfLinear else []
    expected += [f"encoder.layers.{i}.{name}" for i in (0, 1) for name in layer]
    expected += [f"encoder.layers.2.layer.attn.attention.{name}" for name in LAST[variant]]
    assert sorted(names(lower, kind)) == sorted(expected)
    assert not names(model, kind)  # the model stays as it was


def test_ranges_are_those_of_all_images():
    model = image_model()
    observed = token_layers(model, images().split(1))
    first = model.network.encoder.layers[0]
    with torch.no_grad():
        tokens = first.norm1(model.network.embed(images().float()))
    met = observed[first.attn.attention.q_proj]
    assert (met.low, met.high) == pytest.approx((float(tokens.min()), float(tokens.max())), rel=1e-6)
    torch.testing.assert_close(met.mean, tokens.double().mean((0, 1)), rtol=1e-4, atol=1e-6)


# int8


def test_quantization_holds_zero_and_both_ends():
    scale, zero_point = quantization(torch.tensor(-1.0), torch.tensor(3.0))
    assert zero_point.dtype == torch.uint8
    steps = torch.arange(256) - int(zero_point)
    assert float(steps.min() * scale) == pytest.approx(-1, abs=float(scale) / 2)
    assert float(steps.max() * scale) == pytest.approx(3, abs=float(scale) / 2)
    assert quantization(torch.tensor(0.0), torch.tensor(0.0))[0] == 1  # nothing but zeros


@pytest.mark.parametrize("range_", [None, (-4.0, 4.0)])
@pytest.mark.parametrize("bias", [True, False])
def test_int8_linear_is_near_the_linear_it_replaces(range_, bias):
    torch.manual_seed(0)
    linear, x = nn.Linear(256, 64, bias=bias), torch.randn(3, 50, 256).clamp(-4, 4)
    with torch.no_grad():
        lower = Int8Linear(linear, range_)
        assert 1e-3 < relative_error(lower(x), linear(x)) < 2e-2
        exact = nn.functional.linear(x, (lower.weight * lower.weight_scale).T, linear.bias)
    # what is left is the rounding of x: at most half a step in every product
    step = 8 / 255 if range_ else float(x.max() - x.min()) / 255
    bound = step / 2 * (lower.weight.abs() * lower.weight_scale).sum(0)
    assert ((lower(x) - exact).abs() <= 1.01 * bound + 1e-5).all()


def test_the_average_input_keeps_its_output():
    torch.manual_seed(0)
    linear, mean = nn.Linear(64, 32), torch.randn(64, dtype=torch.float64)
    lower = Int8Linear(linear, (-4.0, 4.0), mean)
    exact = mean.float() @ (lower.weight * lower.weight_scale) + lower.bias
    torch.testing.assert_close(exact, linear(mean.float()), rtol=1e-5, atol=1e-5)


def test_weights_of_zero_stay_zero():
    linear = nn.Linear(4, 3)
    nn.init.zeros_(linear.weight)
    torch.testing.assert_close(Int8Linear(linear, None)(torch.ones(2, 4)), linear.bias.expand(2, 3))


def test_values_out_of_a_fixed_range_saturate():
    linear = nn.Linear(1, 1, bias=False)
    nn.init.ones_(linear.weight)
    lower = Int8Linear(linear, (-1.0, 1.0))
    with torch.no_grad():
        assert lower(torch.tensor([[5.0], [-5.0]])).flatten().tolist() == pytest.approx([1, -1], abs=0.01)


def test_torch_knows_the_shapes():
    lower = Int8Linear(nn.Linear(6, 5), (-1.0, 1.0))
    arguments = (torch.randn(2, 3, 6), lower.weight, lower.weight_scale, lower.bias.detach())
    for ranges in ((None, None), (lower.scale, lower.zero_point)):
        torch.library.opcheck(int8_linear, (*arguments, *ranges))


@pytest.mark.parametrize("calibrated", [False, True])
def test_a_fixed_range_makes_an_image_independent_of_its_batch(calibrated):
    model = to_int8(image_model(), images(8, seed=1).split(2) if calibrated else None)
    batch = images()
    with torch.no_grad():
        alone, together = model(batch[:1])[0], model(batch)[0][:1]
    same = torch.allclose(alone, together, rtol=1e-5, atol=1e-6)
    assert same == calibrated


# In ONNX


@pytest.fixture(scope="module")
def convert(infexport, tmp_path_factory):
    """A bundle of a model of random weights: (options, config changes) → the folder."""

    def make(*options, **changes):
        folder = tmp_path_factory.mktemp("precision")
        torch.manual_seed(0)
        network = InfViT(dataclasses.replace(CONFIG, **changes))
        save_file(network.state_dict(), folder / "model.safetensors")
        told = ["--variant", network.config.variant, "--num-heads", network.config.num_heads, "--norm-eps", 1e-6]
        infexport("convert", "checkpoint", folder / "model.safetensors", *told, *options, "-o", folder / "bundle")
        return folder / "bundle"

    return make


def run(bundle, batch) -> np.ndarray:
    session = onnxruntime.InferenceSession(bundle / "model.onnx", providers=["CPUExecutionProvider"])
    return session.run(["logits"], {session.get_inputs()[0].name: batch.numpy()})[0]


@pytest.mark.parametrize("variant", ["linear_infsa", "pure_infsa"])
@pytest.mark.parametrize("precision", ["fp16", "int8", "calibrated"])
def test_the_graph_computes_what_its_torch_twin_does(variant, precision, convert, tmp_path):
    options = ["--precision", "fp16" if precision == "fp16" else "int8"]
    calibration = images(4, 32, 32, seed=1)
    if precision == "calibrated":
        for i, image in enumerate(calibration):
            Image.fromarray(image.numpy()).save(tmp_path / f"{i}.png")
        options += ["--calibrate", tmp_path]
    bundle = convert(*options, variant=variant)
    model = image_model(variant=variant)
    with torch.no_grad():
        if precision == "fp16":
            twin = to_fp16(model)(images())[0]
        else:
            twin = to_int8(model, calibration.split(1) if precision == "calibrated" else None)(images())[0]
    # int8 may round one value to the other side of a half
    assert relative_error(run(bundle, images()), twin) <= (1e-3 if precision == "fp16" else 5e-3)


def types(bundle) -> tuple[onnx.ModelProto, dict[str, int]]:
    """The model, and the element type of every value in it."""
    model = onnx.shape_inference.infer_shapes(onnx.load(bundle / "model.onnx"), data_prop=True)
    graph = model.graph
    found = {info.name: info.type.tensor_type.elem_type for info in (*graph.value_info, *graph.input, *graph.output)}
    return model, found | {tensor.name: tensor.data_type for tensor in graph.initializer}


@pytest.mark.parametrize("variant", ["linear_infsa", "pure_infsa"])
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_norms_energies_states_and_sums_are_float32(variant, precision, convert):
    model, type_of = types(convert("--precision", precision, variant=variant))
    kinds = {node.op_type for node in model.graph.node}
    exact = {"LayerNormalization", "ReduceL2", "LinearInfSAStateUpdate", "Add", "Gelu", "Softmax", "Sqrt", "Tanh"}
    for node in model.graph.node:
        if node.op_type in exact:
            found = {type_of.get(name) for name in (*node.input, *node.output) if name}
            assert found <= {TensorProto.FLOAT, TensorProto.INT64, None}, f"{node.op_type} {node.name}"
    assert {"LayerNormalization", "LinearInfSAStateUpdate"} <= kinds
    assert ("MatMulInteger" in kinds) == (precision == "int8")
    lower = TensorProto.FLOAT16 if precision == "fp16" else TensorProto.INT8
    weights = [t for t in model.graph.initializer if t.data_type == lower and len(t.dims) == 2]
    assert len(weights) == {"linear_infsa": 7, "pure_infsa": 14}[variant] + (precision == "fp16")


def test_int8_products_are_fused_in_onnx_runtime(convert, tmp_path):
    """Unfused, the sums would go through memory as int32 and again as float32."""
    bundle = convert("--precision", "int8")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    onnxruntime.InferenceSession(bundle / "model.onnx", options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(tmp_path / "optimised.onnx", load_external_data=False).graph.node]
    assert kinds.count("DynamicQuantizeMatMul") + kinds.count("MatMulIntegerToFloat") == 7
    assert not {"MatMulInteger", "DequantizeLinear"} & set(kinds)


# Fidelity


@pytest.mark.parametrize("name", MODELS)
def test_golden_models(name):
    checkpoint = load_checkpoint(GOLDEN / f"{name}.safetensors", config_file=GOLDEN / f"{name}.json")
    io = load_file(GOLDEN / f"{name}.io.safetensors")
    model = ImageModel(fold(build_network(checkpoint)), MEAN, STD, "uint8", True).eval()
    batch = torch.from_numpy(io["images"])
    with torch.no_grad():
        assert relative_error(to_fp16(model)(batch)[0], io["logits_f64"]) <= 2e-3
        assert relative_error(to_int8(model)(batch)[0], io["logits_f64"]) <= 3e-2


@pytest.fixture(scope="module")
def digits(train_digits, tmp_path_factory):
    """A folder of 512 training digits to calibrate with, one of the held-out ones, and these as an array."""
    train, _, held_out, _ = train_digits.digits()
    folders = []
    for kind, array in (("train", train[:512]), ("held-out", held_out)):
        folders.append(tmp_path_factory.mktemp(kind))
        for i, image in enumerate(array):
            Image.fromarray(image).save(folders[-1] / f"{i:03}.png")
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
def test_held_out_digits(name, options, limit, typical, infexport, digits, train_digits, tmp_path):
    train, held_out, pixels = digits
    calibrate = [train] if "--calibrate" in options else []
    infexport("convert", "checkpoint", ZOO / name, "--precision", *options, *calibrate, "-o", tmp_path / "b")
    infexport("run-engine", tmp_path / "b", held_out, "-o", tmp_path / "o.npz", "--batch-size", 50)
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


# Extremes


MANY = {"image_size": 64, "patch_size": 2, "depth": 2, "embed_dim": 16, "num_heads": 2, "mlp_dim": 32}


@pytest.mark.parametrize("folded", [True, False], ids=["folded", "unfolded"])
def test_fp16_at_332k_tokens(folded, convert):
    """9216² pixels' worth of tokens at patch 16: plain float16 sums overflow or lose 1/N."""
    bundle = convert("--precision", "fp16", *([] if folded else ["--no-fold"]), **MANY)
    batch = images(1, 1152, 1152)
    with torch.no_grad():
        truth = image_model(folded=False, **MANY).double()(batch)[0]
        twin = to_fp16(image_model(folded=folded, **MANY))(batch)[0]
    for logits in (run(bundle, batch), twin.numpy()):
        assert np.isfinite(logits).all()
        assert relative_error(logits, truth) <= 2e-3


@pytest.mark.parametrize("variant", ["linear_infsa", "pure_infsa"])
def test_fp16_with_massive_activations(variant, convert):
    """A few channels thousands of times larger than the rest, in the residual stream and inside the MLP."""
    model = image_model(variant=variant)
    with torch.no_grad():
        for layer in model.network.encoder.layers[:-1]:
            layer.ff[0].bias[5] += 3000
            layer.ff[3].weight[9, 5] += 5
            layer.ff[3].bias[11] += 1e5  # above what float16 holds
        truth = copy.deepcopy(model).double()(images())[0]
        logits = to_fp16(model)(images())[0]
        residual = model.network.encoder.layers[0](model.network.embed(images().float()))
    assert residual.max() > torch.finfo(torch.float16).max
    assert torch.isfinite(logits).all()
    assert relative_error(logits, truth) <= 2e-3


# What is said


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


def test_a_bundle_says_how_it_computes(infexport, tmp_path):
    pictures = ZOO / "digits-held-out"
    for options, told in (
        (["int8"], "int8, ranges of activations found at run time"),
        (["int8", "--calibrate", pictures], "int8, ranges of activations fixed by 20 images"),
        (["fp16"], "fp16, folded"),
    ):
        bundle = tmp_path / "-".join(map(str, options[:2]))
        infexport("convert", "checkpoint", ZOO / "digits-linear", "--precision", *options, "-o", bundle)
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
        ("int8", "cpu", "avx2", "no int8 dot products"),
        ("int8", "cpu", "avx2 avx512_vnni", ""),
        ("int8", "cpu", "avx2 avx_vnni", ""),
    ],
)
def test_remarks(precision, provider, flags, told, tmp_path, monkeypatch):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"model name : some\nflags : fpu {flags}\n")
    monkeypatch.setattr(ort, "CPUINFO", cpuinfo)
    assert told in " ".join(ort.remarks(precision, provider))
    assert bool(told) == bool(ort.remarks(precision, provider))
