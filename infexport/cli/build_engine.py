"""`infexport build-engine`."""

from __future__ import annotations

import time
from pathlib import Path

import click

from infexport.cli.output import Output


@click.command("build-engine", short_help="Build a TensorRT engine from BUNDLE.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--target", type=click.Choice(["a100"]), required=True, help="GPU to build for.")
@click.option("--precision", type=click.Choice(["fp32"]), default="fp32", show_default=True, help="Of the engine.")
@click.option("--backend", type=click.Choice(["auto", "tensorrt-rtx"]), default="auto", show_default=True,
              help="Library that builds it; tensorrt-rtx needs no GPU.")  # fmt: skip
@click.option(
    "--max-size",
    type=click.IntRange(min=1),
    help="Largest side of an image.  [default: 4 x trained, >= 1024]",
)
@click.option("--max-batch", type=click.IntRange(min=1), default=8, show_default=True, help="Most images at once.")
@click.option("--json", "as_json", is_flag=True, help="Print the sidecar as JSON.")
def build_engine(
    bundle: Path,
    target: str,
    precision: str,
    backend: str,
    max_size: int | None,
    max_batch: int,
    as_json: bool,
) -> None:
    """Build a TensorRT engine from BUNDLE into its engines/ folder.

    The engine takes any batch and size up to the maxima. Beside it stands a sidecar with its target, profile and
    the hashes of checkpoint, graph and engine.
    """
    from infexport.bundle import open_bundle
    from infexport.engine import build_engine, default_profile
    from infexport.summary import warnings_of

    out = Output(as_json)
    opened = open_bundle(bundle)
    profile = default_profile(opened, max_size, max_batch)
    for line in warnings_of(opened.manifest):
        out.warning(line)
    out.status(f"building for {target} with tensorrt-rtx")
    started = time.perf_counter()
    engine, sidecar = build_engine(opened, target, profile)
    out.warning(sidecar["caveat"])
    out.data(f"engine      {engine} ({sidecar['bytes'] / 1e6:.1f} MB, {time.perf_counter() - started:.1f} s)")
    out.data(f"target      {target}, compute capability {sidecar['compute_capability']}, {precision}")
    (name, (smallest, best, largest)), *_ = sidecar["profile"].items()
    out.data(f"profile     {name} {smallest} to {largest}, best at {best}")
    out.data(f"sha256      {sidecar['sha256']}")
    out.document({"engine": str(engine)} | sidecar)
