"""Checkpoint → bundle."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch.export import Dim

from infexport.bundle import Bundle, create_bundle
from infexport.bundle.integrity import sha256
from infexport.bundle.manifest import (
    CENTRALITY_MODEL,
    FILE,
    MODEL,
    Calibration,
    CheckpointRecord,
    Manifest,
    NeumannSeries,
    Stage,
    read_manifest,
)
from infexport.conversion.activations import add_centrality, name_operators, tokens_names, with_outputs
from infexport.conversion.bundle_writer import BundleWriter
from infexport.conversion.calibration import batches, calibrate
from infexport.conversion.image_model import ImageModel
from infexport.conversion.neumann_terms import measure_truncation
from infexport.conversion.onnx_export import MAX_GRID, export_model
from infexport.conversion.passes import ActivationStats, Unrepresentable, lower
from infexport.conversion.stages import export_stages
from infexport.errors import InfexportError
from infexport.images.transform import Preprocessing
from infexport.inference.centrality import CENTRALITY
from infexport.system.progress import (
    SILENT,
    ProgressListener,
    Status,
)
from infexport.system.untrusted_files import parse_json, read_small
from infsa_ops.neumann_kernel import bounds
from infvit.checkpoint import Checkpoint, build_network, load_checkpoint
from infvit.config import MAX_TERMS
from infvit.errors import CheckpointError
from infvit.fold import fold
from infvit.network import InfViT

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
OUTPUTS = ("logits", "features")


@dataclass(frozen=True)
class ConvertOptions:
    """Options of a conversion, checked when they are made; None where the user did not say.

    Raises:
        InfexportError: options that exclude each other.
    """

    variant: str | None = None
    num_heads: int | None = None
    layout: str = "auto"
    config_file: Path | None = None
    labels_file: Path | None = None
    rho: float | None = None
    norm_eps: float | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    neumann_terms: int | None = None
    neumann_tol: float | None = None
    input: str = "uint8"
    precision: str = "fp32"
    calibrate: tuple[Path, ...] = ()
    fold: bool = True
    force: bool = False

    def __post_init__(self) -> None:
        if self.neumann_terms is not None and self.neumann_tol is not None:
            raise InfexportError("--neumann-terms and --neumann-tol exclude each other", hint="give one")
        if self.calibrate and self.precision != "int8":
            raise InfexportError(
                "--calibrate is for --precision int8",
                f"received --precision {self.precision}, which has no ranges to fix",
                "leave out one of the two",
            )


def read_checkpoint(path: Path, options: ConvertOptions) -> Checkpoint:
    """Read a checkpoint by `infvit`, and raise its errors as ours.

    Raises:
        InfexportError: a checkpoint that cannot be read, or that does not say enough.
    """
    try:
        return load_checkpoint(
            path,
            variant=options.variant,
            num_heads=options.num_heads,
            layout=options.layout,
            config_file=options.config_file,
            labels=None if options.labels_file is None else _read_labels(options.labels_file),
            mean=options.mean,
            std=options.std,
            rho=options.rho,
            norm_eps=options.norm_eps,
            neumann_terms=options.neumann_terms,
        )
    except CheckpointError as error:
        raise InfexportError(error.summary, error.details, error.hint) from error


def convert(path: Path, output: Path, options: ConvertOptions, listener: ProgressListener = SILENT) -> Bundle:
    """Convert a checkpoint to a bundle.

    Args:
        path: a `.pth`, `.pt` or `.safetensors` file or a Hugging Face folder.
        output: the bundle to make; it appears once it is complete.
        options: facts that the checkpoint does not state.
        listener: receives every step, and every calibration image that is done.

    Raises:
        InfexportError: bad input, or an output that cannot be written.
    """
    with create_bundle(output, options.force) as folder:
        writer = BundleWriter(folder)
        # 1: the checkpoint, and 2: the facts that it does not state
        listener.on_event(Status(f"reading {path}"))
        checkpoint = read_checkpoint(path, options)
        network = build_network(checkpoint)
        neumann, overridden = _fix_series(network, checkpoint, options)
        preprocessing, assumed = _preprocessing(checkpoint)
        if checkpoint.labels is not None:
            writer.add_labels(checkpoint.labels)
        # 3: exact rewrites
        rewritten = fold(network) if options.fold else network
        model = ImageModel(rewritten, preprocessing.mean, preprocessing.std, options.input, options.fold).eval()
        # 4: the whole graph, and 5: the stages, which share its weights
        listener.on_event(Status("exporting to ONNX"))
        images = batches(options.calibrate, network.config.patch_size, preprocessing, options.input, listener)
        stats = _add_whole(writer, model, options.precision, folder, images if options.calibrate else None)
        stages = _add_stages(writer, model, options.precision, stats) if options.fold else None
        # 6: the manifest
        listener.on_event(Status("hashing"))
        manifest = Manifest(
            config=network.config,
            layout=checkpoint.layout,
            finetuned=checkpoint.finetuned,
            rho=checkpoint.rho,
            preprocessing=preprocessing,
            assumed=assumed,
            overridden=overridden,
            unread=list(checkpoint.unread),
            input=options.input,
            precision=options.precision,
            folded=options.fold,
            parameters=sum(p.numel() for p in network.parameters()),
            neumann=neumann,
            # not resolved: a link's own name is what its folder's listing shows
            checkpoint=CheckpointRecord(str(path.absolute()), {f.name: sha256(f) for f in checkpoint.files}),
            versions=_versions(),
            files={},  # filled in by `finish`
            calibration=Calibration(len(options.calibrate)) if options.calibrate else None,
            stages=stages,
        )
        writer.finish(manifest)
    # hashed a moment ago: to verify it would read everything again
    return Bundle(output, read_manifest(output / FILE))


def _add_whole(
    writer: BundleWriter, model: ImageModel, precision: str, folder: Path, images: Iterator[NDArray[Any]] | None
) -> dict[str, ActivationStats] | None:
    """Export, lower and add the whole graph, and the one that also gives centrality.

    Returns:
        The statistics of the activations, where images were given.
    """
    graph, stats = _export(model), None
    if images is not None:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            ir.save(with_outputs(graph, OUTPUTS), Path(scratch) / MODEL, external_data=f"{MODEL}.data")
            stats = calibrate(Path(scratch) / MODEL, images)
    config = model.network.config
    name_operators(graph.graph, config.variant)
    add_centrality(graph, config.neumann_terms, [attention.rho for attention in model.network.attentions])
    _lower(graph, precision, stats, model)
    writer.add_graph(with_outputs(graph, OUTPUTS), MODEL)
    writer.add_graph(with_outputs(graph, [*OUTPUTS, CENTRALITY]), CENTRALITY_MODEL)
    return stats


def _add_stages(
    writer: BundleWriter, model: ImageModel, precision: str, stats: dict[str, ActivationStats] | None
) -> list[Stage]:
    stages = []
    for stage, graph in export_stages(model):
        if graph is not None:
            _lower(graph, precision, stats, model)
            writer.add_graph(graph, stage.graph)
        stages.append(stage)
    return stages


def _fix_series(
    network: InfViT, checkpoint: Checkpoint, options: ConvertOptions
) -> tuple[NeumannSeries | None, list[str]]:
    """Decide the terms of the Neumann series; return it, and sentences on values that were overridden."""
    overridden = list(checkpoint.overridden)
    neumann = _fix_terms(network, options)
    stated, terms = checkpoint.config.neumann_terms, network.config.neumann_terms
    if options.neumann_tol is not None and stated not in (1, terms):
        overridden.append(f"{terms} terms by --neumann-tol are used, not neumann_terms in a config: {stated}")
    return neumann, overridden


def _lower(graph: ir.Model, precision: str, stats: dict[str, ActivationStats] | None, model: ImageModel) -> None:
    """Lower a graph; refuse weights that are not finite then, by the network's own names."""
    try:
        lower(graph, precision, stats)
    except Unrepresentable as error:
        name = _parameter_name(error.weight, model)
        raise InfexportError(f"a weight does not fit {precision}: {name}", error.details, error.hint) from error
    for name, value in graph.graph.initializers.items():
        tensor = value.const_value
        if tensor is None or not tensor.dtype.is_floating_point():
            continue
        infinite = ~np.isfinite(tensor.numpy())
        if infinite.any():
            raise InfexportError(
                f"the model as it is written has weights that are not finite: {name.removeprefix('network.')}",
                f"received {int(infinite.sum())} such values of {infinite.size}: products of weights exceed float32",
                "keep the weights as they are: --no-fold --precision fp32",
            )


