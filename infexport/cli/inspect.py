"""`infexport inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from infexport.cli.output import Output
from infexport.cli.providers import engine_option, provider_option

if TYPE_CHECKING:
    from infexport.runners import Placement


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@provider_option(default=None, help="Load it there, and show where every node runs.")
@engine_option
@click.option("--json", "as_json", is_flag=True, help="Print the manifest and the engines as JSON.")
def inspect(bundle: Path, provider: str | None, engine: str | None, as_json: bool) -> None:
    """Show what BUNDLE holds and whether it is as it was made.

    Exit code 1 when its files are not what the manifest recorded, or an engine is not what its sidecar says.
    """
    from infexport.bundle import open_bundle
    from infexport.runners.opening import Opening
    from infexport.summary import manifest_lines, summary_lines, warnings_of

    out = Output(as_json)
    opened = open_bundle(bundle, verify=False)
    for line in warnings_of(opened.manifest):
        out.warning(line)
    for line in [*summary_lines(opened), *manifest_lines(opened)]:
        out.data(line)
    document = opened.to_dict()
    if provider or engine:
        with Opening(opened, provider or "engine", engine).runner(placed=True) as runner:
            placement = runner.placement
            out.data(f"runs on     {runner.provider}, {runner.version}, {runner.precision}")
        document["placement"] = placement
        _table(out, placement)
    out.document(document)
    whole = opened.verified and all(engine["state"] in ("current", "stale") for engine in opened.engines)
    raise click.exceptions.Exit(0 if whole else 1)


def _table(out: Output, placement: Placement) -> None:
    operators = sorted({name for counter in placement.values() for name in counter})
    rows = [[name, *(str(counter[name] or "-") for counter in placement.values())] for name in operators]
    rows.append(["all", *(str(counter.total()) for counter in placement.values())])
    out.table(["operator", *placement], rows)
