"""Progress of long work: events, and who receives them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ProgressEvent:
    """Something that has happened in long work."""


@dataclass(frozen=True)
class Status(ProgressEvent):
    """A sentence for a person."""

    message: str


@dataclass(frozen=True)
class ItemsDone(ProgressEvent):
    """Further items (images, cases, heads) are done."""

    count: int = 1


@dataclass(frozen=True)
class SessionOpened(ProgressEvent):
    """A session has been opened on a provider, in a precision."""

    provider: str
    precision: str


@dataclass(frozen=True)
class StageProgress(ProgressEvent):
    """Rows of a stage are done, of a streamed image."""

    file: str
    stage: int
    done: int
    total: int


@dataclass(frozen=True)
class PhaseProgress(ProgressEvent):
    """Steps of a phase of a build are done."""

    name: str
    done: int
    total: int


class ProgressListener:
    """Receives progress events; ignores them by default.

    A listener of a run may call the predictor. An exception that it raises ends the call.
    """

    def on_event(self, event: ProgressEvent) -> None:
        """Receive an event, in the thread of the call."""


SILENT = ProgressListener()
"""Ignores all."""
