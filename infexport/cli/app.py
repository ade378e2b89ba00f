"""The command group of `infexport`."""

from __future__ import annotations

import click

from infexport import __version__
from infexport.cli.commands.benchmark import benchmark
from infexport.cli.commands.build_engine import build_engine
from infexport.cli.commands.convert import convert
from infexport.cli.commands.doctor import doctor
from infexport.cli.commands.inspect import inspect
from infexport.cli.commands.package import package
from infexport.cli.commands.run_engine import run_engine
from infexport.cli.commands.validate import validate
from infexport.cli.console import ErrorGroup

HELP = """Deploy Infinite Self-Attention vision transformers.

\b
  infexport convert checkpoint model.safetensors --output bundle
  infexport validate parity bundle
  infexport build-engine bundle --target a100
  infexport run-engine bundle photo.jpg

Results go to stdout, messages to stderr. Exit code 0: done, 1: a check or an image failed, 2: wrong usage or input,
3: a bug.
"""


@click.group(cls=ErrorGroup, help=HELP, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="infexport")
def cli() -> None:
    pass


for command in (convert, validate, build_engine, run_engine, package, benchmark, inspect, doctor):
    cli.add_command(command)
