"""Errors of single images, which become failures of these images and do not end the call."""

from __future__ import annotations

from infexport.errors import InfexportError


def image_error(error: InfexportError | MemoryError | OSError, doing: str) -> InfexportError:
    """Return an error without its traceback, which would keep the arrays of its frames in memory.

    Args:
        error: that was raised.
        doing: what was under way, as a part of a sentence; details of errors that are not ours.
    """
    if isinstance(error, InfexportError):
        return InfexportError(error.summary, error.details, error.hint)
    if isinstance(error, OSError):
        return _system_error(error, doing)
    return InfexportError("not enough memory for an image", doing, "smaller images or batches need less memory")


def _system_error(error: OSError, doing: str) -> InfexportError:
    where = f": {error.filename}" if error.filename else ""
    hint = "check the path, its permissions and the room left on the disk"
    reason = error.strerror or str(error) or type(error).__name__  # never empty: that is an answer's row
    return InfexportError(f"{reason}{where}", doing, hint)


def not_finite(file: str) -> InfexportError:
    """Build the error of logits that are not all finite."""
    return InfexportError(
        f"the model's answer is not finite: {file}",
        hint="infexport validate parity --images tells whether PyTorch's is",
    )
