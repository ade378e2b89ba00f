"""Checks of extras that are whole where their packages are."""

from __future__ import annotations

from dataclasses import replace

from infexport.doctor.check import Check
from infexport.doctor.facts import Facts
from infexport.system.dependencies import installed_version


def export(facts: Facts) -> list[Check]:
    return [facts.can("checkpoints", "export", "convert, validate")]


def others(facts: Facts) -> list[Check]:
    return [
        facts.can("reports", "plot", "reports, heat maps, plots"),
        _workers(facts),
        facts.can("Triton", "triton", "package triton"),
    ]


def _workers(facts: Facts) -> Check:
    check = facts.can("workers", "scale", "workers, URLs, Parquet")
    if not check.ok:
        return check
    version = installed_version("fsspec")
    if version is None:
        return Check(check.name, "broken", f"{check.found}, fsspec missing", "", "pip install fsspec")
    return replace(check, found=f"{check.found}, fsspec {version}")
