"""Images of every format that is read, whole and in rows, under names that somebody else chose."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from PIL import Image, features

from hostile.cases import Case
from hostile.mutate import INTERESTING, interesting, mutate_bytes
from infexport.errors import InfexportError
from infexport.inference.options import InferenceOptions
from infexport.inference.prediction import Failure
from infexport.inference.predictor import Predictor

FORMATS = {
    "PNG": ".png",
    "JPEG": ".jpg",
    "TIFF": ".tif",
    "WEBP": ".webp",
    "BMP": ".bmp",
    "GIF": ".gif",
    "PPM": ".ppm",
    "JPEG2000": ".jp2",
    "AVIF": ".avif",
    "QOI": ".qoi",
    "MPO": ".jpg",
}
OTHERS = ("ICO", "TGA", "PCX", "DDS", "EPS", "PDF", "ICNS", "SGI")
"""What Pillow or libvips read, and the tool does not."""
TEXT = (
    ("a.svg", b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><image href="/etc/passwd"/></svg>'),
    ("a.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(canary) (w) file\nshowpage\n"),
    ("a.tif", b"%PDF-1.4\n1 0 obj<</Type/Catalog>>endobj\ntrailer<</Root 1 0 R>>\n"),
    ("a.png", b"push graphic-context\nviewbox 0 0 9 9\nfill 'url(https://x\"|touch canary\")'\npop graphic-context"),
    ("a.png", b"# ImageMagick\nid=ImageCache columns=9 rows=9\n"),
    ("a.csv", b"1,2,3\n4,5,6\n"),
    ("a.mat", b"1 2 3\n4 5 6\n"),
    ("a.nii", b"\x5c\x01\0\0" + bytes(400)),
    ("a.v", b"\x08\xf2\xa6\xb6" + bytes(100)),
    ("a.hdr", b"#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n\n-Y 9 +X 9\n" + bytes(400)),
    ("a.fits", b"SIMPLE  =                    T" + b" " * 2850),
)
NAMES = (
    "a.tif[page=1]",
    "a[access=random].png",
    "a.png[fail_on=none]",
    "-o.png",
    "--help",
    "line\nbreak.png",
    "erase\x1b[2J.png",
    "title\x1b]0;owned\x07.png",
    "right\u202egnp.png",
    "equals=,sign.png",
    "%s{0}.png",
    ".hidden.png",
    "two  blanks .png",
    "ſtrange ﬁ.PNG",
)


def make(case: Case) -> Callable[[], int | None]:
    chance = case.chance
    content, suffix = _content(case)
    name: str | bytes = f"image{suffix}"
    if chance.random() < 0.25:
        name = chance.choice((*NAMES, f"x{chance.choice(list(FORMATS.values()))}"))
    elif chance.random() < 0.05:
        name = b"\xff\xfe" + os.fsencode(suffix)
    file = case.given / os.fsdecode(name)
    if not content:
        special, content = chance.randrange(4), b""
        if special == 0:
            os.mkfifo(file)
        elif special == 1:
            file.symlink_to(chance.choice(("/dev/zero", file.name, ".", "/proc/self/mem", "/dev/full", "/dev/stdin")))
        elif special == 2:
            name, content = chance.choice(TEXT)
            file = case.given / name
    if content or not (file.is_symlink() or file.exists()):
        file.write_bytes(content)
    if "[" in file.name and chance.random() < 0.5:
        (case.given / file.name.partition("[")[0]).write_bytes(case.seeds.digits[0].read_bytes())
    size = chance.choice(("native", "native", "trained"))
    if chance.random() < 0.7:
        return lambda: _predicted(case, file, size)
    return lambda: case.cli(*_command(case, file, size))


def _command(case: Case, file: Path, size: str) -> tuple[Any, ...]:
    chance = case.chance
    shown: Any = file
    if chance.random() < 0.2:
        shown = chance.choice((file.parent, Path(f"../in/{file.name}")))
    ways = (
        (),
        ("--json",),
        ("--execution", "stream"),
        ("-o", case.made / f"o{chance.choice(('.csv', '.json', '.npz'))}"),
    )
    more = chance.choice(
        (*ways, ("--edge", "crop"), ("--execution", "stream", "--json"), ("-o", case.made / "o.parquet"))
    )
    return ("run-engine", case.seeds.bundle, "--size", size, "--threads", "1", *more, "--", shown)


def _predicted(case: Case, file: Path, size: Any) -> int:
    """In Python, where nothing is loaded again."""
    streamed = case.chance.random() < 0.4

    def open_predictor() -> Predictor:
        options = InferenceOptions(execution="stream" if streamed else "auto", size=size, threads=1)
        return Predictor.of(case.seeds.opened, options)

    predictor = case.seeds.once(f"predictor {size} {streamed}", open_predictor)
    (row,) = case.reads(lambda: predictor.predict([file]))
    if isinstance(row, Failure):
        raise InfexportError(row.error.summary)
    return 0


def _content(case: Case) -> tuple[bytes, str]:
    """A file, and its suffix; nothing where it is to be no file."""
    chance = case.chance
    kind = chance.randrange(20)
    if kind == 0:
        return b"", ".png"
    if kind == 1:
        return _bomb(case)
    if kind == 2:
        return _tiff(case), chance.choice((".tif", ".tiff", ".png"))
    name = chance.choice(OTHERS) if kind == 3 else chance.choice(list(FORMATS))
    data, other = _saved(case, name), _saved(case, chance.choice(list(FORMATS)))
    if kind < 16:
        data = mutate_bytes(chance, data, other, head=chance.choice((0, 40, 200)))
    elif kind < 18:  # a number of its header, in two or four bytes
        at, width = chance.randrange(min(64, len(data))), chance.choice((2, 4))
        data = data[:at] + interesting(chance, width) + data[at + width :]
        data = _png_sums(data) if name == "PNG" else data
    suffix = FORMATS.get(name, f".{name.lower()}")
    return data, suffix if chance.random() < 0.8 else chance.choice((*FORMATS.values(), "", ".svs", ".v", ".txt"))


def _saved(case: Case, name: str) -> bytes:
    """A whole file of a format; one of several."""
    which = case.chance.randrange(6)
    return case.seeds.once(f"image {name} {which}", lambda: _encoded(name, which))


def _encoded(name: str, which: int) -> bytes:
    pixels = np.random.default_rng(which).integers(0, 256, (40, 56, 3), np.uint8)
    image = Image.fromarray(pixels)
    modes = {"PNG": ("P", "I;16", "RGBA", "L", "1"), "TIFF": ("RGBA", "CMYK", "F", "L", "I;16"), "JPEG": ("L", "CMYK")}
    mode = modes.get(name, ("RGB",))[which % len(modes.get(name, ("RGB",)))] if which else "RGB"
    image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257) if mode == "I;16" else image.convert(mode)
    options: dict[str, Any] = {}
    if name in ("PNG", "JPEG", "WEBP", "AVIF", "TIFF") and which % 2:
        exif = Image.Exif()
        exif[0x0112], exif[0x010E] = 6, "x\x1b[2J"
        options["exif"] = exif
    if name in ("GIF", "WEBP", "PNG", "TIFF", "MPO") and which in (2, 5):
        options |= {"save_all": True, "append_images": [image.copy()]}
    if name == "TIFF":
        options["compression"] = (None, "tiff_lzw", "tiff_deflate", "packbits", "jpeg", "raw")[which]
        if options["compression"] == "jpeg" and image.mode not in ("RGB", "L", "CMYK"):
            options["compression"] = "tiff_lzw"
    file = io.BytesIO()
    if name == "AVIF" and not features.check("avif"):
        return b"\0\0\0\x1cftypavif" + bytes(40)
    if name in ("EPS", "PCX", "SGI", "PDF"):
        image = image.convert("RGB")
    image.save(file, name, **options)
    return file.getvalue()


def _png_sums(data: bytes) -> bytes:
    """The first chunk's checksum as it must be, so that what it says is believed."""
    return data[:29] + struct.pack(">I", zlib.crc32(data[12:29])) + data[33:]


