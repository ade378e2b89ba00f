"""Names inside a graph, and the graph that also gives centrality: equal to dense float64, in every form of a bundle."""

import json

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from support import MODELS, relative_error

from infexport.bundle import open_bundle
from infexport.conversion.activations import activation_names, with_outputs
from infexport.conversion.image_model import ImageModel
from infexport.evaluation.recorded_checkpoint import load_recorded, recorded_checkpoint
from infexport.evaluation.synthetic_images import synthetic_image
from infexport.inference.runners.onnxruntime import OrtRunner
from infsa_ops import EPSILON
from infvit.checkpoint import build_network


def dense_centrality(bundle, images):
    """`[B, layers, H, N]` in float64, with the whole N×N matrix."""
    network = build_network(load_recorded(recorded_checkpoint(bundle), bundle)).double()
    preprocessing = bundle.manifest.preprocessing
    model = ImageModel(network, preprocessing.mean, preprocessing.std).eval()
    found = []
    with torch.no_grad(), model.observing():
        _, _, *taken = model(torch.from_numpy(images))
        for layer, tokens in zip(network.encoder.layers, taken, strict=True):
            q, k, _ = layer.attn.project(layer.norm1(tokens))
            width = q.shape[-1]
            if layer.attn.variant == "linear_infsa":
                energy = (q / width**0.5).norm(dim=-1)
                mean = (energy[..., None] * q / width**0.5).sum(-2) / (energy.sum(-1)[..., None] + EPSILON)
                scores = torch.relu((k / width**0.5) @ mean[..., None])[..., 0]
                found.append(scores / (scores.sum(-1, keepdim=True) + EPSILON))
                continue
            affinity = torch.relu(q @ k.transpose(-1, -2) / width)
            step = layer.attn.rho.reshape(-1, 1, 1) * affinity / (affinity.norm(dim=(-2, -1), keepdim=True) + EPSILON)
            power = total = step
            for _ in range(layer.attn.neumann_terms - 1):
                power = power @ step
                total = total + power
            found.append(total.sum(-2))
    return torch.stack(found, 1).numpy()


def images_of(bundle, height=48, width=40):
    patch = bundle.manifest.config.patch_size
    image = synthetic_image(height // patch * patch, width // patch * patch)
    return np.stack([image, image[::-1]])


@pytest.mark.parametrize("name", MODELS)
def test_the_golden_models_centrality(name, golden_bundle):
    bundle = open_bundle(golden_bundle(name))
    images = images_of(bundle)
    with OrtRunner(bundle, "cpu") as plain, OrtRunner(bundle, "cpu", centrality=True) as runner:
        expected, found = plain.run(images), runner.run(images)
    assert relative_error(found["centrality"], dense_centrality(bundle, images)) <= 5e-6
    for output in ("logits", "features"):
        assert relative_error(found[output], expected[output]) <= 1e-6


@pytest.mark.parametrize(
    ("options", "limit"),
    [
        (("--precision", "fp16"), 2e-3),
        (("--precision", "int8"), 5e-2),
        (("--no-fold",), 5e-6),
        (("--input", "float32"), 5e-6),
        (("--neumann-terms", "3"), 5e-6),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else "",
)
@pytest.mark.parametrize("name", ["digits-linear", "digits-pure"])
def test_in_every_form(name, options, limit, zoo_bundle):
    if "--neumann-terms" in options and name == "digits-linear":
        options = ()
    bundle = open_bundle(zoo_bundle(name, *options))
    images = images_of(bundle)
    with OrtRunner(bundle, "cpu", centrality=True) as runner:
        found = runner.run(images)["centrality"]
    assert relative_error(found, dense_centrality(bundle, images)) <= limit


def test_its_weights_are_the_graph_s_own(golden_bundle):
    bundle = golden_bundle("torchvision_pure")
    model = onnx.load(bundle / "centrality.onnx", load_external_data=False)
    outside = [t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    assert {entry.value for t in outside for entry in t.external_data if entry.key == "location"} == {"model.onnx.data"}
    assert (bundle / "centrality.onnx").stat().st_size < 300_000
    assert "centrality.onnx" in json.loads((bundle / "infexport.json").read_text())["files"]


def test_every_layer_has_names(golden_bundle):
    names = activation_names(ir.load(golden_bundle("torchvision_linear") / "model.onnx").graph)
    layers = [f"layers.{i}.{name}" for i in range(2) for name in
              ("tokens", "energy.mass", "energy.moment", "scores", "score.mass", "score.moment")]  # fmt: skip
    assert names == layers
    names = activation_names(ir.load(golden_bundle("torchvision_pure") / "model.onnx").graph)
    assert names == ["layers.0.tokens", "layers.0.mixed", "layers.1.tokens", "layers.1.squared_norm",
                     "layers.1.row.mass", "layers.1.row.moment"]  # fmt: skip


def test_a_copy_with_other_outputs_has_nothing_else(golden_bundle):
    model = ir.load(golden_bundle("torchvision_linear") / "model.onnx")
    before = len(list(model.graph))
    copy = with_outputs(model, ["layers.1.tokens"])
    assert [str(output.name) for output in copy.graph.outputs] == ["layers.1.tokens"]
    assert len(list(copy.graph)) < before == len(list(model.graph))
    with pytest.raises(KeyError):
        with_outputs(model, ["layers.7.tokens"])
