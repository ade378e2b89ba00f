"""Bundles that an earlier infexport wrote open, and answer as they did.

`early.tar.xz` holds checkpoints of two layers, their bundles, an image and the answers, all made at commit d3a280b
(manifest format 3).
"""

import tarfile
from pathlib import Path

import numpy as np
import pytest
from support import relative_error

from infexport.bundle import open_bundle
from infexport.inference.predictor import Predictor


@pytest.fixture(scope="module")
def early(tmp_path_factory):
    folder = tmp_path_factory.mktemp("early")
    with tarfile.open(Path(__file__).with_name("early.tar.xz")) as archive:
        archive.extractall(folder, filter="data")
    return folder / "early"


def answers(bundle, image, execution):
    options = {"chunk": 4} if execution == "stream" else {}
    predictor = Predictor(bundle, size="native", execution=execution, threads=1, centrality=True, **options)
    (row,) = predictor.predict([image])
    return {"logits": row.logits, "features": row.features, "centrality": row.centrality.cells}


@pytest.mark.parametrize("execution", ["whole", "stream"])
@pytest.mark.parametrize("name", ["linear", "linear-fp16", "linear-int8", "pure", "pure-terms"])
def test_an_early_bundle_answers_as_it_did(name, execution, early):
    assert open_bundle(early / name).verified
    stored = np.load(early / "answers.npz")
    # another processor's kernels round otherwise, and in int8 a value may fall on the other side of a step
    limit = 1e-2 if name == "linear-int8" else 1e-5
    for kind, values in answers(early / name, early / "image.png", execution).items():
        assert relative_error(values, stored[f"{name} {execution} {kind}"]) <= limit, kind


@pytest.mark.slow
@pytest.mark.parametrize("name", ["linear", "pure"])
def test_a_conversion_answers_bit_for_bit_as_an_early_bundle(name, early, infexport, tmp_path):
    infexport("convert", "checkpoint", early / f"{name}_infsa", "-o", tmp_path / "b")
    for execution in ("whole", "stream"):
        then, now = (answers(bundle, early / "image.png", execution) for bundle in (early / name, tmp_path / "b"))
        for kind, values in then.items():
            assert np.array_equal(values, now[kind]), (execution, kind)
