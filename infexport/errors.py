"""The one kind of error a user sees: what happened, what was received and expected, what to do next."""


class InfexportError(Exception):
    """Something the user can act on.

    Args:
        summary: one line, what went wrong.
        details: what was received and what was expected; may have several lines.
        hint: what to do next.
    """

    def __init__(self, summary: str, details: str = "", hint: str = "") -> None:
        super().__init__(summary)
        self.summary = summary
        self.details = details
        self.hint = hint

    def to_dict(self) -> dict[str, str]:
        return {"error": self.summary, "details": self.details, "hint": self.hint}


class LastingError(InfexportError):
    """An error that the same command meets again: its image, bundle and options alone are the cause."""
