"""The page: what it says, and in which words."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from infexport.bundle import Bundle
from infexport.bundle.summary import bundle_warnings, summary_lines
from infexport.evaluation.parity.layers import MULTIPLE
from infexport.evaluation.parity.result import Case, ParityResult
from infexport.evaluation.report import figures
from infexport.evaluation.report.environment import collect_facts
from infexport.evaluation.report.order import short_names, worst_first
from infexport.evaluation.report.worst_inputs import find_examples
from infexport.outputs.files import check_writable, drawing_errors, written

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

ELSEWHERE = "choose a --report that can be written to"
ROWS = 200
"""Inputs in the table: of a folder of thousands the worst are what a reader looks for."""
LAYERED = 4
"""Inputs whose layers are shown."""


def check_report(path: Path) -> None:
    """Find out before the long work, not after it, that a report cannot be written.

    Raises:
        InfexportError: not an .html file, or a place that cannot be written to.
    """
    check_writable(path, "report", (".html",), ELSEWHERE)


def write_report(report: ParityResult, bundle: Bundle, command: str, path: Path, threads: int | None = None) -> None:
    """Write the page; it appears when it is whole.

    Args:
        report: what was found.
        bundle: what was judged.
        command: that was given, as a shell takes it.
        path: the page.
        threads: of ONNX Runtime, which runs the worst images again for their centrality.

    Raises:
        InfexportError: it cannot be written.
    """
    with drawing_errors(path, "report"):
        html = page(report, bundle, command, threads)
    with written(path, "report", ELSEWHERE) as file:
        file.write(html.encode("utf-8", "replace"))  # a file name may be no UTF-8


def page(report: ParityResult, bundle: Bundle, command: str, threads: int | None = None) -> str:
    """The whole page, HTML."""
    said = Said(report)
    return _environment().get_template("page.html").render(
        report=report,
        said=said,
        summary=[(line[:12].strip(), line[12:]) for line in summary_lines(bundle)],
        warnings=bundle_warnings(bundle.manifest),
        rows=said.cases[:ROWS],
        names=short_names(report.cases),
        plots=figures.overall(report) if report.cases else [],
        layered=[(case, figures.layers(case, i)) for i, case in enumerate(said.layered[:LAYERED])],
        examples=find_examples(report, bundle, threads),
        facts=collect_facts(report, bundle),
        command=command,
    )  # fmt: skip


@dataclass(frozen=True)
class Said:
    """A report in sentences."""

    report: ParityResult

    @cached_property
    def cases(self) -> list[Case]:
        return worst_first(self.report.cases)

    @property
    def layered(self) -> list[Case]:
        """Cases whose layers were judged: the one that the verdict names, then the worst."""
        named = next((case for case in self.report.cases if case.first_over_budget is not None), None)
        found = (case for case in self.cases if case.parts)
        return sorted(found, key=lambda case: (case is not named, case.first_over_budget is None))

    @property
    def why(self) -> str:
        """One sentence: where it fails, or how much room there was."""
        if self.report.first_over_budget:
            return f"{_capital(self.report.first_over_budget)}."
        if not self.cases:
            return "Nothing could be compared."
        case, names = self.cases[0], short_names(self.report.cases)
        found, allowed = case.bundle.relative, self.report.tolerance.relative
        where = f"the largest relative error is {number(found)}, at {names[case.name]}"
        if not math.isfinite(found):
            return f"At {names[case.name]} the bundle's answer is not finite."
        if not case.bundle and found <= allowed:
            return f"At {names[case.name]} the bundle's first class is another than PyTorch's."
        if not case.bundle:
            return f"{_capital(where)}: {found / allowed:,.1f} times the tolerance."
        if self.report.failed:
            return f"{_count(len(self.report.failed), 'input')} could not be compared; of the others, {where}."
        return f"{_capital(where)}: {share(found / allowed)} of the tolerance."

    @property
    def rule(self) -> str:
        """Return the rule of the verdict, in words."""
        rule = self.report.tolerance
        bound = f"{rule.factor} · ε · √depth".replace(" ", "\u00a0")
        text = (
            f"The truth is infexport's own network in PyTorch, in float64, with the checkpoint's weights. Of every "
            f"input the logits' relative error, ‖x − truth‖ / ‖truth‖, may be {bound} = {number(rule.relative)} in "
            f"{rule.precision} "
            f"(ε = 2{_power(rule.epsilon)}, depth {rule.depth}; where logits are less than what they are sums of, "
            f"relative to the size of these terms); all must be finite, and the first class the same "
            f"wherever its lead is larger than the tolerance lets two logits move."
        )
        if any(case.parts for case in self.report.cases):
            text += (
                f" Every part of the network is also judged alone, on what it was given: its own error may be "
                f"{MULTIPLE} standard deviations of what rounding does to it."
            )
        return text

    @property
    def numbers(self) -> list[tuple[str, str]]:
        """The few that matter, by name."""
        cases, parts = self.report.cases, [part for case in self.report.cases for part in case.parts]
        if not cases:
            return []
        rows = sum(len(case.logits) for case in cases)
        same = round(sum(case.bundle.top1_agreement * len(case.logits) for case in cases))
        found = [
            ("largest relative error", number(self.cases[0].bundle.relative)),
            ("tolerance", number(self.report.tolerance.relative)),
            ("PyTorch float32's own", number(float(np.max([case.torch.relative for case in cases])))),
            ("inputs within tolerance", f"{sum(map(bool, (case.bundle for case in cases)))} of {len(cases)}"),
            ("images, same first class", f"{same} of {rows}"),
        ]
        if parts:
            found.append(("parts within budget", f"{sum(map(bool, parts))} of {len(parts)}"))
        return found


def number(value: float) -> str:
    """Return a number as the command line prints it."""
    return f"{value:.1e}" if math.isfinite(value) else "not finite"


def share(value: float) -> str:
    """A part of a whole."""
    if not math.isfinite(value):
        return "-"
    percent = 100 * value
    if percent >= 1000:
        return f"{value:,.0f}×"
    return f"{percent:.1g}%" if percent < 0.1 else f"{percent:.1f}%" if percent < 10 else f"{percent:,.0f}%"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _count(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _whole(text: str) -> Markup:
    """With numbers that no line is broken in."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"\d\.\de[-+]\d+", r'<span class="whole">\g<0></span>', str(escape(text))))


def _power(value: float) -> str:
    return str(round(math.log2(value))).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _environment() -> Environment:
    import jinja2

    found = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # names of files, labels and messages are anyone's
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Any] = {"number": number, "share": share, "count": _count, "whole": _whole}
    found.filters.update(filters)
    return found
