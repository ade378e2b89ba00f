"""Errors that are shown to the user: what happened, what was received and expected, what to do next."""


class InfexportError(Exception):
    """An error that the user can act on.

    Args:
        summary: one line that says what went wrong.
        details: received and expected values; may have several lines.
        hint: the next step to take.
    """

    def __init__(self, summary: str, details: str = "", hint: str = "") -> None:
        super().__init__(summary)
        self.summary = summary
        self.details = details
        self.hint = hint

    def one_line(self, hint: bool = False) -> str:
        """Return the summary and details in one line, for a cell of a table.

        Args:
            hint: append the hint, too.
        """
        text = ": ".join(filter(None, (self.summary, self.details)))
        text = f"{text}; {self.hint}".rstrip("; ") if hint else text.rstrip(": ")
        return " ".join(text.split())

    def to_dict(self) -> dict[str, str]:
        return {"error": self.summary, "details": self.details, "hint": self.hint}


class LastingError(InfexportError):
    """An error that recurs when the same command is repeated: only its image, bundle and options are the cause."""
