"""Output of the commands: data to stdout, everything else to stderr."""

from __future__ import annotations

import errno
import json
import logging
import math
import re
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from infexport.errors import InfexportError
from infexport.system.standard_streams import stdout_error

if TYPE_CHECKING:
    from infexport.bundle import Bundle


class Output:
    """Writes a command's output. With `as_json`, stdout carries one JSON document and nothing else."""

    def __init__(self, as_json: bool = False) -> None:
        self.as_json = as_json

    def status(self, message: str) -> None:
        click.echo(printable(_clean(message)), err=True)

    def warning(self, message: str) -> None:
        click.echo(click.style("warning: ", fg="yellow", bold=True) + printable(_clean(message)), err=True)

    def bundle_warnings(self, bundle: Bundle, if_modified: str = "") -> None:
        """Warn of what a user must know before trusting a bundle.

        Args:
            bundle: the opened bundle.
            if_modified: the warning where its hashes differ; empty for none.
        """
        from infexport.bundle.summary import bundle_warnings

        modified = [if_modified] if if_modified and not bundle.verified else []
        for line in [*modified, *bundle_warnings(bundle.manifest)]:
            self.warning(line)

    def error(self, error: InfexportError) -> None:
        click.echo(click.style("error: ", fg="red", bold=True) + _on_one_line(_clean(error.summary)), err=True)
        for line in _clean(error.details).splitlines():
            click.echo(f"  {printable(line)}", err=True)
        if error.hint:
            click.echo(click.style("hint: ", fg="cyan", bold=True) + _on_one_line(_clean(error.hint)), err=True)

    def data(self, text: str, word: str = "", **style: Any) -> None:
        """Write a line of text, unless the output is JSON.

        Args:
            text: the line. A line break in it, such as in a file's name, is escaped.
            word: the part of the line to style; empty for the whole line.
            style: arguments of `click.style`.
        """
        if not self.as_json:
            line = _on_one_line(text)
            click.echo(line.replace(word or line, click.style(word or line, **style), 1) if style else line)

    def document(self, value: Any) -> None:
        """Write a JSON document, unless the output is text."""
        if self.as_json:
            text = json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False)
            text = text.encode("utf-8", "replace").decode()  # a file name need not be UTF-8
            if not getattr(sys.stdout, "has_all", True):  # then escape what stdout cannot encode, as JSON does
                text = re.sub("[^\0-\x7f]", lambda found: json.dumps(found[0])[1:-1], text)
            click.echo(text)

    def table(self, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """Write aligned columns, numbers to the right."""
        cells = [list(header), *(list(row) for row in rows)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
        right = [all(_is_number(row[i]) for row in cells[1:]) for i in range(len(header))]
        for row in cells:
            padded = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True))
            self.data("  ".join(padded).rstrip())

    @contextmanager
    def progress(self, length: int, label: str) -> Iterator[Any]:
        """Show a bar with an `update(n)` on stderr; click hides it if stderr is not a terminal."""
        with click.progressbar(length=length, label=label, file=sys.stderr) as bar:
            yield bar


OBEYED = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0 except tab and line feed, and C1
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # directions of writing
    "\ud800-\udfff]"  # surrogates
)
"""Characters that a terminal interprets instead of showing them, or cannot show."""


def printable(text: str) -> str:
    """Escape the characters of a text that a terminal would interpret.

    Names of files, labels and tensors are untrusted: they could move the cursor or rename the window.
    """
    return OBEYED.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def _on_one_line(text: str) -> str:
    return printable(text.replace("\n", "\\n"))


class TokenPasses:
    """Shows the stages of streamed images on stderr, with rate and time left.

    A terminal has one line that is updated; elsewhere a line is written now and then.

    Args:
        out: output whose stderr is used.
        names: names of the stages, in order.

    Attributes:
        TERMINAL_SECONDS, LINE_SECONDS: time between updates of a terminal, and between lines elsewhere.
    """

    TERMINAL_SECONDS, LINE_SECONDS = 0.2, 30.0

    def __init__(self, out: Output, names: Sequence[str]) -> None:
        self._out, self._names = out, names
        self._terminal = sys.stderr.isatty()
        self._at: tuple[str, int] | None = None
        self._began = self._shown = 0.0
        self._first = 0

    def __call__(self, file: str, stage: int, done: int, total: int) -> None:
        now = time.monotonic()
        if (file, stage) != self._at:
            # rows done before now were done by an earlier run, or in the first chunk, whose time is unknown
            self._at, self._began, self._first = (file, stage), now, done
            self._shown = now if not self._terminal else 0.0
        seconds, finished = now - self._began, done >= total
        if not finished and now - self._shown < (self.TERMINAL_SECONDS if self._terminal else self.LINE_SECONDS):
            return
        self._shown = now
        name, of = printable(Path(file).name), len(self._names)
        text = f"{name}: pass {stage + 1} of {of}, {self._names[stage]}, {done / total:4.0%}"
        if done > self._first and seconds > 0:
            rate = (done - self._first) / seconds
            text += f", {rate:,.0f} tokens/s, {(total - done) / rate:.0f} s left in it"
        if self._terminal:
            end = finished and stage + 1 == len(self._names)
            click.echo(f"\r\x1b[K{'' if end else text}", err=True, nl=False)
        elif not finished or seconds > self.LINE_SECONDS:
            self._out.status(text)


