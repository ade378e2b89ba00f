"""`infexport validate`."""

from __future__ import annotations

import click

from infexport.cli.commands.accuracy import accuracy
from infexport.cli.commands.centrality import centrality
from infexport.cli.commands.parity import parity


@click.group()
def validate() -> None:
    """Check a bundle: parity with PyTorch, accuracy, centrality."""


for command in (parity, accuracy, centrality):
    validate.add_command(command)
