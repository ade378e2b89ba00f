"""`infexport validate accuracy`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from infexport.cli.console import Output
from infexport.cli.options import (
    batch_size_option,
    chunk_option,
    edge_option,
    execution_option,
    memory_option,
    pick,
    size_option,
    threads_option,
)
from infexport.cli.providers import engine_option, provider_option
from infexport.errors import InfexportError
from infexport.system.dependencies import require

if TYPE_CHECKING:
    from infexport.bundle import Bundle
    from infexport.evaluation.accuracy.evaluate import AccuracyResult
    from infexport.evaluation.accuracy.metrics import OfClass, Share
    from infexport.evaluation.checkpoint_reference import CheckpointRunnerFactory

ALL_CLASSES, WORST, DISAGREEMENTS = 20, 10, 20
"""Rows shown: up to ALL_CLASSES classes all of them, else the WORST least often right; disagreements."""


@click.command(short_help="Measure accuracy on labelled images.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("data", type=click.Path(path_type=Path))
@click.option("--checkpoint", type=click.Path(path_type=Path), help="Compare with this one.  [default: the recorded]")
@click.option("--no-pytorch", is_flag=True, help="Check BUNDLE alone: needs neither the checkpoint nor torch.")
@click.option("--min-top1", type=click.FloatRange(0, 1), metavar="SHARE", help="Exit code 1 if top-1 is less, 0 to 1.")
@click.option("--output", "-o", type=click.Path(path_type=Path), help="Write every image's prediction to a .csv file.")
@size_option
@edge_option
@execution_option
@memory_option
@chunk_option
@provider_option()
@engine_option
@batch_size_option("Images of equal grid per batch, in PyTorch too.")
@threads_option
@click.option("--no-verify", is_flag=True, help="Check a bundle whose hashes differ; the report says so.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def accuracy(
    bundle: Path,
    data: Path,
    checkpoint: Path | None,
    no_pytorch: bool,
    min_top1: float | None,
    output: Path | None,
    no_verify: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Measure how often BUNDLE is right on DATA, and how often it agrees with its checkpoint in PyTorch.

    DATA is a folder with a folder of images per class, or a .csv file with columns 'file', relative to it, and 'label'.
    Either all classes are named by their labels or, where one is no label, all by their indices. Intervals are 95%
    Wilson score intervals.

    Exit code 1 when top-1 is below --min-top1, or when an image has no prediction. Such an image counts neither as
    right nor as wrong.
    """
    from infexport.bundle import open_bundle
    from infexport.cli.progress import ConsoleProgress
    from infexport.evaluation.accuracy.dataset import Classes, read_labelled
    from infexport.evaluation.accuracy.evaluate import SUFFIXES, evaluate
    from infexport.inference.options import InferenceOptions
    from infexport.outputs.files import check_apart, check_writable
    from infexport.outputs.results import ELSEWHERE

    out = Output(as_json)
    if no_pytorch and checkpoint is not None:
        raise click.UsageError("--checkpoint with --no-pytorch: leave one of the two out")
    batch_size = given.pop("batch_size")
    # a streamed image is run alone, so the batch size is then PyTorch's
    alone = given["execution"] == "stream" and not no_pytorch
    options = pick(InferenceOptions, given, batch_size=1 if alone else batch_size)
    opened = open_bundle(bundle, verify=not no_verify)
    classes = Classes(opened.manifest.config.num_classes, opened.labels)
    images = read_labelled(data, classes)
    if output is not None:
        check_writable(output, "output", SUFFIXES, ELSEWHERE)
        check_apart({output: "output"}, [data, *(image.file for image in images)], "choose another --output")
    network = None if no_pytorch else _network(opened, checkpoint)
    out.bundle_warnings(opened, "the bundle was modified since it was converted; the report describes it as it is now")
    with out.progress(len(images) * (1 if no_pytorch else 2), "images") as bar:
        report = evaluate(
            opened, images, classes, options, ConsoleProgress(out, bar, opened), network, min_top1, batch_size
        )
    _show(out, report)
    out.document(report.to_dict())
    for failure in report.failed:
        out.error(failure.error)
    if output is not None:
        report.write(output)
        out.status(f"wrote {output}")
    raise click.exceptions.Exit(0 if report else 1)


