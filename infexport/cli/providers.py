"""Options of where a bundle runs, for every command that runs one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from infexport.inference.options import PROVIDERS

HELP = "Where it must run: a provider of ONNX Runtime, or engines of build-engine. Another is an error."


def provider_option(default: str | None = "auto", help: str = HELP) -> Callable[[Any], Any]:
    return click.option(
        "--provider",
        type=click.Choice(PROVIDERS),
        default=default,
        show_default=default is not None,
        help=help,
    )


engine_option = click.option(
    "--engine", metavar="NAME", help="Of several engines that fit this GPU, such as a100-fp16."
)
