"""Checks of what builds engines and runs them."""

from __future__ import annotations

from dataclasses import replace

from infexport.doctor.check import Check, reinstall
from infexport.doctor.facts import Facts, versions
from infexport.system.dependencies import installed_version

LICENCE = "comes with NVIDIA's proprietary licence"


def builders(facts: Facts) -> list[Check]:
    return [
        _builder(facts, "tensorrt-rtx", "builds engines for GPUs elsewhere"),
        _builder(facts, "tensorrt", "builds engines on the GPU"),
    ]


def _builder(facts: Facts, name: str, what: str) -> Check:
    row = f"build: {name}"
    if missing := facts.lacks(row, name):
        return missing if missing.state == "broken" else replace(missing, advice=LICENCE)
    outcome = facts.trials["builder", name]
    found = versions(facts.of(name))
    if not outcome.error:
        return Check(row, "yes", f"{what}: {found}")
    if name == "tensorrt" and not facts.gpus().found:
        remedy = "infexport build-engine --backend tensorrt-rtx"
        return Check(row, "no", found, f"needs an NVIDIA GPU: {outcome.error}", remedy)
    return reinstall(row, found, outcome.error, f"'infexport[{name}]'")


def running(facts: Facts) -> list[Check]:
    name, version = "run engines", installed_version("polygraphy")
    found = f"polygraphy {version or 'missing'}"
    if version is None:
        return [Check(name, "no", found, LICENCE, "pip install 'infexport[tensorrt]'")]
    if not facts.gpus().found:
        advice = "needs an NVIDIA GPU; elsewhere ONNX Runtime runs the bundle"
        remedy = "infexport run-engine BUNDLE IMAGE --provider cpu"
        return [Check(name, "no", f"{found}; no NVIDIA GPU", advice, remedy)]
    return [Check(name, "yes", found)]