def _network(bundle: Bundle, checkpoint: Path | None) -> CheckpointRunnerFactory:
    """Return what opens the named checkpoint, or else the recorded one, in PyTorch."""
    try:
        require("torch", "safetensors", extra="export")
        from infexport.evaluation.checkpoint_reference import CheckpointRunnerFactory
        from infexport.evaluation.recorded_checkpoint import recorded_checkpoint

        return CheckpointRunnerFactory(bundle, checkpoint or recorded_checkpoint(bundle))
    except InfexportError as error:
        hint = "; ".join(filter(None, [error.hint, "or check the bundle alone: --no-pytorch"]))
        raise InfexportError(error.summary, error.details, hint) from error


def _show(out: Output, report: AccuracyResult) -> None:
    found = report.accuracy
    out.data(f"{len(report.images)} images of {len(found.classes)} classes, on {report.ran}{_streamed(report)}")
    if not report.images:
        return
    out.data(f"top-1: {_share(found.top1)}")
    if found.top5 is not None:
        out.data(f"top-5: {_share(found.top5)}")
    _show_classes(out, report)
    _show_pytorch(out, report)
    rates = _rate(report.rate)
    if report.pytorch is not None:
        rates += f", PyTorch {_rate(report.pytorch_rate)} ({report.pytorch})"
    out.data(f"images per second: {rates}; with reading them, without loading the model")
    if report.enough is not None:
        out.data(_verdict(report))


def _show_classes(out: Output, report: AccuracyResult) -> None:
    classes: Sequence[OfClass] = report.accuracy.classes
    if len(classes) > ALL_CLASSES:
        classes = sorted(classes, key=lambda one: one.right.share)[:WORST]
        out.data(f"the {WORST} classes least often right:")
    out.table(
        ["class", "images", "right", "recall", "most often taken for"],
        [
            [
                report.classes.name(one.index),
                str(one.right.total),
                str(one.right.count),
                f"{one.right.share:.1%}",
                "" if one.confused is None else f"{report.classes.name(one.confused)} ({one.times})",
            ]
            for one in classes
        ],
    )


def _verdict(report: AccuracyResult) -> str:
    held = "holds" if report else "FAILED"
    verdict = f"accuracy {held}: top-1 {report.accuracy.top1.share:.2%}, at least {report.required:.2%} required"
    if count := len(report.failed):
        verdict += f"; {count} image{'' if count == 1 else 's'} could not be judged"
    return verdict if report.verified else f"{verdict} (unverified: the bundle was modified)"


def _show_pytorch(out: Output, report: AccuracyResult) -> None:
    from infexport.evaluation.parity.metrics import NETWORK

    theirs, agreement = report.pytorch_accuracy, report.agreement
    if theirs is None or agreement is None or not report.compared:
        return
    out.data(f"compared: the bundle with {NETWORK}")
    out.data(f"PyTorch's top-1: {_share(theirs.top1)}")
    out.data(f"same top-1 as PyTorch: {_share(agreement.same)}")
    out.data(f"an image's logits differ from PyTorch's by at most {agreement.largest_difference:.1e} of their norm")
    disagreements = report.disagreements()
    if disagreements:
        out.table(
            ["disagreement", "class", "bundle", "", "PyTorch", ""],
            [
                [one["file"], one["label"], *_answer(one["bundle"]), *_answer(one["pytorch"])]
                for one in disagreements[:DISAGREEMENTS]
            ],
        )
    if len(disagreements) > DISAGREEMENTS:
        out.data(f"and {len(disagreements) - DISAGREEMENTS} more: --json or --output has them")


def _share(share: Share) -> str:
    from infexport.evaluation.accuracy.metrics import wilson

    low, high = wilson(share.count, share.total)
    return f"{share.share:.2%}, {share.count} of {share.total}, 95% interval {low:.2%} to {high:.2%}"


def _answer(answer: dict[str, Any]) -> tuple[str, str]:
    return answer["label"], f"{answer['probability']:.2%}"


def _rate(rate: float | None) -> str:
    return "-" if rate is None else f"{rate:.3g}" if rate < 100 else f"{rate:,.0f}"


def _streamed(report: AccuracyResult) -> str:
    """Return how many images were streamed, in parentheses, if any."""
    streamed = [f"{count} {execution}" for execution, count in report.executions().items() if execution != "whole"]
    return f" ({'; '.join(streamed)})" if streamed else ""
