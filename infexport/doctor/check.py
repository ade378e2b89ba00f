"""Result of a check."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from infexport.errors import InfexportError

State = Literal["yes", "no", "broken"]


@dataclass(frozen=True)
class Check:
    """One thing a user may want to do.

    Attributes:
        name: of it.
        state: `yes`; `no`, something is not there; `broken`, something is there and does not work.
        found: what was found.
        advice: what is missing, in words.
        remedy: the command that mends it; empty where there is none.
        group: what it belongs to.
    """

    name: str
    state: State
    found: str
    advice: str = ""
    remedy: str = ""
    group: str = ""

    @property
    def ok(self) -> bool:
        return self.state == "yes"

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "ok": self.ok}


def reinstall(name: str, found: str, error: str, packages: str) -> Check:
    """Return a check of a package that is installed and does not work, with the command that reinstalls it."""
    return Check(name, "broken", found, error, f"pip install --force-reinstall {packages}")


def told(error: BaseException) -> str:
    """Return an error's message."""
    if isinstance(error, InfexportError):
        return ": ".join(filter(None, [error.summary, error.details]))
    return f"{getattr(error, 'strerror', None) or error or type(error).__name__}"
