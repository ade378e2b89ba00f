"""Streaming changes nothing: the whole graph's answer, and float64's, for any chunk, size, variant and precision."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from support import GOLDEN, MODELS, ZOO, relative_error
from torch_stages import CONFIG, TorchStages, folded_network

from infexport.bundle import open_bundle
from infexport.evaluation.pytorch_reference import TorchRunner
from infexport.evaluation.recorded_checkpoint import load_recorded
from infexport.evaluation.synthetic_images import synthetic_image
from infexport.images.preprocess import fit
from infexport.images.strips import ArrayRows, Source
from infexport.inference.runners.onnxruntime import OrtRunner, OrtStages
from infexport.inference.streaming import stream
from infvit.centrality import katz, linear_scores
from infvit.fold import fold
from infvit.network import InfViT
from infvit.stages import make_stages

ZOO_MODELS = ["digits-linear", "digits-pure"]


def streamed(bundle, image, chunk=1024, **options):
    source = Source(ArrayRows(image), bundle.manifest.config.patch_size, "pad")
    with OrtStages(bundle, "cpu") as runner:
        return stream(bundle, runner, source, chunk=chunk, **options)


def completed(bundle, image):
    transform = bundle.manifest.preprocessing.transform
    return fit(image, bundle.manifest.config.patch_size, "native", transform, "pad").pixels[None]


def whole(bundle, image):
    with OrtRunner(bundle, "cpu") as runner:
        return runner.run(completed(bundle, image))


def exact(bundle, checkpoint, image):
    preprocessing = bundle.manifest.preprocessing
    loaded = load_recorded(checkpoint, bundle)
    with TorchRunner(loaded, preprocessing.mean, preprocessing.std, torch.float64) as runner:
        return runner.run(completed(bundle, image))["logits"]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("size", [(32, 32), (20, 53)], ids=str)
def test_every_chunk_gives_the_whole_graph_s_answer(name, size, golden_bundle):
    bundle, image = open_bundle(golden_bundle(name)), synthetic_image(*size)
    expected, truth = whole(bundle, image), exact(bundle, GOLDEN / f"{name}.safetensors", image)
    tokens = Source(ArrayRows(image), bundle.manifest.config.patch_size, "pad").tokens
    for chunk in (1, 7, 256, 1024, tokens):
        found = streamed(bundle, image, chunk)
        assert relative_error(found.logits, expected["logits"][0]) <= 1e-5, chunk
        assert relative_error(found.features, expected["features"][0]) <= 1e-5, chunk
        assert relative_error(found.logits, truth[0]) <= 5e-6, chunk


@pytest.mark.parametrize("name", ["torchvision_linear", "torchvision_pure"])
@pytest.mark.parametrize("size", [(512, 512), (100, 1000)], ids=str)
def test_images_of_many_chunks(name, size, golden_bundle):
    bundle, image = open_bundle(golden_bundle(name)), synthetic_image(*size)
    expected, truth = whole(bundle, image), exact(bundle, GOLDEN / f"{name}.safetensors", image)
    for chunk in (256, 1024):
        found = streamed(bundle, image, chunk)
        assert relative_error(found.logits, expected["logits"][0]) <= 1e-5, chunk
        assert relative_error(found.logits, truth[0]) <= 5e-6, chunk


@pytest.fixture(scope="module")
def converted(golden_bundle, zoo_bundle):
    """A golden model, or one of the zoo, converted with other options: name, options → bundle."""
    return lambda name, *options: open_bundle((zoo_bundle if name in ZOO_MODELS else golden_bundle)(name, *options))


@pytest.mark.parametrize("name", ["reference_linear", "digits-pure"])
def test_normalised_pixels(name, converted):
    bundle, image = converted(name, "--input", "float32"), synthetic_image(40, 72)
    assert relative_error(streamed(bundle, image, 9).logits, whole(bundle, image)["logits"][0]) <= 1e-5


def test_several_terms_of_the_neumann_series(converted):
    bundle, image = converted("torchvision_pure", "--neumann-terms", "3"), synthetic_image(60, 76)
    truth = exact(bundle, GOLDEN / "torchvision_pure.safetensors", image)
    one = whole(converted("torchvision_pure"), image)["logits"]
    assert relative_error(one, truth) > 1e-3  # the terms matter
    for chunk in (3, 8, 1024):
        assert relative_error(streamed(bundle, image, chunk).logits, truth[0]) <= 5e-6, chunk


def test_terms_of_a_layer_share_a_graph(converted):
    stages = converted("torchvision_pure", "--neumann-terms", "3").manifest.stages
    layers = converted("torchvision_pure").manifest.config.depth
    for kind in ("again", "columnsagain"):
        again = [stage.graph for stage in stages if stage.graph.endswith(f"-{kind}.onnx")]
        assert len(again) == 2 * layers
        assert len(set(again)) == layers
    assert len({stage.graph for stage in stages if stage.graph.endswith("attend.onnx")}) == 1


@pytest.mark.parametrize("name", ZOO_MODELS)
@pytest.mark.parametrize(("precision", "limit"), [("fp16", 2e-3), ("int8", 3e-2)])
def test_lower_precision(name, precision, limit, converted):
    bundle, image = converted(name, "--precision", precision), synthetic_image(64, 88)
    truth = exact(bundle, ZOO / name, image)
    for chunk in (7, 1024):
        assert relative_error(streamed(bundle, image, chunk).logits, truth[0]) <= limit, chunk


def test_calibrated_ranges_do_not_depend_on_the_chunk(converted):
    bundle = converted("digits-linear", "--precision", "int8", "--calibrate", ZOO / "digits-held-out")
    image = synthetic_image(64, 80)
    expected = whole(bundle, image)["logits"][0]
    for chunk in (7, 1024):
        # a value on the edge between two steps may fall to either side
        assert relative_error(streamed(bundle, image, chunk).logits, expected) <= 5e-3


@pytest.mark.parametrize("name", ["torchvision_linear", "torchvision_pure"])
def test_tokens_kept_in_float16(name, golden_bundle):
    bundle, image = open_bundle(golden_bundle(name)), synthetic_image(64, 80)
    found, expected = streamed(bundle, image, 16, token_dtype="float16"), whole(bundle, image)["logits"][0]
    assert 1e-5 < found.rounding < 2**-11
    assert 1e-7 < relative_error(found.logits, expected) < 4 * 2**-11
    assert streamed(bundle, image, 16).rounding == 0


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("name", ZOO_MODELS)
def test_weights_lie_in_the_whole_graph_s_file(name, precision, converted):
    """Of a trained network, of whose weights none is a constant."""
    bundle = converted(name, *(["--precision", precision] if precision != "fp32" else []))
    assert {path.suffix for path in bundle.path.iterdir()} == {".onnx", ".data", ".json"}
    data = (bundle.path / "model.onnx.data").stat().st_size
    graphs, inside = {stage.graph for stage in bundle.manifest.stages}, 0
    for graph in graphs:
        for tensor in onnx.load(bundle.path / graph, load_external_data=False).graph.initializer:
            if tensor.data_location != onnx.TensorProto.EXTERNAL:
                inside += tensor.ByteSize()
                assert np.prod(tensor.dims) <= 4 * 128, (graph, tensor.name)
    assert inside < 0.05 * data


def test_layers_have_their_own_weights(infexport, tmp_path):
    """Equal layers share a graph while they are exported; norms that are equal at first are not the same."""
    torch.manual_seed(0)
    network = InfViT(dataclasses.replace(CONFIG, depth=4))  # every norm 1 and 0, every bias as it was initialised
    with torch.no_grad():
        network.encoder.layers[2].norm2.weight.mul_(3)
        network.encoder.layers[1].attn.rho_logit.fill_(-1)
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    options = ("--variant", "linear_infsa", "--num-heads", 2)
    infexport("convert", "checkpoint", tmp_path / "model.safetensors", *options, "-o", tmp_path / "bundle")
    bundle, image = open_bundle(tmp_path / "bundle"), synthetic_image(24, 48)
    truth = exact(bundle, tmp_path / "model.safetensors", image)
    assert relative_error(streamed(bundle, image, 5).logits, truth[0]) <= 5e-6


# The stages themselves, in torch: any shape of network, no ONNX

SHAPES = [
    {}, {"depth": 1}, {"qkv_bias": False}, {"attention_dense": True, "pooler": True}, {"rho_per_head": True},
    {"variant": "pure_infsa"}, {"variant": "pure_infsa", "depth": 1}, {"variant": "pure_infsa", "neumann_terms": 2},
    {"variant": "pure_infsa", "neumann_terms": 4, "depth": 1, "rho_per_head": True},
]  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(
    shape=st.sampled_from(SHAPES), height=st.integers(1, 60), width=st.integers(1, 60), chunk=st.integers(1, 80),
    seed=st.integers(0, 1000),
)  # fmt: skip
def test_chunking_changes_nothing(shape, height, width, chunk, seed):
    from infexport.inference.streaming.centrality import Maps
    from infexport.inference.streaming.driver import Driver, Tokens, make_layout, select_stages
    from infexport.inference.streaming.token_store import MemoryStore

    network, folded = folded_network(seed, **shape)
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    runner, source = TorchStages(folded), Source(ArrayRows(image), 8, "pad")
    for centrality in (False, True):
        stages = select_stages(runner.stages, centrality)
        layout = make_layout(stages, range(source.tokens), chunk, bool(seed % 2), centrality)
        heads = {"centrality": network.config.num_heads}
        tokens = Tokens(layout, lambda name, rows, heads=heads: MemoryStore(rows, heads.get(name, 16), np.float32))
        maps = Maps(stages, network.config, source.grid, None, {})
        observe = maps if centrality else lambda stage, tokens, sums: None
        found = Driver(stages, runner, source, tokens, chunk, observe=observe).run()["logits"]
        padded = np.pad(image, ((0, -height % 8), (0, -width % 8), (0, 0)), mode="edge")[None]
        with torch.no_grad():
            expected = folded(torch.from_numpy(padded).float())
        assert relative_error(found, expected) <= 2e-5
    pixels = (torch.from_numpy(padded).permute(0, 3, 1, 2) / 255 - MEAN) / STD
    truth = centrality_of(network.double(), pixels.double())
    result = maps.result()
    found = np.concatenate([result.class_token[..., None], result.cells.reshape(*truth.shape[:2], -1)], -1)
    assert np.linalg.norm(found - truth.numpy()) <= 2e-4 * truth.norm()  # which may be 0


MEAN, STD = (torch.tensor(x)[:, None, None] for x in ((0.5, 0.4, 0.6), (0.2, 0.3, 0.25)))


def centrality_of(network, pixels):
    """`[layers, heads, N]`, by the operators, of tokens that are all there at once."""
    found = []
    with torch.no_grad():
        tokens = network.embed(pixels)
        for layer in network.encoder.layers:
            q, k, _ = layer.attn.project(layer.norm1(tokens))
            terms = layer.attn.neumann_terms
            linear = layer.attn.variant == "linear_infsa"
            found.append(linear_scores(q, k) if linear else katz(q, k, layer.attn.rho, terms))
            tokens = layer(tokens)
    return torch.cat(found)


def test_spare_rows_are_never_more_than_rows():
    from infexport.inference.streaming.driver import make_layout

    stages = TorchStages(fold(InfViT(CONFIG))).stages
    assert make_layout(stages, range(100), 100_000, resumable=True).spare == {"tokens": 100}
    assert make_layout(stages, range(100_000), 100, resumable=True).spare == {"tokens": 1600}
    assert make_layout(stages, range(100_000), 100, resumable=False).spare == {"tokens": 0}


def test_a_network_that_is_not_folded_has_no_sweeps():
    with pytest.raises(ValueError, match="folded"):
        make_stages(InfViT(CONFIG), torch.nn.Identity())
