"""Images in strips: every format as Pillow reads it whole, whole patches in order, damage as one clear error."""

from __future__ import annotations

import os

import numpy as np
import pytest
import skimage.data
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from infexport.errors import InfexportError
from infexport.evaluation.synthetic_images import synthetic_image
from infexport.images.decode import read_image
from infexport.images.preprocess import fit
from infexport.images.strips import ArrayRows, SlideRows, Source, VipsRows, open_rows
from infexport.images.transform import EvalTransform


def read(rows, step=7):
    parts = [rows.read(start, min(rows.height, start + step)) for start in range(0, rows.height, step)]
    return np.concatenate(parts)


def assembled(source, patch, chunk, done=0):
    """The whole image put together from strips, each at the place that it says."""
    height, width = (patch * side for side in source.grid)
    whole, last = np.zeros((height, width, 3), np.uint8), done
    for after, strip in source.strips(range(done, source.tokens - 1), chunk):
        image = strip["image"][0]
        rows, columns = image.shape[0] // patch, image.shape[1] // patch
        assert rows * columns == after - last
        assert rows * columns <= max(chunk, 1)
        assert (rows == 1) or columns == source.grid[1]  # the tokens of a strip are in a row
        y, x = int(strip["row"][0]), int(strip["column"][0])
        assert y * source.grid[1] + x == last
        assert (strip["grid_height"][0], strip["grid_width"][0]) == source.grid
        whole[y * patch : y * patch + image.shape[0], x * patch : x * patch + image.shape[1]] = image
        last = after
    assert last == source.grid[0] * source.grid[1]
    return whole


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(1, 70), width=st.integers(1, 70), patch=st.integers(1, 16), chunk=st.integers(1, 100),
    edge=st.sampled_from(["pad", "crop"]),
)  # fmt: skip
def test_strips_are_the_completed_image(height, width, patch, chunk, edge):
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    transform = EvalTransform("shortest", 8, 8, "bicubic")
    try:
        expected = fit(image, patch, "native", transform, edge)
    except InfexportError:
        with pytest.raises(InfexportError, match="smaller than one patch"):
            Source(ArrayRows(image), patch, edge)
        return
    source = Source(ArrayRows(image), patch, edge)
    assert np.array_equal(assembled(source, patch, chunk), expected.pixels)
    assert source.padded_share == pytest.approx(expected.padded_share)
    assert source.tokens == expected.pixels.size // (3 * patch**2) + 1


def test_strips_go_on_where_they_are_told():
    source = Source(ArrayRows(synthetic_image(40, 72)), 8, "pad")
    for chunk in (4, 9, 30):
        ends = [done for done, _ in source.strips(range(source.tokens - 1), chunk)]
        for end in ends[:-1]:
            assert [done for done, _ in source.strips(range(end, source.tokens - 1), chunk)] == [
                e for e in ends if e > end
            ]


PHOTO = np.asarray(Image.fromarray(skimage.data.astronaut()).resize((205, 133)))
GREY = np.asarray(Image.fromarray(PHOTO).convert("L"))
ALPHA = np.dstack([PHOTO, np.linspace(0, 255, 205, dtype=np.uint8)[None, :].repeat(133, 0)])


def save_pyramid(path):
    with tifffile.TiffWriter(path, bigtiff=True) as file:
        file.write(PHOTO, tile=(32, 32), photometric="rgb", subifds=1)
        file.write(PHOTO[::2, ::2], tile=(32, 32), photometric="rgb", subfiletype=1)


