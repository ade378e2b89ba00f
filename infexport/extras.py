"""Packages that only some commands need."""

from __future__ import annotations

import importlib.util

from infexport.errors import InfexportError


def installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def require(*modules: str, extra: str) -> None:
    """Raise an error that names the extra to install, unless every module can be imported.

    Raises:
        InfexportError: one of the modules is missing.
    """
    missing = [module for module in modules if not installed(module)]
    if missing:
        raise InfexportError(
            f"this needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed",
            hint=f"pip install 'infexport[{extra}]'",
        )
