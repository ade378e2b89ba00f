"""Command line: each command parses its arguments, calls one function and displays the result."""

from infexport.cli.app import cli

__all__ = ["cli"]