def save_turned(path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(PHOTO).save(path, exif=exif)


WRITERS = {
    "rgb.png": lambda path: Image.fromarray(PHOTO).save(path),
    "grey.png": lambda path: Image.fromarray(GREY).save(path),
    "alpha.png": lambda path: Image.fromarray(ALPHA).save(path),
    "grey-alpha.png": lambda path: Image.fromarray(ALPHA).convert("LA").save(path),
    "palette.png": lambda path: Image.fromarray(PHOTO).convert("P", palette=Image.Palette.ADAPTIVE).save(path),
    "sixteen.png": lambda path: Image.fromarray(GREY.astype(np.uint16) * 251 + 7).save(path),
    "one-bit.png": lambda path: Image.fromarray(GREY).convert("1").save(path),
    "photo.jpg": lambda path: Image.fromarray(PHOTO).save(path, quality=90),
    "grey.jpg": lambda path: Image.fromarray(GREY).save(path, quality=90),
    "turned.jpg": save_turned,
    "lossless.webp": lambda path: Image.fromarray(PHOTO).save(path, lossless=True),
    "strips.tif": lambda path: Image.fromarray(PHOTO).save(path),
    "packed.tif": lambda path: Image.fromarray(PHOTO).save(path, compression="tiff_lzw"),
    "tiles.tif": lambda path: tifffile.imwrite(path, PHOTO, tile=(48, 32), photometric="rgb"),
    "big.tif": lambda path: tifffile.imwrite(path, PHOTO, tile=(64, 64), bigtiff=True, compression="deflate"),
    "sixteen.tif": lambda path: tifffile.imwrite(path, GREY.astype(np.uint16) * 257),
    "pyramid.tif": save_pyramid,
    "tags.tif": lambda path: tifffile.imwrite(path, PHOTO, extratags=[(65000, "s", 0, "a scanner's own", False)]),
    "picture.bmp": lambda path: Image.fromarray(PHOTO).save(path),
    "old.gif": lambda path: Image.fromarray(PHOTO).save(path),
    "new.jp2": lambda path: Image.fromarray(PHOTO).save(path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_is_what_pillow_reads(name, tmp_path):
    path = tmp_path / name
    WRITERS[name](path)
    expected = read_image(path)
    for step in (1, 50):
        rows = open_rows(path)
        assert (rows.height, rows.width) == expected.shape[:2]
        assert np.array_equal(read(rows, step), expected)
    if path.suffix in (".tif", ".png", ".jpg", ".webp"):
        assert isinstance(rows, VipsRows)


def test_where_libvips_is_missing_pillow_reads_it_whole(tmp_path, monkeypatch):
    def no_library(name):
        raise OSError(f"cannot load library of {name}")

    monkeypatch.setattr("importlib.import_module", no_library)
    WRITERS["tiles.tif"](tmp_path / "tiles.tif")
    rows = open_rows(tmp_path / "tiles.tif")
    assert isinstance(rows, ArrayRows)
    assert rows.loaded == PHOTO.nbytes
    assert np.array_equal(read(rows), PHOTO)


def test_slides_by_openslide(tmp_path):
    WRITERS["big.tif"](tmp_path / "slide.tif")  # its generic format; others are not to be had without their data
    rows = SlideRows(tmp_path / "slide.tif")
    assert np.array_equal(read(rows), PHOTO)
    assert isinstance(open_rows(tmp_path / "slide.tif"), VipsRows)
    (tmp_path / "no.svs").write_bytes(b"nothing")
    with pytest.raises(InfexportError, match="slide that cannot be read"):
        SlideRows(tmp_path / "no.svs")


@pytest.mark.parametrize("name", ["tiles.tif", "strips.tif", "rgb.png", "photo.jpg"])
def test_a_truncated_file_is_one_clear_error(name, tmp_path):
    path = tmp_path / name
    WRITERS[name](path)
    content = path.read_bytes()
    # a TIFF's directory may be behind its pixels: cut these out of the middle
    cut = content[: len(content) // 2] if path.suffix in (".png", ".jpg") else content[: len(content) * 2 // 3]
    path.write_bytes(cut)
    with pytest.raises(InfexportError) as error:
        read(open_rows(path))
    assert str(path) in error.value.summary
    assert error.value.hint


@pytest.mark.parametrize("name", ["a.tif[page=1]", "a[fail_on=none].png", "a.jpg[]"])
def test_a_name_is_a_name_and_no_options(name, tmp_path):
    """libvips has `name[options]`: another file would be read, or this one not as it is asked for."""
    kinds = {"t": "TIFF", "f": "PNG", "j": "JPEG"}
    grey = Image.fromarray(np.full_like(PHOTO, 128))
    grey.save(tmp_path / name.partition("[")[0], "PNG")
    Image.fromarray(PHOTO).save(tmp_path / name, kinds[name[2]])
    rows = open_rows(tmp_path / name)
    assert isinstance(rows, VipsRows)
    assert np.array_equal(read(rows), read_image(tmp_path / name))


def test_what_refers_to_other_files_or_runs_programs_is_not_read(tmp_path):
    """libvips reads these, too, and some of them by other programs."""
    others = {
        "a.svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><image href="b.png"/></svg>',
        "a.png": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
        "a.pdf": b"%PDF-1.4\n",
        "a.csv": b"1,2,3\n4,5,6\n",
        "a.hdr": b"#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n\n-Y 9 +X 9\n" + bytes(400),
    }
    for name, content in others.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InfexportError, match="not an image"):
            open_rows(tmp_path / name)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.tif")
    with pytest.raises(InfexportError, match="no ordinary file"):
        open_rows(tmp_path / "pipe.tif")


def test_pixels_without_a_known_range(tmp_path):
    tifffile.imwrite(tmp_path / "float.tif", PHOTO.astype(np.float32) / 255)
    with pytest.raises(InfexportError, match="without a known range"):
        VipsRows(tmp_path / "float.tif")


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif"])
def test_a_file_that_is_written_anew_is_read_anew(suffix, tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6  # not read in order, and so libvips would remember it
    for value in (10, 200):
        Image.fromarray(np.full((40, 60, 3), value, np.uint8)).save(tmp_path / f"a{suffix}", exif=turned)
        rows = VipsRows(tmp_path / f"a{suffix}")
        assert (rows.height, rows.width) == (60, 40)
        assert np.all(rows.read(0, 60) == value)


def test_no_image_at_all(tmp_path):
    (tmp_path / "notes.tif").write_text("no image")
    with pytest.raises(InfexportError, match="not an image"):
        open_rows(tmp_path / "notes.tif")
