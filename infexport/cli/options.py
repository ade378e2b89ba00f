"""Options that several commands share, and the types of their values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from infexport.errors import InfexportError
from infexport.inference.options import MAX_PIXELS_PER_SIDE, MAX_THREADS, parse_bytes, parse_size

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    Record = TypeVar("Record", bound=DataclassInstance)

EXECUTIONS = ("auto", "whole", "stream")


def pick(record: type[Record], given: Mapping[str, Any], **others: Any) -> Record:
    """Build a dataclass from the given options that are fields of it.

    Args:
        record: the dataclass.
        given: name of an option → value.
        others: fields that are no option, or differ from it.
    """
    names = {field.name for field in fields(record)}
    return record(**{name: value for name, value in given.items() if name in names} | others)


class Bytes(click.ParamType[int]):
    """Amount of memory: `4GiB`, `800MB` or a number of bytes."""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return parse_bytes(value)
        except InfexportError as error:
            self.fail(f"{error.summary}; {error.details}", param, ctx)


class Sizes(click.ParamType[list[tuple[int, int]]]):
    """Image sizes in pixels, `224,512x384`: squares or height x width."""

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
                self.fail(f"{part!r} is not a size; expected N or HEIGHTxWIDTH, such as 224,512x384", param, ctx)
            sizes.append(size)
        return sizes


class Size(click.ParamType[str | int]):
    """Image size: `trained`, `native` or a side in pixels."""

    name = "trained|native|N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return parse_size(value)
        except InfexportError as error:
            self.fail(error.summary, param, ctx)


class Numbers(click.ParamType[list[int]]):
    """Whole numbers `1,4,8`, each at least `least`."""

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
    """Address of a Ray cluster, or `local`."""

    name = "address"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        host, colon, port = value.removeprefix("ray://").rpartition(":")
        if value in ("local", "auto") or (host and colon and port.isascii() and port.isdecimal()):
            return str(value)
        self.fail(
            f"{value!r} is not HOST:PORT, ray://HOST:PORT, auto or local; without an address, --ray goes last",
            param,
            ctx,
        )


class ImageName(click.ParamType[Path | str]):
    """Path or URL of an image, or of a folder of images."""

    name = "image"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path | str:
        from infexport.images.fetch import is_url

        return value if isinstance(value, Path) or is_url(value) else Path(value)


THREADS = click.IntRange(1, MAX_THREADS)
threads_option = click.option("--threads", type=THREADS, help="Threads of ONNX Runtime.  [default: all cores]")
size_option = click.option(
    "--size",
    type=Size(),
    metavar="trained|native|N",
    default="trained",
    show_default=True,
    help="The recorded evaluation transform, the image as it is, or that transform at N pixels.",
)
edge_option = click.option(
    "--edge",
    type=click.Choice(["pad", "crop"]),
    default="pad",
    show_default=True,
    help="Complete the last patch by replicating the edge, or cut it off.",
)
execution_option = click.option(
    "--execution",
    type=click.Choice(EXECUTIONS),
    default="auto",
    show_default=True,
    help="Run the whole graph, or stream the image in chunks, with nearly constant memory.",
)
memory_option = click.option(
    "--memory", type=Bytes(), help="Memory limit of the process, such as 2GiB.  [default: 80% of what is free]"
)
chunk_option = click.option(
    "--chunk",
    type=click.IntRange(min=1),
    help="Tokens per chunk when streaming.  [default: 1024; with engines, the size they were built for]",
)


def batch_size_option(help: str) -> Callable[[Any], Any]:
    return click.option("--batch-size", type=click.IntRange(min=1), default=1, show_default=True, help=help)
