"""Sizes of images on the command line."""

from __future__ import annotations

from typing import Any

import click


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
            if min(size) < 1:
                self.fail(f"{part!r} is no size; expected N or HEIGHTxWIDTH, such as 224,512x384", param, ctx)
            sizes.append(size)
        return sizes
