"""`infexport convert checkpoint`."""

from __future__ import annotations

import dataclasses
import gc
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import click

from infexport.bundle.manifest import PRECISIONS
from infexport.cli.console import Output
from infexport.system.dependencies import require

LAYOUTS_HELP = (
    "Naming scheme of the checkpoint's parameters: auto, reference, torchvision, timm, transformers, transformers4 or "
    "transformers4_wrapped."
)


CONFIG_HELP = "JSON object with what shapes don't show (num_heads, variant, labels, mean, std, …), or Hugging Face's."


class Floats(click.ParamType[tuple[float, ...]]):
    """Three finite numbers `R,G,B`, each above `least`."""

    name = "R,G,B"

    def __init__(self, least: float = -math.inf) -> None:
        self.least = least

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return value
        try:
            numbers = tuple(float(part) for part in value.split(","))
        except ValueError:
            numbers = ()
        if len(numbers) != 3 or not all(math.isfinite(number) and number > self.least for number in numbers):
            positive = "" if self.least < 0 else " above 0"
            self.fail(f"{value!r} is not three numbers{positive} separated by commas, such as 0.5,0.5,0.5", param, ctx)
        return numbers


@contextmanager
def _garbage_collection_paused() -> Iterator[None]:
    """Pause Python's cyclic garbage collector.

    Importing torch and exporting make millions of lasting objects. Scanning them repeatedly took a sixth of a
    conversion's time. The uncollected garbage is tens of megabytes and holds no tensors.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@click.group()
def convert() -> None:
    """Convert a trained model to a bundle."""


@convert.command(short_help="Convert a checkpoint to ONNX.")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--output", "-o", type=click.Path(path_type=Path), required=True, help="Folder of the new bundle.")
@click.option("--force", is_flag=True, help="Replace an existing bundle.")
@click.option("--variant", metavar="[linear_infsa|pure_infsa]", help="Attention variant of the model.")
@click.option("--num-heads", type=click.IntRange(min=1), help="Attention heads.")
@click.option("--layout", default="auto", show_default=True, help=LAYOUTS_HELP)
@click.option(
    "--config",
    "config_file",
    type=click.Path(path_type=Path),
    help=CONFIG_HELP,
)
@click.option(
    "--labels",
    "labels_file",
    type=click.Path(path_type=Path),
    help="Class names: lines, or JSON, such as imagenet_class_index.json.",
)
@click.option("--rho", type=float, help="Discount, if the checkpoint has none.  [default: 0.95]")
@click.option("--norm-eps", type=click.FloatRange(min=0, min_open=True), help="Epsilon of the LayerNorms.")
@click.option("--mean", type=Floats(), help="Mean of the pixels in [0, 1].  [default: ImageNet's]")
@click.option("--std", type=Floats(least=0), help="Standard deviation of the pixels.  [default: ImageNet's]")
@click.option("--neumann-terms", type=click.IntRange(min=1), help="Terms of the Neumann series.  [default: 1]")
@click.option(
    "--neumann-tol",
    type=click.FloatRange(min=0, min_open=True),
    help="Use as many terms as needed for a truncation error of at most this, relative to the values, for any image.",
)
@click.option("--precision", type=click.Choice(PRECISIONS), default="fp32", show_default=True,
              help="Precision of the per-token layers. int8 is for CPUs, fp16 for GPUs.")  # fmt: skip
@click.option(
    "--calibrate",
    type=click.Path(path_type=Path),
    metavar="IMAGES",
    help="Image or folder to calibrate int8 activation ranges with.  [default: ranges found at run time]",
)
@click.option("--input", type=click.Choice(["uint8", "float32"]), default="uint8", show_default=True,
              help="RGB image [B,H,W,3], or normalised pixels [B,3,H,W].")  # fmt: skip
@click.option(
    "--fold/--no-fold",
    default=True,
    show_default=True,
    help="Rewrite the model exactly, to compute less.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the manifest as JSON.")
def checkpoint(checkpoint: Path, output: Path, calibrate: Path | None, as_json: bool, **options: Any) -> None:
    """Convert CHECKPOINT (.pth, .pt, .safetensors or a Hugging Face folder) to ONNX.

    The bundle holds model.onnx, its weights and infexport.json, which records what was converted and how. The folder
    appears only once it is complete.
    """
    out = Output(as_json)
    require("torch", "onnx", "onnx_ir", "onnxscript", "safetensors", extra="export")
    with _garbage_collection_paused():
        from infexport.bundle.summary import summary_lines
        from infexport.cli.progress import ConsoleProgress
        from infexport.conversion.convert import ConvertOptions, convert
        from infexport.images.decode import find_images

        settings = ConvertOptions(calibrate=() if calibrate is None else (calibrate,), **options)
        images = tuple(find_images(settings.calibrate)) if settings.calibrate else ()
        settings = dataclasses.replace(settings, calibrate=images)
        with out.progress(len(images), "calibrating") if images else nullcontext() as bar:
            bundle = convert(checkpoint, output, settings, ConsoleProgress(out, bar))
    for name, value in bundle.manifest.assumed.items():
        out.status(f"assumed {name.replace('_', ' ')}: {value}")
    for word in bundle.manifest.unread:
        out.status(f"not read: {word}")
    out.bundle_warnings(bundle)
    for line in summary_lines(bundle):
        out.data(line)
    out.document(bundle.to_dict())
