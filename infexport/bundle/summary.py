"""Descriptions of a bundle for people."""

from __future__ import annotations

import dataclasses
import textwrap
from typing import Any

from infexport.bundle.bundle import Bundle
from infexport.bundle.manifest import Manifest


def bundle_warnings(manifest: Manifest) -> list[str]:
    """Return warnings that a user must read before trusting the answers."""
    overridden = [f"a config of the checkpoint says otherwise: {sentence}" for sentence in manifest.overridden]
    if manifest.finetuned:
        return overridden
    return [
        *overridden,
        "a softmax ViT's weights, not fine-tuned with this attention: its answers are not yet good "
        f"(variant {manifest.config.variant}, layout {manifest.layout})",
    ]


def summary_lines(bundle: Bundle) -> list[str]:
    """The bundle's facts, a line each."""
    manifest, config = bundle.manifest, bundle.manifest.config
    size, patch = config.image_size, config.patch_size
    lines = [
        f"bundle      {bundle.path}" + ("" if bundle.verified else f"  (modified: {', '.join(bundle.changed)})"),
        f"model       {config.variant}, {manifest.parameters:,} parameters, {config.depth} layers, "
        f"embed_dim {config.embed_dim}, {config.num_heads} heads, {config.num_classes} classes",
        f"images      trained at {size}x{size}, patch {patch}; any size that is a multiple of {patch}",
        f"input       {_input(manifest)}",
        f"precision   {_precision(manifest)}{', folded' if manifest.folded else ''}",
        f"digest      {manifest.digest}",
        f"checkpoint  {manifest.checkpoint.path} (layout {manifest.layout})",
        f"streaming   {f'{len(manifest.stages)} stages' if manifest.stages else 'no stages: whole images only'}",
    ]
    if manifest.neumann and manifest.neumann.terms > 1:
        neumann = manifest.neumann
        lines.append(
            f"neumann     {neumann.terms} terms; the rest is at most {neumann.a_priori_bound:.1e} of the values "
            f"for any image (a priori), {neumann.a_posteriori_bound:.1e} on noise (a posteriori)"
        )
    return lines


def manifest_lines(bundle: Bundle) -> list[str]:
    """Return further lines for `inspect`: preprocessing, and what was assumed."""
    manifest = bundle.manifest
    transform = dataclasses.asdict(manifest.preprocessing)
    pixels = {name: transform.pop(name) for name in ("mean", "std")}
    lines = [f"pixels      {_facts(pixels)}", f"transform   {_facts(transform)}"]
    if manifest.assumed:
        lines += textwrap.wrap(f"assumed     {_facts(manifest.assumed)}", 116, subsequent_indent=" " * 12)
    if manifest.unread:
        lines += textwrap.wrap(f"unread      {', '.join(manifest.unread)}", 116, subsequent_indent=" " * 12)
    return lines


def _facts(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _precision(manifest: Manifest) -> str:
    if manifest.precision != "int8":
        return manifest.precision
    if manifest.calibration is None:
        return "int8, ranges of activations found at run time, over all images of a batch"
    return f"int8, ranges of activations fixed by {manifest.calibration.images} images"


def _input(manifest: Manifest) -> str:
    return "uint8 image [B,H,W,3]" if manifest.input == "uint8" else "normalised float32 pixels [B,3,H,W]"
