"""All output of the commands: data to stdout, everything else to stderr."""

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
    """Where a command's words go. With `as_json`, stdout carries one JSON document and nothing else."""

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
        click.echo(click.style("error: ", fg="red", bold=True) + _in_a_line(_clean(error.summary)), err=True)
        for line in _clean(error.details).splitlines():
            click.echo(f"  {printable(line)}", err=True)
        if error.hint:
            click.echo(click.style("hint: ", fg="cyan", bold=True) + _in_a_line(_clean(error.hint)), err=True)

    def data(self, text: str, word: str = "", **style: Any) -> None:
        """A line for people; silent when machines read.

        Args:
            text: the line; a new line in it, as a file's name may have, is none.
            word: of it, which has the style; none for all of it.
            style: as of `click.style`.
        """
        if not self.as_json:
            line = _in_a_line(text)
            click.echo(line.replace(word or line, click.style(word or line, **style), 1) if style else line)

    def document(self, value: Any) -> None:
        """For machines; silent when people read."""
        if self.as_json:
            text = json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False)
            text = text.encode("utf-8", "replace").decode()  # a file name may be no UTF-8
            if not getattr(sys.stdout, "has_all", True):  # then JSON's own way to write a character
                text = re.sub("[^\0-\x7f]", lambda found: json.dumps(found[0])[1:-1], text)
            click.echo(text)

    def table(self, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """Columns as wide as they must be, numbers to the right."""
        cells = [list(header), *(list(row) for row in rows)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
        right = [all(_is_number(row[i]) for row in cells[1:]) for i in range(len(header))]
        for row in cells:
            padded = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True))
            self.data("  ".join(padded).rstrip())

    @contextmanager
    def progress(self, length: int, label: str) -> Iterator[Any]:
        """A bar on stderr with an `update(n)`; click hides it where stderr is no terminal."""
        with click.progressbar(length=length, label=label, file=sys.stderr) as bar:
            yield bar


OBEYED = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0 but for tabs and new lines, and C1
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # what turns the direction of writing
    "\ud800-\udfff]"  # halves of surrogate pairs
)
"""What a terminal obeys instead of showing it, or cannot show."""


def printable(text: str) -> str:
    """A text for a person's terminal. Names of files, labels and tensors are chosen by who made them: what in them
    would move the cursor or rename the window is shown as its number.
    """
    return OBEYED.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def _in_a_line(text: str) -> str:
    return printable(text.replace("\n", "\\n"))


class TokenPasses:
    """The sweeps of streamed images on stderr, with rate and time left: a line that changes on a terminal, else one now
    and then.

    Args:
        out: whose stderr.
        names: of the stages, in order.
    """

    EVERY, EVERY_LINE = 0.2, 30.0

    def __init__(self, out: Output, names: Sequence[str]) -> None:
        self._out, self._names = out, names
        self._terminal = sys.stderr.isatty()
        self._at: tuple[str, int] | None = None
        self._began = self._told = 0.0
        self._first = 0

    def __call__(self, file: str, stage: int, done: int, total: int) -> None:
        now = time.monotonic()
        if (file, stage) != self._at:
            # what was done before this is not of this run, or the first chunk, whose time is not known
            self._at, self._began, self._first = (file, stage), now, done
            self._told = now if not self._terminal else 0.0
        seconds, finished = now - self._began, done >= total
        if not finished and now - self._told < (self.EVERY if self._terminal else self.EVERY_LINE):
            return
        self._told = now
        name, of = printable(Path(file).name), len(self._names)
        text = f"{name}: pass {stage + 1} of {of}, {self._names[stage]}, {done / total:4.0%}"
        if done > self._first and seconds > 0:
            rate = (done - self._first) / seconds
            text += f", {rate:,.0f} tokens/s, {(total - done) / rate:.0f} s left in it"
        if self._terminal:
            end = finished and stage + 1 == len(self._names)
            click.echo(f"\r\x1b[K{'' if end else text}", err=True, nl=False)
        elif not finished or seconds > self.EVERY_LINE:
            self._out.status(text)


class Phases:
    """The phases of a build on stderr: a line that changes on a terminal, else nothing."""

    EVERY = 0.2

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._told = 0.0

    def __call__(self, name: str, done: int, total: int) -> None:
        now = time.monotonic()
        if self._terminal and now - self._told >= self.EVERY:
            self._told = now
            click.echo(f"\r\x1b[K{name}: {done} of {total}", err=True, nl=False)

    def clear(self) -> None:
        """Make room for another line."""
        if self._told:
            click.echo("\r\x1b[K", err=True, nl=False)
            self._told = 0.0


def _finite(value: Any) -> Any:
    """The value with null for what JSON has no number for."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _is_number(cell: str) -> bool:
    return cell == "-" or cell.replace("e-", "").translate(str.maketrans("", "", "%.,x")).isdigit()


TYPED = "infexport.typed"
"""Where a context keeps the arguments as the user typed them."""


def command_line() -> str:
    """The command as the user typed it, quoted for a shell, without what may be secret in URLs."""
    return _clean(shlex.join(["infexport", *click.get_current_context().meta[TYPED]]))


def _clean(text: str) -> str:
    """A text without what is secret in the URLs that were typed."""
    context = click.get_current_context(silent=True)
    return _without_secrets(text, context.meta.get(TYPED, ()) if context else ())


def _without_secrets(text: str, typed: Sequence[str]) -> str:
    if not any(":/" in argument for argument in typed):
        return text
    from infexport.system.urls import scrubbed, urls_in

    return scrubbed(text, *urls_in(typed))


class ErrorGroup(click.Group):
    """Turns what a user can act on into a message and exit code 2, never a traceback; lists commands as added."""

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
            fail(InfexportError(summary, hint="check the path, its permissions and the room left on the disk"))
        except MemoryError as error:
            fail(InfexportError("not enough memory", str(error), "smaller images or batches need less memory"))


@contextmanager
def _printable_usage(typed: Sequence[str]) -> Iterator[None]:
    try:
        yield
    except click.ClickException as error:  # it says what was typed
        vars(error)["message"] = printable(_without_secrets(error.message, typed))  # click declares it final
        raise


class Logged(logging.Handler):
    """What the stages log, as a warning."""

    def emit(self, record: logging.LogRecord) -> None:
        Output().warning(_in_a_line(record.getMessage()))


LOGGED = Logged(logging.WARNING)


def fail(error: InfexportError) -> NoReturn:
    Output().error(error)
    raise click.exceptions.Exit(2)


def tell_bug() -> None:
    """Show the exception that is being handled, which is none that a user can act on."""
    click.echo(_without_secrets(traceback.format_exc(), sys.argv[1:]), err=True, nl=False)
    click.echo("this is a bug in infexport: please report it with the lines above", err=True)


def exit_code(code: int) -> int:
    """The exit code of a command that ends with `code`, after all has been written to stdout, or could not be.

    An output that is lost is an error of its own; a reader that has left wants no more, which is none.
    """
    error = stdout_error()
    if error is None:
        return code
    if error.errno == errno.EPIPE:
        return code or 128 + signal.SIGPIPE
    summary = f"cannot write to standard output: {error.strerror or error}"
    Output().error(InfexportError(summary, hint="let it lead to a terminal, or to a file on a disk with room"))
    return max(code, 2)
