"""What options and arguments of several commands take: sizes of images and of memory, names of images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from infexport.errors import InfexportError
from infexport.inference.options import MAX_PIXELS_PER_SIDE, MAX_THREADS, parse_bytes, parse_size

THREADS = click.IntRange(1, MAX_THREADS)
threads_option = click.option("--threads", type=THREADS, help="Threads of ONNX Runtime.  [default: all cores]")


class Bytes(click.ParamType[int]):
    """An amount of memory, `4GiB`, `800MB` or a number of bytes."""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return parse_bytes(value)
        except InfexportError as error:
            self.fail(f"{error.summary}; {error.details}", param, ctx)


class Sizes(click.ParamType[list[tuple[int, int]]]):
    """Sizes in pixels, `224,512x384`: squares or height x width."""

    name = "N|HxW,…"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[tuple[int, int]]:
        if isinstance(value, list):
            return value
        sizes = []
        for part in value.split(","):
            height, _, width = part.strip().partition("x")
            try:
                size = int(height), int(width or height)
            except ValueError:
                size = (0, 0)
            if not 1 <= min(size) <= max(size) <= MAX_PIXELS_PER_SIDE:
                self.fail(f"{part!r} is no size; expected N or HEIGHTxWIDTH, such as 224,512x384", param, ctx)
            sizes.append(size)
        return sizes


class Size(click.ParamType[str | int]):
    """`trained`, `native` or a side in pixels."""

    name = "trained|native|N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return parse_size(value)
        except InfexportError as error:
            self.fail(error.summary, param, ctx)


class Numbers(click.ParamType[list[int]]):
    """Whole numbers from `least`, `1,4,8`."""

    name = "N,…"

    def __init__(self, least: int = 1) -> None:
        self.least = least

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        if isinstance(value, list):
            return value
        parts = [part.strip() for part in value.split(",")]
        numbers = all(part.isascii() and part.isdecimal() and len(part) < 10 for part in parts)
        if not numbers or min(map(int, parts)) < self.least:
            self.fail(f"{value!r}: expected whole numbers from {self.least}, such as 1,4,8", param, ctx)
        return [int(part) for part in parts]


class Address(click.ParamType[str]):
    """Of a Ray cluster, or `local`."""

    name = "address"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        host, colon, port = value.removeprefix("ray://").rpartition(":")
        if value in ("local", "auto") or (host and colon and port.isascii() and port.isdecimal()):
            return str(value)
        self.fail(
            f"{value!r} is no HOST:PORT, ray://HOST:PORT, auto or local; write --ray last to name none", param, ctx
        )


class ImageName(click.ParamType[Path | str]):
    """A file, a folder, or the URL of one."""

    name = "image"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path | str:
        from infexport.images.fetch import is_url

        return value if isinstance(value, Path) or is_url(value) else Path(value)