def _parameter_name(weight: NDArray[Any], model: ImageModel) -> str:
    """Return the parameter that has the numbers of a graph's weight, in whatever order."""
    numbers = np.sort(weight, axis=None)
    for name, parameter in model.named_parameters():
        if parameter.numel() == weight.size and np.array_equal(np.sort(parameter.detach().numpy(), axis=None), numbers):
            return re.sub(r"^network\.|(?<=\.)(?:attention|layer)\.", "", name)
    return "a product of several"


def _fix_terms(network: InfViT, options: ConvertOptions) -> NeumannSeries | None:
    """Decide T from the options, set it on the network, and return it with bounds on the rest."""
    if network.config.variant != "pure_infsa":
        if options.neumann_tol is not None:
            raise InfexportError(
                "linear_infsa has no Neumann series",
                "received --neumann-tol with variant linear_infsa",
                "leave the option out, or convert with --variant pure_infsa",
            )
        return None
    terms = network.config.neumann_terms
    if options.neumann_tol is not None:
        terms = _terms_for(network.largest_rho(), options.neumann_tol)
    if terms > MAX_TERMS or (terms > 1 and network.largest_rho() == 1):
        raise InfexportError(
            "the Neumann series has too many terms",
            f"received {terms} terms and a discount of {network.largest_rho():.6g}, "
            f"expected at most {MAX_TERMS} terms and a discount below 1",
            "give fewer --neumann-terms or a larger --neumann-tol",
        )
    network.set_neumann_terms(terms)
    if terms == 1:
        return NeumannSeries(1)  # what the reference package computes and trains with: nothing is truncated
    return NeumannSeries(terms, **measure_truncation(network))


