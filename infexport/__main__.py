"""The `infexport` command."""

from __future__ import annotations

import os
import signal
import sys

TYPE_CHECKING = False  # until `main` has begun, Python reports an interrupt: import no more than necessary
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType


def main() -> None:
    """Run the command line.

    Exit codes: 0 done, 1 the answer is no, 2 wrong usage or input, 3 a bug in infexport. A signal ends it with 128 and
    the signal's number: 130 for an interrupt, 141 where nobody reads its output any more.
    """
    _on_signals(_end_now)
    from infexport.cli import cli
    from infexport.cli.console import exit_code, tell_bug
    from infexport.system.standard_streams import open_streams

    open_streams()
    _on_signals(_end)
    try:
        cli(prog_name="infexport")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if code == 128 + signal.SIGINT:
            print("interrupted", file=sys.stderr)
    except Exception:
        tell_bug()
        code = 3
    code = exit_code(code)
    _on_signals(_end_now)
    sys.exit(code)


def _on_signals(handler: Callable[[int, FrameType | None], None]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup, or in the background
            signal.signal(number, handler)


def _end(number: int, frame: FrameType | None) -> None:
    """End after cleaning up what is half-written."""
    sys.exit(128 + number)


def _end_now(number: int, frame: FrameType | None) -> None:
    """End at once, with nothing to clean up: during imports and shutdown, Python prints exceptions or loses them."""
    if number == signal.SIGINT:
        try:  # noqa: SIM105
            os.write(2, b"interrupted\n")
        except OSError:
            pass
    os._exit(128 + number)


if __name__ == "__main__":
    main()
