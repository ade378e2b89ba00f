"""Pixels in: every kind of file is made here with a known content, and read back by value."""

import io
import logging
import os
import struct
import zlib
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import skimage.data
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from infexport.errors import InfexportError
from infexport.images import decode
from infexport.images.decode import read_image
from infexport.images.preprocess import fit
from infexport.images.transform import EvalTransform, Preprocessing

TRANSFORM = EvalTransform("shortest", 256, 224, "bicubic")
RGB = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)
GREY16 = np.linspace(0, 65535, 300).astype(np.uint16).reshape(10, 30)
GREY16_EXPECTED = np.rint(GREY16 / 257).astype(np.uint8)


@pytest.fixture(autouse=True)
def _pixel_limits_as_they_were(monkeypatch):
    monkeypatch.delenv(decode.MAX_PIXELS_VARIABLE, raising=False)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)  # read_image sets it


def saved(folder: Path, image: Image.Image, name: str, **options) -> Path:
    image.save(folder / name, **options)
    return folder / name


def png16(pixels: np.ndarray, colour_type: int, transparent: bytes = b"") -> bytes:
    """A 16-bit PNG of [H, W, channels]; Pillow writes only the grey kind."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 16, colour_type, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    middle = chunk(b"tRNS", transparent) if transparent else b""
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + middle
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def tiff(width: int, height: int, data: bytes, bits: int, photometric: int) -> bytes:
    """An uncompressed one-strip grey TIFF, for the kinds that Pillow does not write."""
    entries = [(256, width), (257, height), (258, bits), (259, 1), (262, photometric), (273, 122), (277, 1)]
    entries += [(278, height), (279, len(data))]
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + directory + struct.pack("<I", 0) + data


def cmyk_profile() -> bytes:
    """An ICC profile by which pure cyan is mid grey, no ink white and anything else black."""
    lut = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 65536)
    corners = [255, *[0] * 7, 128, *[0] * 7]  # lightness at each corner of the four inks, cyan slowest
    lut += bytes(range(256)) * 4 + b"".join(bytes([light, 128, 128]) for light in corners)
    lut += bytes(range(256)) * 3
    header = struct.pack(">I4sI4s4s4s", 132 + 12 + len(lut), b"lcms", 0x02400000, b"prtr", b"CMYK", b"Lab ")
    header += struct.pack(">6H4s", 2024, 1, 1, 0, 0, 0, b"acsp") + bytes(28)
    header += struct.pack(">3i", 63190, 65536, 54061)
    return header.ljust(128, b"\0") + struct.pack(">I4sII", 1, b"A2B0", 144, len(lut)) + lut


class TestReadImage:
    @pytest.mark.parametrize("suffix", ["png", "tif", "bmp", "ppm", "qoi"])
    def test_rgb_is_read_as_it_is(self, tmp_path, suffix):
        pixels = read_image(saved(tmp_path, Image.fromarray(RGB), f"a.{suffix}"))
        np.testing.assert_array_equal(pixels, RGB)
        assert pixels.dtype == np.uint8
        assert pixels.flags.c_contiguous
        assert pixels.flags.writeable

    @pytest.mark.parametrize("suffix", ["jpg", "webp"])
    def test_lossy_formats(self, tmp_path, suffix):
        flat = np.full((16, 16, 3), (200, 100, 50), np.uint8)
        pixels = read_image(saved(tmp_path, Image.fromarray(flat), f"a.{suffix}", quality=95))
        assert np.abs(pixels.astype(int) - flat).max() <= 4

    def test_path_may_be_a_string(self, tmp_path):
        np.testing.assert_array_equal(read_image(str(saved(tmp_path, Image.fromarray(RGB), "a.png"))), RGB)

    def test_grey_is_replicated(self, tmp_path):
        pixels = read_image(saved(tmp_path, Image.fromarray(GREY), "a.png"))
        np.testing.assert_array_equal(pixels, np.stack([GREY] * 3, axis=2))

    def test_bilevel(self, tmp_path):
        bits = np.array([[True, False, True], [False, False, True]])
        pixels = read_image(saved(tmp_path, Image.fromarray(bits), "a.png"))
        np.testing.assert_array_equal(pixels[..., 1], np.where(bits, 255, 0))

    def test_one_pixel(self, tmp_path):
        pixels = read_image(saved(tmp_path, Image.new("RGB", (1, 1), (1, 2, 3)), "a.png"))
        assert pixels.tolist() == [[[1, 2, 3]]]

    def test_palette(self, tmp_path):
        image = Image.new("P", (2, 1))
        image.putpalette([10, 20, 30, 200, 100, 0])
        image.putpixel((1, 0), 1)
        assert read_image(saved(tmp_path, image, "a.png")).tolist() == [[[10, 20, 30], [200, 100, 0]]]
        transparent = saved(tmp_path, image, "b.png", transparency=0)
        assert read_image(transparent).tolist() == [[[255, 255, 255], [200, 100, 0]]]
        half = saved(tmp_path, image, "c.png", transparency=bytes([255, 51]))  # 51/255 is a fifth
        assert read_image(half).tolist() == [[[10, 20, 30], [244, 224, 204]]]

    def test_alpha_over_white(self, tmp_path):
        alpha = np.arange(256, dtype=np.uint8).reshape(16, 16)
        rgba = np.dstack([np.full_like(alpha, 200), np.zeros_like(alpha), alpha[::-1], alpha])
        weight = alpha[..., None] / 255
        expected = np.rint(rgba[..., :3] * weight + 255 * (1 - weight))
        for suffix in ("png", "tif"):
            np.testing.assert_array_equal(read_image(saved(tmp_path, Image.fromarray(rgba), f"a.{suffix}")), expected)

    def test_grey_alpha_over_white(self, tmp_path):
        image = Image.fromarray(np.array([[[0, 0], [0, 51], [100, 255]]], np.uint8), "LA")
        pixels = read_image(saved(tmp_path, image, "a.png"))
        assert pixels.tolist() == [[[255] * 3, [204] * 3, [100] * 3]]

    def test_palette_alpha(self):
        image = Image.new("PA", (1, 1))
        image.putpalette([0, 100, 255])
        image.putalpha(51)
        assert decode._to_rgb(image, "in memory").getpixel((0, 0)) == (204, 224, 255)

    @pytest.mark.parametrize(("mode", "transparent"), [("L", 0), ("RGB", (0, 0, 0)), ("1", 0)])
    def test_transparent_colour(self, tmp_path, mode, transparent):
        image = Image.new(mode, (2, 1))
        image.putpixel((1, 0), (255, 255, 0) if mode == "RGB" else 255)
        path = saved(tmp_path, image, "a.png", transparency=transparent)
        other = [255, 255, 0] if mode == "RGB" else [255, 255, 255]
        assert read_image(path).tolist() == [[[255, 255, 255], other]]

    @pytest.mark.parametrize("name", ["a.png", "a.tif", "a.pgm", "a.jp2"])
    def test_16_bit_grey_is_scaled(self, tmp_path, name):
        pixels = read_image(saved(tmp_path, Image.fromarray(GREY16), name))
        np.testing.assert_array_equal(pixels, np.stack([GREY16_EXPECTED] * 3, axis=2))

    def test_16_bit_big_endian(self, tmp_path):
        path = saved(tmp_path, Image.fromarray(GREY16.astype(">u2")), "a.tif")
        assert Image.open(path).mode == "I;16B"
        np.testing.assert_array_equal(read_image(path)[..., 2], GREY16_EXPECTED)

    def test_every_16_bit_value_is_rounded(self, tmp_path):
        values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
        pixels = read_image(saved(tmp_path, Image.fromarray(values), "a.png"))
        np.testing.assert_array_equal(pixels[..., 0], np.rint(values / 257))

    def test_16_bit_grey_with_transparent_value(self, tmp_path):
        (tmp_path / "a.png").write_bytes(png16(np.array([[[1000], [1001]]]), 0, struct.pack(">H", 1000)))
        assert read_image(tmp_path / "a.png")[0, :, 0].tolist() == [255, 4]

    def test_16_bit_colour_and_grey_alpha(self, tmp_path):
        colour = np.array([[[0, 128 * 257, 65535], [257, 514, 771]]])
        (tmp_path / "a.png").write_bytes(png16(colour, 2))
        assert read_image(tmp_path / "a.png").tolist() == [[[0, 128, 255], [1, 2, 3]]]
        (tmp_path / "b.png").write_bytes(png16(np.array([[[0, 51 * 257], [30 * 257, 65535]]]), 4))
        assert read_image(tmp_path / "b.png")[0, :, 0].tolist() == [204, 30]

    def test_12_bit_tiff(self, tmp_path):
        packed = bytes([0xFF, 0xF0, 0x00, 0x80, 0x0F, 0xFF])  # 4095, 0, 2048, 4095
        (tmp_path / "a.tif").write_bytes(tiff(4, 1, packed, bits=12, photometric=1))
        assert read_image(tmp_path / "a.tif")[0, :, 0].tolist() == [255, 0, 128, 255]

    @pytest.mark.parametrize("bits", [8, 16])
    def test_tiff_where_white_is_zero(self, tmp_path, bits):
        data = struct.pack("<3H", 0, 30 * 257, 65535) if bits == 16 else bytes([0, 30, 255])
        (tmp_path / "a.tif").write_bytes(tiff(3, 1, data, bits, photometric=0))
        assert read_image(tmp_path / "a.tif")[0, :, 0].tolist() == [255, 225, 0]

    def test_32_bit_integers_within_16_bits(self, tmp_path):
        path = saved(tmp_path, Image.fromarray(GREY16.astype(np.int32)), "a.tif")
        np.testing.assert_array_equal(read_image(path)[..., 0], GREY16_EXPECTED)

    @pytest.mark.parametrize("value", [-1, 65536, 2**31 - 1])
    def test_32_bit_integers_beyond_are_refused(self, tmp_path, value):
        path = saved(tmp_path, Image.fromarray(np.array([[0, value]], np.int32)), "a.tif")
        with pytest.raises(InfexportError, match="without a known range") as caught:
            read_image(path)
        assert str(value) in caught.value.details
        assert caught.value.hint

    @pytest.mark.parametrize("name", ["a.tif", "a.pfm"])
    def test_floating_point_is_refused(self, tmp_path, name):
        path = saved(tmp_path, Image.fromarray(np.zeros((2, 2), np.float32)), name)
        with pytest.raises(InfexportError, match="without a known range") as caught:
            read_image(path)
        assert caught.value.details == "received floating-point pixels; expected 8-bit or 16-bit integers"
        assert caught.value.hint

    @pytest.mark.parametrize("suffix", ["jpg", "tif"])  # JPEG stores Adobe's inverted inks
    @pytest.mark.parametrize(
        ("inks", "colour"),
        [
            ((255, 0, 0, 0), (0, 255, 255)),
            ((0, 255, 0, 0), (255, 0, 255)),
            ((0, 0, 255, 0), (255, 255, 0)),
            ((0, 0, 0, 255), (0, 0, 0)),
            ((0, 0, 0, 0), (255, 255, 255)),
        ],
    )
    def test_cmyk(self, tmp_path, suffix, inks, colour):
        options = {"quality": 95} if suffix == "jpg" else {}
        pixels = read_image(saved(tmp_path, Image.new("CMYK", (8, 8), inks), f"a.{suffix}", **options))
        assert np.abs(pixels.astype(int) - colour).max() <= 5

    def test_cmyk_profile_is_applied(self, tmp_path):
        image = Image.new("CMYK", (8, 8), (255, 0, 0, 0))
        pixels = read_image(saved(tmp_path, image, "a.tif", icc_profile=cmyk_profile()))
        assert np.abs(pixels.astype(int) - 119).max() <= 3  # L = 50 is sRGB 119

    @pytest.mark.parametrize("kind", ["garbage", "RGB"])
    def test_unusable_cmyk_profile_falls_back(self, tmp_path, caplog, kind):
        srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
        image = Image.new("CMYK", (8, 8), (255, 0, 0, 0))
        path = saved(tmp_path, image, "a.tif", icc_profile=b"garbage" if kind == "garbage" else srgb)
        assert read_image(path)[0, 0].tolist() == [0, 255, 255]
        assert "colour profile" in caplog.text

    def test_ycbcr_and_lab(self, tmp_path):
        image = Image.fromarray(np.full((16, 16, 3), (200, 100, 50), np.uint8)).convert("YCbCr")
        path = saved(tmp_path, image, "a.tif")
        assert Image.open(path).mode == "YCbCr"
        assert np.abs(read_image(path).astype(int) - (200, 100, 50)).max() <= 2
        path = saved(tmp_path, Image.new("LAB", (2, 2), (128, 128, 128)), "b.tif")  # L = 50, a = b = 0
        assert Image.open(path).mode == "LAB"
        assert np.abs(read_image(path).astype(int) - 119).max() <= 2

    def test_hsv(self):
        image = Image.new("HSV", (1, 1), (85, 255, 255))  # a third of the circle
        assert np.abs(np.subtract(decode._to_rgb(image, "").getpixel((0, 0)), (0, 255, 0))).max() <= 1

    @pytest.mark.parametrize("orientation", range(1, 9))
    @pytest.mark.parametrize("name", ["a.png", "a.tif"])  # Pillow turns TIFF itself: not twice
    def test_exif_orientation(self, tmp_path, orientation, name):
        stored = {  # what a camera would have stored for the upright picture RGB
            1: RGB,
            2: RGB[:, ::-1],
            3: RGB[::-1, ::-1],
            4: RGB[::-1],
            5: RGB.transpose(1, 0, 2),
            6: RGB.transpose(1, 0, 2)[::-1],
            7: RGB.transpose(1, 0, 2)[::-1, ::-1],
            8: RGB.transpose(1, 0, 2)[:, ::-1],
        }[orientation]
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = saved(tmp_path, Image.fromarray(np.ascontiguousarray(stored)), name, exif=exif)
        np.testing.assert_array_equal(read_image(path), RGB)

    def test_orientation_reaches_grey_16_bit(self, tmp_path):
        exif = Image.Exif()
        exif[0x0112] = 6
        path = saved(tmp_path, Image.fromarray(np.ascontiguousarray(GREY16.T[::-1])), "a.png", exif=exif)
        np.testing.assert_array_equal(read_image(path)[..., 0], GREY16_EXPECTED)

    @pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"Exif\0\0"])
    def test_damaged_exif_does_not_cost_the_picture(self, tmp_path, exif):
        np.testing.assert_array_equal(read_image(saved(tmp_path, Image.fromarray(RGB), "a.png", exif=exif)), RGB)

    @pytest.mark.parametrize("name", ["a.gif", "a.tif"])
    def test_first_of_several_frames(self, tmp_path, caplog, name):
        frames = [Image.fromarray(np.full((4, 4), value, np.uint8)) for value in (10, 200, 90)]
        several = saved(tmp_path, frames[0], name, save_all=True, append_images=frames[1:])
        assert (read_image(several) == 10).all()
        assert [record.levelno for record in caplog.records] == [logging.WARNING]
        assert caplog.records[0].name == "infexport"
        assert "first" in caplog.text
        caplog.clear()
        read_image(saved(tmp_path, frames[0], f"one-{name}"))
        assert not caplog.records

    def test_previews_after_a_photograph_are_no_news(self, tmp_path, caplog):
        photo, preview = (Image.new("RGB", (16, 16), colour) for colour in ("red", "blue"))
        path = saved(tmp_path, photo, "a.jpg", format="MPO", save_all=True, append_images=[preview])
        assert np.abs(read_image(path).astype(int) - (255, 0, 0)).max() <= 3
        assert not caplog.records

    def test_transparent_gif(self, tmp_path):
        image = Image.new("P", (2, 1), 0)
        image.putpalette([9, 9, 9, 50, 60, 70])
        image.putpixel((1, 0), 1)
        path = saved(tmp_path, image, "a.gif", transparency=0)
        assert read_image(path).tolist() == [[[255, 255, 255], [50, 60, 70]]]


class TestUnreadable:
    def refused(self, path, match) -> InfexportError:
        with pytest.raises(InfexportError, match=match) as caught:
            read_image(path)
        assert caught.value.details
        assert caught.value.hint
        assert str(path) in caught.value.summary
        return caught.value

    @pytest.mark.parametrize("content", [b"", b"\0", b"hello, this is no image\n" * 50, b"%!PS-Adobe-3.0 EPSF-3.0\n"])
    def test_not_an_image(self, tmp_path, content):
        (tmp_path / "a.png").write_bytes(content)
        assert "PNG" in self.refused(tmp_path / "a.png", "not an image").details

    def test_formats_that_run_other_programs_are_not_read(self, tmp_path):
        self.refused(saved(tmp_path, Image.fromarray(RGB), "a.eps"), "not an image")

    @pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif", "a.gif", "a.bmp", "a.webp", "a.jp2", "a.ppm"])
    def test_truncated(self, tmp_path, name):
        noise = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        path = saved(tmp_path, Image.fromarray(noise), name)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        self.refused(path, "damaged or truncated|not an image")

    def test_missing_folder_and_forbidden(self, tmp_path, monkeypatch):
        assert "No such file" in self.refused(tmp_path / "nowhere.png", "cannot open").details
        self.refused(tmp_path, "cannot open")

        def forbidden(*args, **kwargs):
            raise PermissionError(13, "Permission denied")  # tests may run as root, whom no mode stops

        monkeypatch.setattr(Image, "open", forbidden)
        (tmp_path / "a.png").touch()
        assert "Permission denied" in self.refused(tmp_path / "a.png", "cannot open").details

    def test_what_may_be_read_for_ever_is_not(self, tmp_path):
        os.mkfifo(tmp_path / "pipe.png")
        (tmp_path / "zeros.png").symlink_to("/dev/zero")
        for name in ("pipe.png", "zeros.png"):
            self.refused(tmp_path / name, "no ordinary file")

    def test_out_of_memory(self, tmp_path, monkeypatch):
        def full(*args, **kwargs):
            raise MemoryError

        path = saved(tmp_path, Image.fromarray(RGB), "a.png")
        monkeypatch.setattr(decode, "_to_rgb", full)
        self.refused(path, "not enough memory")

    @pytest.mark.parametrize("limit", [34, 10])  # Pillow itself refuses beyond twice the limit, we beyond it
    def test_pixel_limit_comes_from_the_header(self, tmp_path, monkeypatch, limit, recwarn):
        path = saved(tmp_path, Image.fromarray(RGB), "a.png")
        data = path.read_bytes()
        path.write_bytes(data[: data.index(b"IDAT") + 6])  # nothing left to decode
        monkeypatch.setenv(decode.MAX_PIXELS_VARIABLE, str(limit))
        error = self.refused(path, "too many pixels")
        assert decode.MAX_PIXELS_VARIABLE in error.hint
        assert str(limit) in error.details
        assert not recwarn.list
        monkeypatch.setenv(decode.MAX_PIXELS_VARIABLE, "35")
        self.refused(path, "damaged or truncated")

    def test_pixel_limit_is_pillows_too(self, tmp_path, monkeypatch):
        path = saved(tmp_path, Image.fromarray(RGB), "a.png")
        read_image(path)
        assert Image.MAX_IMAGE_PIXELS == decode.MAX_PIXELS == 2**30
        monkeypatch.setenv(decode.MAX_PIXELS_VARIABLE, "35")
        np.testing.assert_array_equal(read_image(path), RGB)
        assert Image.MAX_IMAGE_PIXELS == 35

    @pytest.mark.parametrize("text", ["", "many", "0", "-3", "1e9"])
    def test_pixel_limit_must_be_a_number(self, tmp_path, monkeypatch, text):
        monkeypatch.setenv(decode.MAX_PIXELS_VARIABLE, text)
        with pytest.raises(InfexportError, match=decode.MAX_PIXELS_VARIABLE):
            read_image(tmp_path / "a.png")

    @settings(max_examples=150, deadline=None)
    @given(
        st.sampled_from(["PNG", "JPEG", "TIFF", "GIF", "WEBP", "BMP", "JPEG2000", "QOI"]),
        st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=6),
    )
    def test_damage_is_one_kind_of_error(self, tmp_path_factory, kind, damage):
        buffer = io.BytesIO()
        Image.fromarray(np.tile(RGB, (3, 3, 1))).save(buffer, kind)
        data = bytearray(buffer.getvalue())
        for place, value in damage:
            data[int(place * len(data))] = value
        path = tmp_path_factory.getbasetemp() / "damaged"
        path.write_bytes(data)
        try:
            with pytest.MonkeyPatch.context() as patch:  # a damaged header may ask for gigabytes
                patch.setenv(decode.MAX_PIXELS_VARIABLE, "10000")
                pixels = read_image(path)
        except InfexportError as error:
            damaged = error
            assert all((damaged.summary, damaged.details, damaged.hint))
        else:
            assert pixels.dtype == np.uint8
            assert pixels.ndim == 3


class TestEvalTransform:
    def test_round_trip(self):
        data = asdict(TRANSFORM)
        assert data == {
            "resize_mode": "shortest",
            "resize_size": 256,
            "crop_size": 224,
            "interpolation": "bicubic",
        }
        assert EvalTransform(**data) == TRANSFORM

    def test_at_scales_in_proportion(self):
        assert TRANSFORM.at(448) == EvalTransform("shortest", 512, 448, "bicubic")
        assert TRANSFORM.at(224) == TRANSFORM
        assert EvalTransform("exact", 32, 32, "bilinear").at(100) == EvalTransform("exact", 100, 100, "bilinear")

    @pytest.mark.parametrize(
        ("change", "word"),
        [
            ({"resize_mode": "longest"}, "longest"),
            ({"interpolation": "area"}, "area"),
            ({"crop_size": 0}, "crop_size"),
            ({"resize_size": 2.5}, "resize_size"),
            ({"resize_size": "256"}, "resize_size"),
        ],
    )
    def test_what_is_not_understood_is_refused(self, change, word):
        with pytest.raises(InfexportError, match="transform") as caught:
            _ = Preprocessing((0, 0, 0), (1, 1, 1), **asdict(TRANSFORM) | change).transform
        assert word in caught.value.details


def resized_then_cropped(image: np.ndarray, transform: EvalTransform, passes: int = 1) -> np.ndarray:
    """torchvision's Resize and CenterCrop, written plainly; with two passes, columns first on any Pillow."""
    height, width = image.shape[:2]
    size, crop = transform.resize_size, transform.crop_size
    new = (size, size)
    if transform.resize_mode == "shortest":
        new = (size, int(size * width / height)) if height <= width else (int(size * height / width), size)
    resample = Image.Resampling[transform.interpolation.upper()]
    picture = Image.fromarray(image)
    if passes == 2:
        picture = picture.resize((new[1], height), resample)
    resized = np.asarray(picture.resize((new[1], new[0]), resample))
    top, left = round((new[0] - crop) / 2), round((new[1] - crop) / 2)
    return resized[top : top + crop, left : left + crop]


