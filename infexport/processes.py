"""Work in a process of its own: a JSON request on its stdin, JSON objects on its stdout, a line each, when it knows
them. A crash, or memory that runs out, is an error there and not the end of the caller.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from infexport.errors import InfexportError

Message = dict[str, Any]


class Ended(InfexportError):
    """A process ended that should not have."""


def command_of(module: str) -> list[str]:
    """The command that runs a module whose `main` calls `serve`."""
    # -P: a json.py in the folder this is run from must not be imported
    return [sys.executable, "-P", "-m", module]


def ask(command: Sequence[str], request: Message, heard: Callable[[Message], None] = lambda message: None) -> Message:
    """All that a worker says, its messages as one.

    Args:
        command: as of `command_of`.
        request: for its stdin.
        heard: told of every message when it comes.

    Raises:
        InfexportError: what the worker could not do.
        Ended: it ended before it was done.
    """
    answer: Message = {}
    with tempfile.TemporaryFile("w+", errors="replace") as messages:
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=messages, encoding="utf-8"
        ) as worker:
            assert worker.stdin is not None
            assert worker.stdout is not None
            try:
                with suppress(BrokenPipeError):  # it ended before it listened; its exit code says more
                    worker.stdin.write(json.dumps(request))
                    worker.stdin.close()
                for line in worker.stdout:
                    if line.endswith("\n"):  # else it ended within a word
                        message = json.loads(line)
                        answer |= message
                        heard(message)
            except BaseException:
                worker.kill()
                raise
        messages.seek(0)
        if "error" in answer:
            raise InfexportError(answer["error"], answer["details"], answer["hint"])
        if worker.returncode:
            raise ending(worker.returncode, messages.read())
    return answer


def ending(code: int, messages: str) -> Ended:
    """How a process ended that should not have, from its exit code and what it wrote to stderr."""
    if code < 0:
        name = signal.Signals(-code).name
        return Ended(f"the process was killed by {name}", "out of memory, most likely" * (name == "SIGKILL"))
    last = messages.strip().rpartition("\n")[2]
    return Ended(f"the process ended with exit code {code}", last, "this is a bug in infexport")


def serve(work: Callable[[Message, Callable[[Message], None]], None]) -> None:
    """Be a worker: read the request and do the work, which is given the request and what takes messages."""
    # libraries print to stdout as they like: from here on that is stderr
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def tell(message: Message) -> None:
        print(json.dumps(message), file=out, flush=True)

    try:
        work(json.load(sys.stdin), tell)
    except InfexportError as error:
        tell(error.to_dict())
    except MemoryError as error:
        tell(InfexportError("not enough memory", str(error), "try smaller --sizes or a smaller batch").to_dict())