def _terms_for(rho: float, tolerance: float) -> int:
    try:
        return bounds.terms_for(rho, tolerance)
    except ValueError as error:
        raise InfexportError(
            "no number of terms reaches this --neumann-tol", str(error), "choose T yourself: --neumann-terms"
        ) from error


def _preprocessing(checkpoint: Checkpoint) -> tuple[Preprocessing, dict[str, Any]]:
    size, found = checkpoint.config.image_size, checkpoint.preprocessing
    default = {
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
        "resize_mode": "shortest",
        "resize_size": found.get("crop_size", size),
        "crop_size": size,
        "interpolation": "bicubic",
    }
    assumed = {name: value for name, value in default.items() if name not in found}
    return Preprocessing(**default | found), dict(checkpoint.assumed) | assumed


def _read_labels(file: Path) -> list[Any] | dict[str, Any]:
    """Read one label a line, or a JSON list or object in a form that `infvit.checkpoint` reads."""
    try:
        text = read_small(file).decode("utf-8-sig")  # with or without a byte order mark
        if not text.lstrip().startswith(("[", "{")):
            return text.replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n").split("\n")
        values: list[Any] | dict[str, Any] = parse_json(text)
        return values
    except (OSError, ValueError) as error:
        raise InfexportError(
            f"cannot read the labels: {file}",
            f"{type(error).__name__}: {error}",
            "expected one label a line, a JSON list, or a JSON object of index to label or label to index",
        ) from error


def _export(model: ImageModel) -> ir.Model:
    patch = model.network.config.patch_size
    grid_height, grid_width = (Dim(name, min=1, max=MAX_GRID) for name in ("grid_height", "grid_width"))
    height, width = patch * grid_height, patch * grid_width
    # sizes that differ from each other and from the trained one, so that none is taken for a constant
    if model.takes == "uint8":
        example = torch.zeros(2, 3 * patch, 5 * patch, 3, dtype=torch.uint8)
        shapes = {0: Dim("batch"), 1: height, 2: width}
    else:
        example = torch.zeros(2, 3, 3 * patch, 5 * patch)
        shapes = {0: Dim("batch"), 2: height, 3: width}
    names = [*OUTPUTS, *tokens_names(model.network.config.depth)]
    with model.observing():
        return export_model(model, (example,), (shapes,), [model.input_name], names)


def _versions() -> dict[str, str]:
    packages = ("infexport", "torch", "onnx", "onnx-ir", "onnxscript")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}
