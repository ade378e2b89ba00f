"""Facts for the checks: installed packages, and the outcomes of trials."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from infexport.doctor.check import Check, reinstall
from infexport.doctor.trials import Outcome, Trials
from infexport.errors import InfexportError
from infexport.system.dependencies import MODULES, Requirement, installed_version, wanted
from infexport.system.gpus import SMI_LIMIT

PACKAGES = {"onnxruntime": "onnxruntime-gpu"}
"""A package → another that serves as well."""
LIBRARIES = ("pyvips-binary", "openslide-bin")
"""Packages that need not be there: the system may have what they bring."""


class Facts:
    """Facts for the checks: the requirements of infexport, and the trials."""

    def __init__(self) -> None:
        self.wanted = wanted()
        self.trials = Trials(self.wanted)

    def gpus(self) -> Outcome:
        """Return the GPUs, see `system.gpus.gpus`."""
        try:
            return Outcome(self.trials.gpus.result(2 * SMI_LIMIT))
        except InfexportError as error:
            return Outcome(error=error.summary)

    def of(self, extra: str) -> list[Requirement]:
        return [one for one in self.wanted if one.extra == extra]

    def lacks(self, name: str, extra: str) -> Check | None:
        """Return the reason why an extra's packages cannot be used, None where they can."""
        packages = self.of(extra)
        absent = [one for one in packages if installed(one) is None and one.name not in LIBRARIES]
        if absent or not packages:
            found = versions(packages) or "infexport's own metadata is not there"
            return Check(name, "no", found, remedy=f"pip install 'infexport{f'[{extra}]' if extra else ''}'")
        if old := [one for one in packages if (version := installed(one)) and not one.accepts(version)]:
            texts = " ".join(f"'{one.text}'" for one in old)
            advice = f"expected {', '.join(one.text for one in old)}"
            return Check(name, "broken", versions(packages), advice, f"pip install --upgrade {texts}")
        return self._unimportable(name, packages)

    def _unimportable(self, name: str, packages: Sequence[Requirement]) -> Check | None:
        for one in packages:
            module = MODULES.get(one.name)
            outcome = self.trials["import", module] if module and installed(one) else Outcome()
            if outcome.error:
                advice = f"{one.name} is installed and cannot be imported: {outcome.error}"
                return reinstall(name, versions(packages), advice, f"--no-deps '{one.text}'")
        return None

    def can(self, name: str, extra: str, what: str) -> Check:
        """Return a check of an extra's packages, and of the feature that needs them."""
        return self.lacks(name, extra) or Check(name, "yes", f"{what}: {versions(self.of(extra))}")


def versions(packages: Iterable[Requirement]) -> str:
    """Return the versions of installed packages, and the names of missing ones."""
    found = []
    for one in packages:
        version = installed(one)
        if version is not None or one.name not in LIBRARIES:
            name = one.name if installed_version(one.name) or version is None else PACKAGES[one.name]
            found.append(f"{name} {version or 'missing'}")
    return ", ".join(found)


def installed(one: Requirement) -> str | None:
    """The version of a package, or of one that serves as well."""
    other = PACKAGES.get(one.name)
    return installed_version(one.name) or (installed_version(other) if other else None)
