"""What a case may not do: write outside its folder, start a process, leave something, take too long or too much."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from infexport.system.host import peak_memory

CANARY = "canary"
"""What planted code would make, in the case's folder or wherever it runs."""
PROGRAMS = ("nvidia-smi", "ldconfig", "fc-list", "lscpu", "uname", "gcc", "cc", "c++", "ld", "objdump")
"""What Python's own modules and the tool ask of the system."""
HARMLESS = ("/dev/null", "/dev/full", "/dev/zero", "/dev/tty", "/dev/shm", "/proc/self/")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Violation(Exception):
    """A case has done what none may."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(f"{kind}: {text}")
        self.kind, self.text = kind, text


class Hang(BaseException):
    """No Exception: nothing may catch it on the way."""


@dataclass
class Place:
    """The folder of a case: `in/` for what it is given, `out/` for what it may make; the rest is its environment."""

    root: Path

    def __post_init__(self) -> None:
        # resolved, so that what is seen can be compared
        self.root = self.root.resolve()
        self.given, self.made = self.root / "in", self.root / "out"
        self.home, self.temporary, self.current = self.root / "home", self.root / "tmp", self.root / "cwd"
        for folder in (self.given, self.made, self.home, self.temporary, self.current):
            folder.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def entered(self) -> Iterator[None]:
        """The process lives in here."""
        before, folder, temporary = dict(os.environ), Path.cwd(), tempfile.tempdir
        os.environ |= {"HOME": str(self.home), "XDG_CACHE_HOME": str(self.home / "cache")}
        os.environ |= {"TMPDIR": str(self.temporary), "MPLCONFIGDIR": str(self.home / "matplotlib")}
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(self.home / "torch")
        tempfile.tempdir = str(self.temporary)
        os.chdir(self.current)
        try:
            yield
        finally:
            os.chdir(folder)
            tempfile.tempdir = temporary
            os.environ.clear()
            os.environ.update(before)

    def listing(self) -> dict[str, tuple[int, int, int]]:
        """All that must stay as it is, with what tells a change."""
        found = {}
        for top, folders, files in os.walk(self.root):
            folders[:] = [name for name in folders if Path(top, name) not in (self.made, self.home)]
            for name in (*folders, *files):
                path = os.path.join(top, name)  # noqa: PTH118  a name may be anything
                status = os.lstat(path)
                folder = name in folders
                found[path] = (status.st_mode, 0 if folder else status.st_size, 0 if folder else status.st_mtime_ns)
        return found


@dataclass
class Watch:
    """What was seen of a case.

    Attributes:
        allowed: folders that may be written in.
        programs: names of programs that may be started.
    """

    allowed: Sequence[Path]
    programs: Sequence[str] = PROGRAMS
    seen: list[Violation] = field(default_factory=list)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            if isinstance(path, str | bytes) and os.path.isdir(path):  # noqa: PTH112  text or bytes
                return  # a file in it that has no name, and ends with the process
            if (isinstance(mode, str) and set(mode) & set("wax+")) or (flags or 0) & _WRITING:
                self._written(event, path, follow=not (flags or 0) & os.O_NOFOLLOW)
        elif event in ("os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.chmod", "os.utime"):
            numbers = {"os.remove": 1, "os.rmdir": 1, "os.mkdir": 2}
            self._written(event, arguments[0], arguments[numbers[event]] if event in numbers else -1)
        elif event == "os.symlink":
            self._written(event, arguments[1], arguments[2])
        elif event in ("os.rename", "os.link"):
            for path, at in zip(arguments[: 2 if event == "os.rename" else 1], arguments[2:], strict=False):
                self._written(event, path, at)
            self._written(event, arguments[1], arguments[3])
        elif event in ("subprocess.Popen", "os.exec", "os.posix_spawn", "os.spawn"):
            self._started(event, arguments[1] if event == "os.spawn" else arguments[0], arguments[1])
        elif event in ("os.system", "os.startfile", "pty.spawn"):
            self.seen.append(Violation("started", f"{event} {arguments[0]!r:.200}"))
        elif event == "socket.connect" and not _refused(arguments[1]):
            self.seen.append(Violation("connected", f"{arguments[1]!r:.200}"))

    def _written(self, event: str, path: Any, at: int = -1, follow: bool = False) -> None:
        if isinstance(path, int) or path is None:
            return  # opened before, and seen then
        name = os.fsdecode(path)
        if at is not None and at >= 0 and not name.startswith("/"):
            name = f"{os.readlink(f'/proc/self/fd/{at}')}/{name}"  # noqa: PTH115
        folder, _, last = name.rstrip("/").rpartition("/")
        if not follow:
            name = f"{os.path.realpath(folder or ('/' if name.startswith('/') else '.'))}/{last}"
        name = os.path.realpath(name) if follow else name
        if any(name == str(place) or name.startswith(f"{place}/") for place in self.allowed):
            return
        if not name.startswith(HARMLESS) and "__pycache__" not in name:
            self.seen.append(Violation("outside", f"{event} {name!r:.300}"))

    def _started(self, event: str, program: Any, arguments: Any) -> None:
        if program is None:
            program = arguments[0] if isinstance(arguments, list | tuple) else str(arguments).split()[0]
        if Path(os.fsdecode(program)).name not in self.programs:
            self.seen.append(Violation("started", f"{event} {program!r:.200}"))


def _refused(address: Any) -> bool:
    """An address that nobody answers at, or this machine's own sockets."""
    return not isinstance(address, tuple) or address[0] in ("127.0.0.1", "::1")


_watch: Watch | None = None
_installed = False


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _watch is not None:
        _watch(event, arguments)


@contextmanager
def watched(place: Place, programs: Sequence[str] = PROGRAMS) -> Iterator[Watch]:
    """See what is done, until the end of the block."""
    global _watch, _installed
    if not _installed:  # a hook cannot be taken out again
        sys.addaudithook(_hook)
        _installed = True
    watch = Watch((place.made, place.home, place.temporary), programs)
    before = place.listing()
    _watch = watch
    try:
        yield watch
    finally:
        _watch = None
        watch.seen += _changes(place, before)


def _changes(place: Place, before: dict[str, tuple[int, int, int]]) -> list[Violation]:
    after, found = place.listing(), []
    for path in sorted(after.keys() | before.keys()):
        if after.get(path) != before.get(path):
            left = path not in before and path.startswith(str(place.temporary))
            what = "left" if path not in before else "changed" if path in after else "deleted"
            found.append(Violation("leftover" if left else "outside", f"{what} {path!r}"))
    for top, _, files in os.walk(place.root):
        if CANARY in files:
            found.append(Violation("executed", f"planted code ran: {top}/{CANARY}"))
    return found


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """A `Hang` where the block takes longer; in the main thread, and where Python is asked now and then."""

    def end(number: int, frame: FrameType | None) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Memory:
    """What a process takes at most from here on; where the system cannot forget its peak, only a new one is seen."""

    def __init__(self) -> None:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        self._start = peak_memory()

    @property
    def grown(self) -> int:
        return peak_memory() - self._start
