"""The Python API: paths or arrays in, a dict of arrays out."""

from __future__ import annotations

import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from support import ZOO

from infexport import Predictor
from infexport.bundle import open_bundle
from infexport.errors import InfexportError
from infexport.evaluation.synthetic_images import synthetic_image
from infexport.inference.options import InferenceOptions
from infexport.inference.prediction import Failure, Prediction
from infexport.inference.runners.onnxruntime import OrtRunner

DIGITS = sorted((ZOO / "digits-held-out").glob("*.png"))


@pytest.fixture(scope="module")
def bundle(zoo_bundle):
    return zoo_bundle("digits-linear")


def pixels(file):
    return np.array(Image.open(file).convert("RGB"))


def test_what_it_says_is_what_run_engine_says(infexport, bundle, tmp_path):
    found = Predictor(bundle, batch_size=4)(DIGITS)
    infexport("run-engine", bundle, *DIGITS, "--batch-size", 4, "--features", "-o", tmp_path / "out.npz")
    with np.load(tmp_path / "out.npz") as expected:
        assert np.array_equal(found["logits"], expected["logits"])
        assert np.array_equal(found["features"], expected["features"])
        assert np.array_equal(found["file"], expected["files"])
    assert found["label"].tolist() == [file.name[0] for file in DIGITS]
    assert found["index"].tolist() == [int(file.name[0]) for file in DIGITS]
    assert np.array_equal(found["index"], found["logits"].argmax(1))
    exact = np.exp(found["logits"].astype(np.float64))
    assert np.allclose(found["probability"], (exact / exact.sum(1, keepdims=True)).max(1), rtol=1e-6)
    assert set(found["execution"]) == {"whole"}
    assert not any(found["error"])


def test_paths_texts_arrays_a_stack_and_a_table_are_the_same(bundle):
    predictor = Predictor(bundle)
    expected = predictor(DIGITS)["logits"]
    images = [pixels(file) for file in DIGITS]
    batches = [[str(file) for file in DIGITS], images, np.stack(images), {"file": DIGITS}, {"image": np.stack(images)}]
    for batch in batches:
        assert np.array_equal(predictor(batch)["logits"], expected)
    found = predictor({"image": images, "id": np.arange(len(images))})
    assert found["id"].tolist() == list(range(len(images)))
    assert "image" not in found
    assert found["file"][3] == "image 3"


def test_columns_of_its_own_are_not_lost(bundle):
    images = [pixels(DIGITS[0])]
    predictor = Predictor(bundle)
    assert predictor({"image": images, "file": ["seven.png"]})["file"] == ["seven.png"]
    with pytest.raises(InfexportError, match="the answer has, too: index, label") as caught:
        predictor({"image": images, "label": [7], "index": [0]})
    assert "true_label" in caught.value.hint


def test_one_path_is_one_image(bundle):
    predictor = Predictor(bundle)
    assert predictor(DIGITS[0])["label"].tolist() == predictor(str(DIGITS[0]))["label"].tolist() == [DIGITS[0].name[0]]


def test_a_row_for_every_image_whatever_it_is(bundle, tmp_path):
    (tmp_path / "bad.png").write_text("no image")
    batch = [DIGITS[0], tmp_path / "bad.png", np.zeros((8, 8)), tmp_path / "gone.png", pixels(DIGITS[1])]
    found = Predictor(bundle, batch_size=2)(batch)
    assert {len(column) for column in found.values()} == {5}
    assert [bool(error) for error in found["error"]] == [False, True, True, True, False]
    assert found["error"][2] == "an array that is no image"
    assert found["error_details"][2] == "received float64 [8, 8], expected uint8 [height, width, 3]"
    assert found["error_hint"][3].startswith("check that the file exists")
    assert found["index"].tolist()[1:4] == [-1, -1, -1]
    assert np.isnan(found["logits"]).all(1).tolist() == [False, True, True, True, False]
    assert found["grid"][1].tolist() == [0, 0]
    empty = Predictor(bundle)([])
    assert empty["logits"].shape == (0, 10)
    assert empty["logits"].dtype == np.float32
    assert empty["grid"].shape == (0, 2)


