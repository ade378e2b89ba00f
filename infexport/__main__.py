"""The `infexport` command."""

import signal
import sys
import traceback

from infexport.cli import cli


def main() -> None:
    """Exit codes: 0 done, 1 the answer is no, 2 wrong usage or input, 3 a bug in infexport."""
    # so that what is half-written is cleaned up
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        cli(prog_name="infexport")
    except Exception:
        traceback.print_exc()
        print("this is a bug in infexport: please report it with the lines above", file=sys.stderr)
        sys.exit(3)


if __name__ == "__main__":
    main()
