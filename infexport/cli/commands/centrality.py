"""`infexport validate centrality`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import click

from infexport.cli.console import Output
from infexport.cli.options import Numbers, Sizes
from infexport.system.dependencies import require

if TYPE_CHECKING:
    from infexport.evaluation.centrality.check import CentralityResult, HeadReport

_WALK = ("visits", "expected", "off")

CHAINS = {
    "literal": "S as it stands",
    "perron": "D⁻¹SD, the right Perron vector in D",
    "katz": "D⁻¹SD, (I − S)⁻¹1 in D, where that vector has zeros",
}


@click.command(short_help="Compare attention scores with eigenvectors.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--checkpoint", type=click.Path(path_type=Path), help="Checkpoint to examine.  [default: the recorded]")
@click.option("--sizes", type=Sizes(), metavar="N|HxW,…", help="Sizes of synthetic images.  [default: the trained one]")
@click.option("--images", type=click.Path(path_type=Path), help="An image or a folder, at native resolution.")
@click.option("--layers", type=Numbers(0), metavar="N,…", help="Layers to examine, counted from 0.  [default: all]")
@click.option("--walkers", type=click.IntRange(min=1000), default=100_000, show_default=True,
              help="Random walkers that simulate the Markov chain of each head.")  # fmt: skip
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the random walk.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def centrality(
    bundle: Path,
    checkpoint: Path | None,
    sizes: list[tuple[int, int]] | None,
    images: Path | None,
    layers: list[int] | None,
    walkers: int,
    seed: int,
    as_json: bool,
) -> None:
    """Compare the scores of BUNDLE's attention with principal eigenvectors, and its Katz series with a random walk.

    The cosines are reported only. Exit code 0 when the eigenvectors were found and every walk visits the tokens as
    often as the series predicts, within sampling error; 1 otherwise.
    """
    out = Output(as_json)
    require("torch", "safetensors", extra="export")
    from infexport.bundle import open_bundle
    from infexport.cli.progress import ConsoleProgress
    from infexport.evaluation.centrality.check import count_heads, validate_centrality
    from infexport.evaluation.recorded_checkpoint import recorded_checkpoint
    from infexport.images.decode import find_images

    opened = open_bundle(bundle)
    out.bundle_warnings(opened)
    files = [] if images is None else find_images([images])
    if sizes is None:
        sizes = [(opened.manifest.config.image_size,) * 2] if images is None else []
    path = checkpoint or recorded_checkpoint(opened)
    with out.progress((len(sizes) + len(files)) * count_heads(opened, layers), "walking") as bar:
        report = validate_centrality(opened, path, sizes, files, layers, walkers, seed, ConsoleProgress(out, bar))
    _show(out, report)
    out.document(report.to_dict())
    raise click.exceptions.Exit(0 if report else 1)


def _show(out: Output, report: CentralityResult) -> None:
    from infexport.evaluation.centrality.check import MAX_STEPS, PAPER, RESIDUAL
    from infvit.absorbing import ALLOWANCE

    for image in report.images:
        out.data(f"{image.name}, {image.tokens:,} tokens")
        out.table(
            ["layer", "head", "cosine left", "right", "eigenvalue", "row sum", "chain", *_WALK, ""],
            [
                [
                    str(head.layer),
                    str(head.head),
                    _number(head.cosine_left),
                    _number(head.cosine_right),
                    f"{head.eigenvalue:.4f}",
                    f"{head.row_sum:.3f}",
                    head.chain,
                    f"{head.walk.visits:.4f}",
                    f"{head.walk.expected:.4f}",
                    f"{head.walk.errors:.1f}",
                    _verdict(head),
                ]
                for head in image.heads
            ],
        )
    for _, error in report.failed:
        out.error(error)
    scores = "scores" if report.variant == "linear_infsa" else "the scores that the linear variant would have"
    left, right, katz = map(_number, map(report.mean, ("cosine_left", "cosine_right", "katz_cosine_left")))
    out.data(f"cosine of {scores} with the left principal eigenvector: {left} (the paper reports {PAPER})")
    out.data(f"with the right one: {right}; of column Katz with the left one: {katz}")
    for kind, count in report.chains().items():
        out.data(f"chain {kind}: {CHAINS[kind]}, in {count} of {len(report.heads)}")
    terms = f"; this model computes T = {report.terms}" if report.variant == "pure_infsa" else ""
    out.data(f"the chain is that of S = ρÂ and all powers of it{terms}")
    out.data(
        f"tolerance: residual <= {RESIDUAL:.0e} within {MAX_STEPS} steps; {report.walkers:,} walkers are off by at "
        f"most {ALLOWANCE:.0f} standard errors"
    )
    out.data("centrality holds" if report else "centrality FAILED")


def _verdict(head: HeadReport) -> str:
    if head:
        return "ok"
    return "FAILED: the walk" if not head.walk else f"FAILED: residual {head.residual:.0e}"


def _number(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "-"
