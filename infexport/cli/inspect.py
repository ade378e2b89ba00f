"""`infexport inspect`."""

from __future__ import annotations

from pathlib import Path

import click

from infexport.cli.output import Output


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the manifest and the engines as JSON.")
def inspect(bundle: Path, as_json: bool) -> None:
    """Show what BUNDLE holds and whether it is as it was made.

    Exit code 1 when its files are not what the manifest recorded, or an engine is not what its sidecar says.
    """
    from infexport.bundle import open_bundle
    from infexport.summary import manifest_lines, summary_lines, warnings_of

    out = Output(as_json)
    opened = open_bundle(bundle, verify=False)
    for line in warnings_of(opened.manifest):
        out.warning(line)
    for line in [*summary_lines(opened), *manifest_lines(opened)]:
        out.data(line)
    out.document(opened.to_dict())
    whole = opened.verified and all(engine["state"] in ("current", "stale") for engine in opened.engines)
    raise click.exceptions.Exit(0 if whole else 1)
