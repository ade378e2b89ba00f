"""Packages that only some commands need."""

from __future__ import annotations

import importlib
import importlib.util

from infexport.errors import InfexportError


def installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def importable(module: str) -> bool:
    """Whether a module can be imported: one that is installed may want a library that the system has not."""
    if not installed(module):
        return False
    try:
        importlib.import_module(module)
    except Exception:  # a binding's import runs the dynamic loader, which raises what it likes
        return False
    return True


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
