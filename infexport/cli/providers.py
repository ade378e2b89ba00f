"""Options that choose where a bundle runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from infexport.inference.options import PROVIDERS

HELP = "Run only there: a provider of ONNX Runtime, or engines of build-engine. Never falls back to another."


def provider_option(default: str | None = "auto", help: str = HELP) -> Callable[[Any], Any]:
    return click.option(
        "--provider",
        type=click.Choice(PROVIDERS),
        default=default,
        show_default=default is not None,
        help=help,
    )


engine_option = click.option(
    "--engine", metavar="NAME", help="Choose one of several engines that fit this GPU, such as a100-fp16."
)
