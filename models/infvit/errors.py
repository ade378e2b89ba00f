"""Errors of this package; `infexport` shows them to the user as they are."""

DEFAULT_HINT = "Check that this is the file you mean, and that it is whole: compare it with the original."


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or that does not say enough.

    Args:
        summary: one line, what went wrong.
        details: what was received and what was expected; may have several lines.
        hint: what to do next, naming the command-line option where there is one.
    """

    def __init__(self, summary: str, details: str = "", hint: str = DEFAULT_HINT) -> None:
        super().__init__(summary)
        self.summary = summary
        self.details = details
        self.hint = hint