def _bomb(case: Case) -> tuple[bytes, str]:
    """Few bytes of many pixels, within the limit of pixels and beyond it."""
    chance = case.chance
    side = chance.choice((2000, 2100, 20_000, 100_000, 2**31 - 1))
    kind = chance.randrange(5)
    if kind == 0:
        rows = min(side, 2100)
        body = zlib.compress(bytes((side // 8 + 2) * rows if side < 10**6 else 1000))
        parts = [(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)), (b"IDAT", body), (b"IEND", b"")]
        return b"\x89PNG\r\n\x1a\n" + b"".join(
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
            for name, data in parts
        ), ".png"
    if kind == 1:
        return f"P6 {side} {side} 255\n".encode() + bytes(100), ".ppm"
    if kind == 2:
        return b"qoif" + struct.pack(">IIBB", side, side, 3, 0) + b"\xfd" * 1000, ".qoi"
    if kind == 3:
        return b"GIF89a" + struct.pack("<HH", *[min(side, 65535)] * 2) + b"\x80\0\0" + bytes(
            6
        ) + b",\0\0\0\0\1\0\1\0\0\2\2D\1\0;", ".gif"
    return b"BM" + struct.pack(
        "<IIIIiiHHI", 100, 0, 54, 40, min(side, 2**31 - 1), -min(side, 2**31 - 1), 1, 24, 0
    ) + bytes(50), ".bmp"


def _tiff(case: Case) -> bytes:
    """TIFF and BigTIFF as tifffile writes them, with numbers of their directory changed."""
    chance = case.chance
    big, tiled, which = chance.random() < 0.5, chance.random() < 0.5, chance.randrange(4)

    def encode() -> bytes:
        file = io.BytesIO()
        shape, dtype = (((64, 96, 3), "u1"), ((64, 96), "u2"), ((64, 96, 4), "u1"), ((3, 64, 96), "f4"))[which]
        pixels = np.random.default_rng(which).integers(0, 255, shape).astype(dtype)
        more: dict[str, Any] = {"tile": (16, 16)} if tiled else {"rowsperstrip": 8}
        tifffile.imwrite(file, pixels, bigtiff=big, compression="zlib", **more)
        return file.getvalue()

    data = bytearray(case.seeds.once(f"tiff {big} {tiled} {which}", encode))
    width, entry = (8, 20) if big else (4, 12)
    start = int.from_bytes(data[8:16] if big else data[4:8], "little")
    count = int.from_bytes(data[start : start + (8 if big else 2)], "little")
    first = start + (8 if big else 2)
    for _ in range(chance.choice((1, 1, 2, 4))):
        at = first + entry * chance.randrange(count)
        part = chance.choice((0, 2, 4, 4 + width, 4 + width, entry * count + (first - at)))
        size = {0: 2, 2: 2}.get(part, width)
        number = chance.choice((*INTERESTING, start, at, 2, 65536)) % 2 ** (8 * size)
        data[at + part : at + part + size] = number.to_bytes(size, "little")
    return bytes(data)
