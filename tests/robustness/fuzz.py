#!/usr/bin/env python3
"""Bring hostile and damaged inputs to every door of the tool, and see how each ends: in success or in one clear error.

    python tests/robustness/fuzz.py --count 11000 --output fuzz.json --keep violations
    python tests/robustness/fuzz.py --case images:123

A case is decided by the seed, its door and its index. What none may do: print a traceback, take more than 30 s or
1 GiB, write outside the folder of its output, leave temporary files, start a process, run code from its input, end the
process.
"""

from __future__ import annotations

import json
import platform
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
from hostile import supervise
from hostile.cases import Name, Outcome, run_case
from hostile.doors import NAMES, door
from hostile.seeds import Seeds, make_bundle

PACKAGES = ("infexport", "torch", "safetensors", "onnx", "onnxruntime", "pillow", "pyvips", "numpy", "click")
EVERY = 15.0
"""Seconds between lines of progress."""


class Figures:
    """What came of all cases."""

    def __init__(self) -> None:
        self.ends: dict[str, Counter[str]] = defaultdict(Counter)
        self.kinds: dict[str, Counter[str]] = defaultdict(Counter)
        self.seconds: dict[str, float] = defaultdict(float)
        self.grown: dict[str, int] = defaultdict(int)
        self.violations: list[dict[str, Any]] = []

    def add(self, name: Name, outcome: Outcome) -> None:
        self.ends[name.door][outcome.end] += 1
        self.seconds[name.door] += outcome.seconds
        self.grown[name.door] = max(self.grown[name.door], outcome.grown)
        if outcome.end == "violated":
            self.kinds[name.door][outcome.kind] += 1
            self.violations.append({"case": str(name), "kind": outcome.kind, "text": outcome.text})
            click.echo(f"{name}: {outcome.kind}: {ascii(outcome.text)[1:-1]:.300}", err=True)

    @property
    def tried(self) -> int:
        return sum(ends.total() for ends in self.ends.values())

    def to_dict(self) -> dict[str, Any]:
        doors = {
            name: {
                "tried": ends.total(),
                "succeeded": ends["succeeded"],
                "refused": ends["refused"],
                "violations": dict(self.kinds[name]),
                "seconds": round(self.seconds[name], 1),
                "most_memory_mib": round(self.grown[name] / 2**20),
            }
            for name, ends in self.ends.items()
        }
        return {"tried": self.tried, "doors": doors, "violations": self.violations}


def _told(outcomes: Iterable[tuple[Name, Outcome]], count: int, figures: Figures) -> None:
    started = told = time.monotonic()
    for name, outcome in outcomes:
        figures.add(name, outcome)
        if time.monotonic() - told > EVERY:
            told = time.monotonic()
            rate = figures.tried / (told - started)
            left = (count - figures.tried) / rate
            click.echo(
                f"{figures.tried} of {count}, {len(figures.violations)} violations, {rate:.1f}/s, {left:.0f} s left",
                err=True,
            )


@click.command(help=__doc__)
@click.option("--count", type=click.IntRange(min=1), default=1100, show_default=True, help="Inputs in all.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of all that is drawn.")
@click.option("--door", "doors", type=click.Choice(NAMES), multiple=True, help="Only this one.  [default: all]")
@click.option("--case", "single", metavar="DOOR:INDEX", help="One case, in this process, with all that is printed.")
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), help="Write the figures to a .json file.")
@click.option(
    "--bundle", type=click.Path(path_type=Path, exists=True), help="Of digits-linear.  [default: converted anew]"
)
@click.option("--keep", type=click.Path(path_type=Path, file_okay=False), help="Keep the inputs of violations here.")
def main(
    count: int,
    seed: int,
    doors: tuple[str, ...],
    single: str | None,
    output: Path | None,
    bundle: Path | None,
    keep: Path | None,
) -> None:
    with tempfile.TemporaryDirectory(prefix="fuzz-", ignore_cleanup_errors=True) as folder:
        root = Path(folder)
        whole = bundle or make_bundle(root / "bundle")
        if single is not None:
            name, _, index = single.partition(":")
            seeds = Seeds(whole, root / "seeds")
            case = root / "cases" / f"{name}-{int(index)}"
            outcome = run_case(Name(seed, name, int(index)), case, seeds, door(name), loud=True)
            if keep is not None:
                supervise.keep_inputs(case, keep / case.name)
            click.echo(ascii(outcome))
            sys.exit(outcome.end == "violated")
        chosen = doors or NAMES
        names = [Name(seed, chosen[i % len(chosen)], i // len(chosen)) for i in range(count)]
        figures = Figures()
        started = time.monotonic()
        _told(supervise.supervised(names, root, whole, keep), count, figures)
    versions = {name: version(name) for name in PACKAGES} | {"python": platform.python_version()}
    found = {"seed": seed, "wall_seconds": round(time.monotonic() - started, 1), "versions": versions}
    found |= figures.to_dict()
    if output is not None:
        output.write_text(json.dumps(found, indent=2) + "\n")
    for name, one in found["doors"].items():
        each = ", ".join(f"{kind} {number}" for kind, number in one["violations"].items()) or "no violation"
        seconds = 1000 * one["seconds"] / one["tried"]
        click.echo(
            f"{name:<12}{one['tried']:>7} tried, {one['succeeded']} succeeded, {one['refused']} refused, {each}; "
            f"{seconds:.0f} s per 1000, {one['most_memory_mib']} MiB at most"
        )
    sys.exit(bool(figures.violations))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        supervise.work()
    else:
        main()