def test_it_is_opened_by_the_first_call_and_once(bundle, monkeypatch):
    opened = []
    enter = OrtRunner.__enter__
    monkeypatch.setattr(OrtRunner, "__enter__", lambda self: opened.append(self) or enter(self))
    predictor = Predictor(bundle)
    predictor = pickle.loads(pickle.dumps(predictor))
    assert not opened
    first = predictor(DIGITS[:1])
    second = predictor(DIGITS[:1])
    assert len(opened) == 1
    copy = pickle.loads(pickle.dumps(predictor))
    assert vars(copy).keys() == vars(Predictor(bundle)).keys()
    assert np.array_equal(copy(DIGITS[:1])["logits"], first["logits"])
    assert np.array_equal(second["logits"], first["logits"])
    with predictor:
        pass
    assert np.array_equal(predictor(DIGITS[:1])["logits"], first["logits"])
    assert len(opened) == 3


def test_no_bundle_is_an_error_of_the_first_call(tmp_path):
    predictor = Predictor(tmp_path)
    with pytest.raises(InfexportError, match="not a bundle"):
        predictor(DIGITS)


def test_a_batch_without_images(bundle):
    with pytest.raises(InfexportError, match="a batch without images") as caught:
        Predictor(bundle)({"id": [1], "name": ["a"]})
    assert caught.value.details == "received columns id, name, expected image or file"


def test_the_columns_of_a_batch_are_no_images(bundle):
    """`predict` takes none; their names would be taken for files."""
    with pytest.raises(InfexportError, match="no images") as caught:
        Predictor(bundle).predict({"file": DIGITS})
    assert caught.value.details.startswith("received dict, expected a list")


def test_centrality_and_streaming(bundle, tmp_path):
    image = synthetic_image(200, 120)
    with Predictor(bundle, size="native", execution="stream", chunk=64, centrality=True) as predictor:
        row, failure = predictor.predict([image, tmp_path / "gone.png"])
    assert isinstance(row, Prediction)
    assert isinstance(failure, Failure)
    assert row.execution == "stream, tokens in memory"
    config = open_bundle(bundle).manifest.config
    assert row.centrality.cells.shape == (config.depth, config.num_heads, 25, 15)


def test_pixels_with_tokens_on_disk_go_on_as_files_do(bundle, tmp_path):
    """The scratch folder of an image in memory is known by its pixels."""
    image = synthetic_image(64, 64)
    with Predictor(bundle, size="native", execution="stream", scratch=tmp_path) as predictor:
        first, second = predictor([image, image.copy()])["logits"]
    assert np.array_equal(first, second)
    assert not list(tmp_path.iterdir())


def test_neither_torch_nor_onnx_is_needed(bundle):
    code = f"""
import sys
import infexport
print(infexport.Predictor({str(bundle)!r})([{str(DIGITS[0])!r}])["label"][0])
print(sorted({{"torch", "onnx", "ray", "fsspec", "pyarrow"}} & sys.modules.keys()))
"""
    told = subprocess.check_output([sys.executable, "-c", code], text=True).split("\n")
    assert told[:2] == [DIGITS[0].name[0], "[]"]


def test_another_bundle_than_was_asked_for_is_refused(zoo_bundle, infexport, tmp_path):
    """By the digest that somebody was told; and elsewhere a pickled predictor runs no other one."""
    bundle, other = (shutil.copytree(zoo_bundle(name), tmp_path / name) for name in ("digits-linear", "digits-pure"))
    digest = open_bundle(bundle).manifest.digest
    infexport("run-engine", bundle, DIGITS[0], "--digest", digest.upper())
    told = infexport("run-engine", other, DIGITS[0], "--digest", digest, exit_code=2).stderr
    assert "another bundle than was asked for" in told
    assert digest in told
    with pytest.raises(InfexportError, match="another bundle"):
        Predictor(other, digest=digest).predict([])
    sent = pickle.dumps(Predictor.of(open_bundle(bundle), InferenceOptions()))
    assert pickle.loads(sent).predict([DIGITS[0]])
    shutil.rmtree(bundle)
    other.rename(bundle)
    with pytest.raises(InfexportError, match="another bundle"):
        pickle.loads(sent).predict([DIGITS[0]])
