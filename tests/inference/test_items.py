"""Whatever is among the images of a call is a row of its own."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from support import ZOO

from infexport import Predictor
from infexport.errors import InfexportError
from infexport.images.decode import read_image

DIGITS = sorted((ZOO / "digits-held-out").glob("*.png"))


@pytest.fixture(scope="module")
def predictor(zoo_bundle):
    with Predictor(zoo_bundle("digits-linear"), threads=1) as predictor:
        yield predictor


class Named:
    """An os.PathLike that is no pathlib.Path."""

    def __init__(self, path):
        self.path = path

    def __fspath__(self):
        return self.path


ODD = [
    None,
    b"a.png",
    b"\x89PNG",
    7,
    2.5,
    object(),
    [],
    {},
    "a\0b.png",
    Path("a\0b.png"),
    "",
    "half \ud800 a pair.png",
    "\udcff.png",
    "a" * 5000,
    Named(b"a.png"),
    np.zeros((0, 4, 3), np.uint8),
    np.zeros((4, 4, 4), np.uint8),
    np.zeros((4, 4, 3), np.float32),
    np.array(None),
    "file://a\0b.png",
]


def test_one_odd_item_is_one_failure(predictor):
    batch = [item for odd in ODD for item in (odd, DIGITS[0])]
    expected = predictor(DIGITS[0])["logits"][0]
    found = predictor(batch)
    assert {len(column) for column in found.values()} == {len(batch)}
    assert [bool(error) for error in found["error"]] == [True, False] * len(ODD)
    for row in found["logits"][1::2]:
        assert np.array_equal(row, expected)
    assert found["error_details"][0].startswith("received NoneType, expected a file, a URL")
    assert found["file"][0] == "image 0"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.none(), st.text(max_size=20), st.binary(max_size=20), st.integers(), st.floats(), st.tuples(),
            st.sampled_from([DIGITS[0], str(DIGITS[1])]),
        ),
        max_size=5,
    )
)  # fmt: skip
def test_there_is_a_row_for_everything(predictor, items):
    rows = predictor.predict(items)
    assert len(rows) == len(items)
    for item, row in zip(items, rows, strict=True):
        assert hasattr(row, "logits") == (item in (DIGITS[0], str(DIGITS[1])))


@pytest.mark.parametrize("images", [None, 7, 2.5, object()], ids=lambda value: type(value).__name__)
def test_what_cannot_be_counted_is_an_error_of_the_call(predictor, images):
    with pytest.raises(InfexportError, match="no images"):
        predictor.predict(images)


def test_images_of_pillow_are_taken_as_their_files_are(predictor, tmp_path):
    photograph = Image.open(DIGITS[0]).convert("RGB").resize((40, 60))
    made = {
        "grey.png": photograph.convert("L"),
        "palette.png": photograph.convert("P"),
        "transparent.png": photograph.convert("RGBA"),
        "inks.tif": photograph.convert("CMYK"),
        "deep.png": Image.fromarray(np.arange(2400, dtype=np.uint16).reshape(40, 60) * 27),
    }
    for name, image in made.items():
        image.save(tmp_path / name)
    turned = Image.Exif()
    turned[0x0112] = 6
    photograph.save(tmp_path / "turned.jpg", exif=turned)
    files = sorted(tmp_path.iterdir())
    opened = [Image.open(file) for file in files]
    found = predictor(opened)
    assert not any(found["error"])
    assert np.array_equal(found["logits"], predictor(files)["logits"])
    assert found["file"].tolist() == [str(file) for file in files]
    assert np.array_equal(predictor(photograph)["logits"], predictor([np.asarray(photograph)])["logits"])
    assert predictor(photograph)["file"].tolist() == ["image 0"]


def test_a_damaged_image_of_pillow_is_a_failure(predictor):
    content = DIGITS[0].read_bytes()
    cut = Image.open(io.BytesIO(content[: len(content) // 2]))
    (row, _) = predictor.predict([cut, DIGITS[1]])
    assert "damaged or truncated" in row.error.summary
    (row,) = predictor.predict([Image.new("F", (64, 64))])
    assert "without a known range" in row.error.summary


def test_one_image_is_a_list_of_one(predictor):
    pixels = read_image(DIGITS[0])
    expected = predictor([DIGITS[0]])["logits"]
    for one in (DIGITS[0], str(DIGITS[0]), Named(str(DIGITS[0])), pixels, Image.fromarray(pixels), iter([pixels])):
        assert np.array_equal(predictor(one)["logits"], expected)
    assert len(predictor.predict(str(DIGITS[0]))) == 1
    strange = pixels[:, ::-1][:, ::-1]  # of negative strides, twice: the same pixels
    assert np.array_equal(predictor(np.asfortranarray(strange))["logits"], expected)


def test_an_error_that_says_nothing_is_an_error(predictor, monkeypatch):
    """A row whose error is empty is read as an answer."""

    def fail(*arguments):
        raise OSError

    monkeypatch.setattr("infexport.inference.call.open_source", fail)
    columns = predictor([np.zeros((8, 8, 3), np.uint8)])
    assert columns["error"][0] == "OSError"
    assert columns["index"][0] == -1
