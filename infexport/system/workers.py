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
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import IO, Any

from infexport.errors import InfexportError

Message = dict[str, Any]


class Ended(InfexportError):
    """A process ended that should not have."""


def worker_command(module: str) -> list[str]:
    """The command that runs a module whose `main` calls `serve`."""
    # -P: a json.py in the folder this is run from must not be imported
    return [sys.executable, "-P", "-m", module]


def ask(
    command: Sequence[str],
    request: Message,
    heard: Callable[[Message], None] = lambda message: None,
    limit: float | None = None,
) -> Message:
    """Run a worker and return its messages merged into one.

    Args:
        command: see `worker_command`.
        request: for its stdin.
        heard: called with every message when it arrives.
        limit: seconds after which it is ended, with all that it has started.

    Raises:
        InfexportError: what the worker could not do.
        Ended: it ended before it was done, or was ended.
    """
    answer: Message = {}
    late = threading.Event()
    with _scratch() as messages:
        with subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=messages,
            encoding="utf-8",
            start_new_session=limit is not None,  # then it can be ended with its children
        ) as worker:
            timer = threading.Timer(limit or 0, _end, (worker, late))
            timer.daemon = True
            if limit is not None:
                timer.start()
            try:
                _converse(worker, request, answer, heard)
            except BaseException:
                if limit is None:
                    worker.kill()
                else:
                    _end(worker)
                raise
            finally:
                timer.cancel()
        messages.seek(0)
        if late.is_set():
            raise Ended(f"the process gave no answer within {limit:g} s")
        if "error" in answer:
            raise InfexportError(answer["error"], answer["details"], answer["hint"])
        if worker.returncode:
            raise ending(worker.returncode, messages.read())
    return answer


def _converse(
    worker: subprocess.Popen[str], request: Message, answer: Message, heard: Callable[[Message], None]
) -> None:
    """Write the request, add every message to the answer, and wait for the end of the worker."""
    assert worker.stdin is not None
    assert worker.stdout is not None
    with suppress(BrokenPipeError):  # it ended before it read; its exit code says more
        worker.stdin.write(json.dumps(request))
        worker.stdin.close()
    for line in worker.stdout:
        if line.endswith("\n"):  # else it ended within a word
            message = json.loads(line)
            answer |= message
            heard(message)
    worker.wait()  # within the limit: a worker may have written all and not end


def run_program(command: Sequence[str], limit: float) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a program.

    Raises:
        TimeoutError: it took longer than `limit` seconds; it was told to end, and is not waited for.
        OSError: it cannot be started.
    """
    # no pipes: whoever a program has started may keep those open
    with _scratch() as output, _scratch() as messages:
        program = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=messages, start_new_session=True
        )
        try:
            code = program.wait(limit)
        except subprocess.TimeoutExpired:
            _end(program)
            with suppress(subprocess.TimeoutExpired):  # one that waits for its driver does not even end
                program.wait(1)
            raise TimeoutError(f"no answer within {limit:g} s") from None
        output.seek(0)
        messages.seek(0)
        return code, output.read(), messages.read()


def _scratch() -> IO[str]:
    """A file for what a process writes; in memory where there is no folder for it."""
    try:
        return tempfile.TemporaryFile("w+", errors="replace")
    except OSError:
        if not hasattr(os, "memfd_create"):
            raise
        return os.fdopen(os.memfd_create("messages"), "w+", errors="replace")


def _end(program: subprocess.Popen[Any], late: threading.Event | None = None) -> None:
    """End a program that leads a session, and all of that."""
    if late is not None:
        late.set()
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(program.pid, signal.SIGKILL)


def ending(code: int, messages: str) -> Ended:
    """Describe the unexpected end of a process, from its exit code and stderr."""
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
        tell(InfexportError("not enough memory", str(error), "smaller images or batches need less memory").to_dict())