class Phases:
    """Shows the phases of a build on stderr: one line that is updated, and only on a terminal."""

    TERMINAL_SECONDS = 0.2

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._shown = 0.0

    def __call__(self, name: str, done: int, total: int) -> None:
        now = time.monotonic()
        if self._terminal and now - self._shown >= self.TERMINAL_SECONDS:
            self._shown = now
            click.echo(f"\r\x1b[K{name}: {done} of {total}", err=True, nl=False)

    def clear(self) -> None:
        """Clear the line, so that another can be written."""
        if self._shown:
            click.echo("\r\x1b[K", err=True, nl=False)
            self._shown = 0.0


def _finite(value: Any) -> Any:
    """Return the value with None for NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _is_number(cell: str) -> bool:
    return cell == "-" or cell.replace("e-", "").translate(str.maketrans("", "", "%.,x")).isdigit()


TYPED = "infexport.typed"
"""Key of the typed arguments in a context's `meta`."""


def command_line() -> str:
    """Return the command as the user typed it, quoted for a shell, without secrets in URLs."""
    return _clean(shlex.join(["infexport", *click.get_current_context().meta[TYPED]]))


def _clean(text: str) -> str:
    """Remove from a text the secrets of URLs that the user typed."""
    context = click.get_current_context(silent=True)
    return _without_secrets(text, context.meta.get(TYPED, ()) if context else ())


def _without_secrets(text: str, typed: Sequence[str]) -> str:
    if not any(":/" in argument for argument in typed):
        return text
    from infexport.system.urls import scrubbed, urls_in

    return scrubbed(text, *urls_in(typed))


class ErrorGroup(click.Group):
    """Group that shows errors a user can act on as a message with exit code 2; lists commands as added."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta[TYPED] = tuple(args)
        return super().parse_args(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def make_context(self, info_name: str | None, args: list[str], *others: Any, **more: Any) -> click.Context:
        with _printable_usage(tuple(args)):
            return super().make_context(info_name, args, *others, **more)

    def invoke(self, ctx: click.Context) -> Any:
        logging.getLogger("infexport").addHandler(LOGGED)
        try:
            with _printable_usage(ctx.meta[TYPED]):
                return super().invoke(ctx)
        except InfexportError as error:
            fail(error)
        except OSError as error:
            summary = f"{error.strerror or error}: {error.filename or 'while reading or writing'}"
            fail(InfexportError(summary, hint="check the path, its permissions and the free space on the disk"))
        except MemoryError as error:
            fail(InfexportError("not enough memory", str(error), "smaller images or batches need less memory"))


@contextmanager
def _printable_usage(typed: Sequence[str]) -> Iterator[None]:
    try:
        yield
    except click.ClickException as error:  # its message quotes what was typed
        vars(error)["message"] = printable(_without_secrets(error.message, typed))  # click declares it final
        raise


class Logged(logging.Handler):
    """Shows log records as warnings."""

    def emit(self, record: logging.LogRecord) -> None:
        Output().warning(_on_one_line(record.getMessage()))


LOGGED = Logged(logging.WARNING)


def fail(error: InfexportError) -> NoReturn:
    Output().error(error)
    raise click.exceptions.Exit(2)


def tell_bug() -> None:
    """Show the traceback of the exception being handled, and ask for a bug report."""
    click.echo(_without_secrets(traceback.format_exc(), sys.argv[1:]), err=True, nl=False)
    click.echo("this is a bug in infexport: please report it with the lines above", err=True)


def exit_code(code: int) -> int:
    """Return the exit code of a command that ends with `code`, given any error while writing to stdout.

    Lost output is an error. A closed pipe is not: its reader wants no more.
    """
    error = stdout_error()
    if error is None:
        return code
    if error.errno == errno.EPIPE:
        return code or 128 + signal.SIGPIPE
    summary = f"cannot write to standard output: {error.strerror or error}"
    Output().error(InfexportError(summary, hint="direct it to a terminal, or to a file on a disk with free space"))
    return max(code, 2)
