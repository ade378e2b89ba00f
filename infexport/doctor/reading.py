"""Checks of what reads images."""

from __future__ import annotations

from infexport.doctor.check import Check, reinstall
from infexport.doctor.facts import Facts, versions
from infexport.system.dependencies import installed_version


def images(facts: Facts) -> list[Check]:
    name, outcome = "Pillow", facts.trials["pillow", ""]
    found = f"pillow {installed_version('pillow') or 'missing'}"
    again = reinstall(name, found, outcome.error, "pillow")
    return [again if outcome.error else _formats(name, found, outcome.found, again.remedy)]


def strips(facts: Facts) -> list[Check]:
    name, outcome = "libvips", facts.trials["vips", ""]
    if missing := facts.lacks(name, "stream"):
        return [missing]
    found = f"images larger than memory: {versions(facts.of('stream'))}"
    if outcome.error:
        return [reinstall(name, found, outcome.error, "pyvips pyvips-binary")]
    found += f", libvips {outcome.found['version']}"
    return [_formats(name, found, outcome.found["formats"], "pip install --upgrade pyvips-binary")]


def slides(facts: Facts) -> list[Check]:
    name, outcome = "OpenSlide", facts.trials["openslide", ""]
    if missing := facts.lacks(name, "slides"):
        return [missing]
    found = f"slides: {versions(facts.of('slides'))}"
    if outcome.error:
        return [reinstall(name, found, outcome.error, "openslide-python openslide-bin")]
    return [Check(name, "yes", f"{found}, OpenSlide {outcome.found}")]


def _formats(name: str, found: str, formats: dict[str, bool], remedy: str) -> Check:
    missing = [form for form, there in formats.items() if not there]
    if missing:
        return Check(name, "no", f"{found} without {', '.join(missing)}", "needs one that is built with them", remedy)
    return Check(name, "yes", f"{found}: {', '.join(formats)}")
