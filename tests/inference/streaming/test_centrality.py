"""Centrality of streamed images: what the whole graph gives, at any chunk, summed up in cells where that is much."""

import numpy as np
import pytest
from support import MODELS, relative_error

from infexport.bundle import open_bundle
from infexport.evaluation.synthetic_images import synthetic_image
from infexport.images.preprocess import fit
from infexport.images.strips import ArrayRows, Source
from infexport.inference import centrality
from infexport.inference.centrality import summed
from infexport.inference.runners.onnxruntime import OrtRunner, OrtStages
from infexport.inference.streaming import stream


def streamed(bundle, image, chunk):
    source = Source(ArrayRows(image), bundle.manifest.config.patch_size, "pad")
    with OrtStages(bundle, "cpu") as runner:
        return stream(bundle, runner, source, chunk=chunk, centrality=True)


def whole(bundle, image):
    fitted = fit(image, bundle.manifest.config.patch_size, "native", bundle.manifest.preprocessing.transform, "pad")
    with OrtRunner(bundle, "cpu", centrality=True) as runner:
        return runner.run(fitted.pixels[None])["centrality"][0]


@pytest.mark.parametrize("name", MODELS)
def test_every_chunk_gives_the_whole_graph_s(name, golden_bundle):
    bundle, image = open_bundle(golden_bundle(name)), synthetic_image(100, 130)
    expected = whole(bundle, image)
    for chunk in (7, 1024):
        found = streamed(bundle, image, chunk).centrality
        assert found.step == 1
        assert relative_error(found.cells.reshape(*found.cells.shape[:2], -1), expected[..., 1:]) <= 1e-5, chunk
        assert relative_error(found.class_token, expected[..., 0]) <= 1e-5, chunk


@pytest.mark.parametrize("name", ["torchvision_linear", "torchvision_pure"])
def test_where_it_is_much_it_is_summed_up(name, golden_bundle, monkeypatch):
    bundle, image = open_bundle(golden_bundle(name)), synthetic_image(100, 133)
    every = streamed(bundle, image, 64).centrality
    config = bundle.manifest.config
    monkeypatch.setattr(centrality, "MOST_NUMBERS", config.depth * config.num_heads * 30)
    found = streamed(bundle, image, 64).centrality
    assert found.step > 1
    assert found.cells[0, 0].size <= 30
    rows = every.cells.transpose(2, 3, 0, 1).reshape(*every.grid, -1)
    cells = np.stack([summed(rows[i : i + found.step], found.step) for i in range(0, len(rows), found.step)])
    assert relative_error(found.cells.transpose(2, 3, 0, 1).reshape(cells.shape), cells) <= 1e-6
    assert found.shares.sum() == pytest.approx(every.shares.sum(), rel=1e-5)


def test_not_asked_for_it_costs_nothing(golden_bundle):
    bundle, image = open_bundle(golden_bundle("torchvision_pure")), synthetic_image(100, 133)
    called = []

    class Counting(OrtStages):
        def run(self, stage, feeds):
            called.append(stage.graph)
            return super().run(stage, feeds)

    source = Source(ArrayRows(image), bundle.manifest.config.patch_size, "pad")
    with Counting(bundle, "cpu") as runner:
        assert stream(bundle, runner, source, chunk=64).centrality is None
    assert called
    assert not any("columns" in graph for graph in called)


def test_epsilon_is_the_operators():
    """Streaming needs no torch, so the number stands in two places."""
    import infsa_ops
    from infexport.inference.streaming.centrality import EPSILON

    assert EPSILON == infsa_ops.EPSILON
