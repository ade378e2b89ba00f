"""`infexport build-engine`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from infexport.cli.console import Output
from infexport.cli.options import Bytes, Numbers, Sizes


@click.command("build-engine", short_help="Build TensorRT engines from BUNDLE.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--target", required=True, metavar="GPU",
              help="GPU to build for: a100, h100, l4, …, its compute capability, such as sm_80, or local.")  # fmt: skip
@click.option("--precision", type=click.Choice(["fp32", "tf32", "fp16", "bf16", "int8"]), default="fp32",
              show_default=True,
              help="Precision of the per-token layers; norms, sums and states stay float32.")  # fmt: skip
@click.option("--backend", type=click.Choice(["auto", "tensorrt", "tensorrt-rtx"]), default="auto", show_default=True,
              help="Library to build with: tensorrt on the GPU itself, tensorrt-rtx on any machine.")  # fmt: skip
@click.option("--execution", type=click.Choice(["whole", "stream"]), default="whole", show_default=True,
              help="One engine of the whole graph, or one per stage, for images of any size.")  # fmt: skip
@click.option("--sizes", type=Sizes(), metavar="MIN,OPT,MAX",
              help="Sizes of images, N or HxW.  [default: patch, trained, 4 x trained or 1024]")  # fmt: skip
@click.option("--batch", type=Numbers(), metavar="MIN,OPT,MAX", help="Images per batch.  [default: 1,1,8]")
@click.option(
    "--chunk", type=click.IntRange(min=1), default=8192, show_default=True, help="Tokens per chunk when streaming."
)
@click.option("--calibrate", type=click.Path(path_type=Path), multiple=True,
              help="For int8: an image or folder to calibrate activation ranges with.")  # fmt: skip
@click.option("--memory", type=Bytes(), help="GPU memory limit for the largest images.  [default: all of it]")
@click.option("--json", "as_json", is_flag=True, help="Print the sidecars as JSON.")
def build_engine(
    bundle: Path,
    target: str,
    precision: str,
    backend: str,
    execution: Any,
    sizes: list[tuple[int, int]] | None,
    batch: list[int] | None,
    chunk: int,
    calibrate: tuple[Path, ...],
    memory: int | None,
    as_json: bool,
) -> None:
    """Build TensorRT engines from BUNDLE, an fp32 bundle, into its engines/ folder.

    An engine takes any batch and size between the first and the last of --batch and --sizes, and is fastest at the
    second. Its sidecar, a JSON file next to it, records target, profile, build log and the hashes of checkpoint, graph
    and engine.
    """
    from infexport.bundle import open_bundle
    from infexport.cli.progress import BuildProgress
    from infexport.conversion.tensorrt.build import Plan, build_engines
    from infexport.conversion.tensorrt.profiles import make_profile
    from infexport.images.decode import find_images
    from infexport.inference.tensorrt_libraries import choose
    from infexport.system.gpus import find_target, local_gpu

    out = Output(as_json)
    opened = open_bundle(bundle)
    aim = find_target(target)
    gpu = local_gpu()
    library, why = choose(backend, aim, gpu)
    profile = make_profile(opened.manifest, sizes, batch)
    files = tuple(find_images(calibrate)) if calibrate else ()
    plan = Plan(aim, library, precision, execution, profile, gpu, chunk, files, memory)
    out.bundle_warnings(opened)
    out.status(f"building for {aim.name}, compute capability {aim.capability}, with {library.name}: {why}")

    progress = BuildProgress(out)
    try:
        made = build_engines(opened, plan, progress)
    finally:
        progress.clear()
    if library.caveat:
        out.warning(library.caveat)
    out.data(f"target      {aim.name}, compute capability {aim.capability}, {precision}")
    for engine, record in made:
        out.data(f"engine      {engine} ({record.bytes / 1e6:.1f} MB, {record.seconds:.1f} s)")
        for name, shapes in record.profile.items():
            out.data(f"profile     {name} {shapes.min} to {shapes.max}, best at {shapes.opt}")
        out.data(f"sha256      {record.sha256}")
    out.document([{"engine": str(engine)} | record.to_dict() for engine, record in made])
