"""`infexport inspect`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from infexport.cli.console import Output
from infexport.cli.options import Sizes
from infexport.cli.providers import engine_option, provider_option


@click.command(short_help="Show contents, integrity and cost of BUNDLE.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--sizes", type=Sizes(), metavar="N|HxW,…",
              help="Image sizes to estimate, in whole patches.  [default: trained, 224 to 65536]")  # fmt: skip
@provider_option(default=None, help="Load the graph there; show where every node runs.  [default: cpu, if it loads]")
@engine_option
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON, with the manifest and the engines.")
def inspect(
    bundle: Path, sizes: list[tuple[int, int]] | None, provider: str | None, engine: str | None, as_json: bool
) -> None:
    """Show contents and integrity of BUNDLE, and the cost of images of any size.

    Lists its files and its checkpoint, checked against their hashes; inputs and outputs; operators and where they run;
    parameters; arithmetic and memory by image size; engines.

    Exit code 1 when a file differs from the manifest, or an engine from its sidecar.
    """
    from infexport.bundle import open_bundle
    from infexport.bundle.provenance import check_provenance
    from infexport.bundle.summary import manifest_lines, summary_lines
    from infexport.cli import sections
    from infexport.evaluation.inspect import list_parts, read_graph, resolutions
    from infexport.inference.planner import usual_memory

    out = Output(as_json)
    opened = open_bundle(bundle, verify=False)
    out.bundle_warnings(opened)
    limit = usual_memory()  # before the graph is loaded, which takes some of it
    provenance, graph = check_provenance(opened), read_graph(opened, provider, engine)
    parts, sized = list_parts(opened.manifest.config), resolutions(opened, sizes, limit)
    for line in [*summary_lines(opened), *manifest_lines(opened)]:
        out.data(line)
    sections.provenance(out, opened, provenance)
    sections.graph(out, graph)
    sections.parameters(out, opened, parts)
    sections.resolutions(out, opened, sized, limit)
    sections.engines(out, opened)
    found = graph.to_dict()
    document = opened.to_dict() | {
        "provenance": asdict(provenance),
        "inputs": found.pop("inputs"),
        "outputs": found.pop("outputs"),
        "operators": found,
        "parts": [asdict(part) for part in parts],
        "memory_limit": limit,
        "resolutions": [asdict(one) for one in sized],
    }
    if provider or engine:
        document["placement"] = graph.placement
    out.document(document)
    whole = opened.verified and all(engine.state in ("current", "stale") for engine in opened.engines)
    raise click.exceptions.Exit(0 if whole else 1)