class TestFitTrained:
    @pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
    @pytest.mark.parametrize("mode", ["shortest", "exact"])
    def test_equals_resize_then_crop(self, mode, interpolation):
        transform = EvalTransform(mode, 115, 96, interpolation)
        for picture in (skimage.data.coffee(), skimage.data.chelsea().transpose(1, 0, 2)):
            fitted = fit(picture, 16, "trained", transform, "pad")
            np.testing.assert_array_equal(fitted.pixels, resized_then_cropped(picture, transform))
            assert fitted.padded_share == 0

    @pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
    @pytest.mark.parametrize(
        "shape", [(40, 900), (900, 40), (7, 301), (301, 7), (1, 500), (500, 1), (1300, 200), (61, 1000)]
    )
    def test_strips_equal_resize_then_crop(self, interpolation, shape):
        noise = np.random.default_rng(2).integers(0, 2, (*shape, 3), dtype=np.uint8) * 255
        for transform in (
            EvalTransform("shortest", 37, 32, interpolation),
            EvalTransform("shortest", 8, 8, interpolation),
        ):
            fitted = fit(noise, 8, "trained", transform, "pad")
            for passes in (1, 2) if shape[0] < shape[1] else (2,):  # Pillow 13 takes tall ones rows first
                difference = fitted.pixels.astype(int) - resized_then_cropped(noise, transform, passes)
                assert np.abs(difference).max() <= 1

    @pytest.mark.parametrize("tall", [False, True])
    def test_nearest_strip_takes_pixels_of_the_middle(self, tall):
        ramp = np.arange(200, dtype=np.uint8).reshape(1, 200, 1).repeat(10, axis=0).repeat(3, axis=2)
        strip = ramp.transpose(1, 0, 2) if tall else ramp
        fitted = fit(strip, 5, "trained", EvalTransform("shortest", 10, 10, "nearest"), "pad")
        np.testing.assert_array_equal(fitted.pixels, strip[95:105] if tall else strip[:, 95:105])

    @pytest.mark.parametrize("shape", [(1, 5000), (5000, 1), (2, 1_000_000), (1_000_000, 2)])
    def test_extreme_aspect_stays_small(self, shape, monkeypatch):
        sizes = []
        plain = Image.Image.resize

        def watched(self, size, *args, **kwargs):
            sizes.extend([size[0] * size[1], self.width * self.height])
            return plain(self, size, *args, **kwargs)

        monkeypatch.setattr(Image.Image, "resize", watched)
        ramp = np.linspace(0, 255, max(shape)).astype(np.uint8)
        image = np.broadcast_to(ramp[:, None, None] if shape[0] > shape[1] else ramp[:, None], (*shape, 3))
        fitted = fit(image, 16, "trained", TRANSFORM, "pad")
        assert fitted.pixels.shape == (224, 224, 3)
        assert set(np.unique(fitted.pixels)) <= {126, 127, 128}  # the middle of the ramp
        assert sizes
        assert max(sizes) <= 256 * 256

    def test_shorter_than_the_crop_is_replicated(self):
        fitted = fit(RGB, 4, "trained", EvalTransform("exact", 6, 8, "bicubic"), "pad")
        resized = np.asarray(Image.fromarray(RGB).resize((6, 6), Image.Resampling.BICUBIC))
        np.testing.assert_array_equal(fitted.pixels, np.pad(resized, ((0, 2), (0, 2), (0, 0)), mode="edge"))
        assert fitted.padded_share == 28 / 64

    @pytest.mark.parametrize(("edge", "side", "share"), [("pad", 112, 1 - (100 / 112) ** 2), ("crop", 96, 0)])
    def test_a_number_is_completed_to_patches(self, edge, side, share):
        picture = skimage.data.astronaut()
        fitted = fit(picture, 16, 100, TRANSFORM, edge)
        kept = min(side, 100)
        expected = resized_then_cropped(picture, TRANSFORM.at(100))[:kept, :kept]
        np.testing.assert_array_equal(fitted.pixels[:kept, :kept], expected)
        assert fitted.pixels.shape == (side, side, 3)
        assert fitted.padded_share == pytest.approx(share, abs=1e-15)

    @pytest.mark.parametrize("size", ["native", "trained", 64])
    @pytest.mark.parametrize("name", ["astronaut", "retina"])
    def test_real_pictures(self, name, size):
        picture = getattr(skimage.data, name)()
        fitted = fit(picture, 16, size, TRANSFORM, "pad")
        side = {"native": -(-picture.shape[0] // 16) * 16, "trained": 224, 64: 64}[size]
        assert fitted.pixels.shape == (side, side, 3)
        assert fitted.pixels.flags.c_contiguous
        if size == "native":
            np.testing.assert_array_equal(fitted.pixels[: picture.shape[0], : picture.shape[1]], picture)
            assert fitted.padded_share == pytest.approx(1 - picture[..., 0].size / side**2)
            return
        cut = picture.shape[0] // 16  # both are square; the middle 224/256 kept has nearly its own mean colour
        centre = picture[cut:-cut, cut:-cut]
        np.testing.assert_allclose(fitted.pixels.mean((0, 1)), centre.mean((0, 1)), atol=1)

    @pytest.mark.parametrize("size", [0, -16])
    def test_size_must_be_positive(self, size):
        with pytest.raises(InfexportError, match="transform") as caught:
            fit(RGB, 4, size, TRANSFORM, "pad")
        assert str(size) in caught.value.details

    def test_size_is_limited(self, monkeypatch):
        monkeypatch.setenv(decode.MAX_PIXELS_VARIABLE, "65536")
        assert fit(RGB, 4, 256, TRANSFORM, "pad").pixels.shape == (256, 256, 3)
        with pytest.raises(InfexportError, match="too many pixels"):
            fit(RGB, 4, 257, TRANSFORM, "pad")


pictures = st.builds(
    lambda height, width, seed: np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8),
    st.integers(1, 70),
    st.integers(1, 70),
    st.integers(0, 2**32 - 1),
)


class TestFitNative:
    @settings(max_examples=100, deadline=None)
    @given(pictures, st.integers(1, 32))
    def test_padding_keeps_the_picture(self, picture, patch):
        before = picture.copy()
        fitted = fit(picture, patch, "native", TRANSFORM, "pad")
        height, width = picture.shape[:2]
        new_height, new_width = fitted.pixels.shape[:2]
        np.testing.assert_array_equal(fitted.pixels[:height, :width], picture)
        np.testing.assert_array_equal(picture, before)
        assert new_height % patch == new_width % patch == 0
        assert new_height - height < patch
        assert new_width - width < patch
        # what was added repeats the last row and column
        np.testing.assert_array_equal(
            fitted.pixels[height:, :width], np.broadcast_to(picture[-1], (new_height - height, width, 3))
        )
        np.testing.assert_array_equal(
            fitted.pixels[:, width:],
            np.broadcast_to(fitted.pixels[:, width - 1 : width], (new_height, new_width - width, 3)),
        )
        total = new_height * new_width
        assert fitted.padded_share == float(Fraction(total - height * width, total))
        assert 0 <= fitted.padded_share < 1

    @settings(max_examples=100, deadline=None)
    @given(pictures, st.integers(1, 32))
    def test_cropping_invents_nothing(self, picture, patch):
        height, width = picture.shape[:2]
        if min(height, width) < patch:
            with pytest.raises(InfexportError, match="smaller than one patch") as caught:
                fit(picture, patch, "native", TRANSFORM, "crop")
            assert f"{height}x{width}" in caught.value.details
            return
        fitted = fit(picture, patch, "native", TRANSFORM, "crop")
        new_height, new_width = fitted.pixels.shape[:2]
        np.testing.assert_array_equal(fitted.pixels, picture[:new_height, :new_width])
        assert new_height % patch == new_width % patch == 0
        assert height - new_height < patch
        assert width - new_width < patch
        assert fitted.padded_share == 0
        assert fitted.pixels.flags.c_contiguous

    @pytest.mark.parametrize(
        "image",
        [
            np.zeros((4, 4), np.uint8),
            np.zeros((4, 4, 4), np.uint8),
            np.zeros((4, 4, 3), np.float32),
            np.zeros((0, 4, 3), np.uint8),
        ],
    )
    def test_only_rgb_arrays(self, image):
        with pytest.raises(InfexportError, match="RGB") as caught:
            fit(image, 2, "native", TRANSFORM, "pad")
        assert str(list(image.shape)) in caught.value.details


def test_a_huge_resize_takes_no_more_than_its_crop_needs():
    """10¹⁰ pixels, of which 32² are kept; a bundle's manifest may ask for it."""
    found = fit(RGB, 8, "trained", EvalTransform("exact", 10**5, 32, "bicubic"), "pad")
    assert found.pixels.shape == (32, 32, 3)
