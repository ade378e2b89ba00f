"""`infexport validate`."""

from __future__ import annotations

import click

from infexport.cli.commands.accuracy import accuracy
from infexport.cli.commands.centrality import centrality
from infexport.cli.commands.parity import parity


@click.group()
def validate() -> None:
    """Judge a bundle: it computes what PyTorch does, it is right, and its attention is what it is said to be."""


for command in (parity, accuracy, centrality):
    validate.add_command(command)
