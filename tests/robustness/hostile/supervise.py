"""A process that does cases one after another, and one that sees to it that this goes on whatever a case does."""

from __future__ import annotations

import json
import os
import resource
import selectors
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hostile import cases
from hostile.cases import Name, Outcome

GRACE = 10.0
"""Seconds that a case which Python can end has to end; then its process is killed."""
MORE = 12 * 2**30
"""Bytes of address space that a worker may have beside what it has when it is ready: the machine shall survive."""
SCRIPT = Path(__file__).parent.parent / "fuzz.py"


@dataclass(frozen=True)
class Job:
    """What a worker is told.

    Attributes:
        root: folder of all that is made.
        bundle: that cases damage copies of.
        keep: where the folders of violations are kept.
        names: seed, door and index of every case.
    """

    root: str
    bundle: str
    keep: str | None
    names: list[tuple[int, str, int]]


def work() -> None:
    """Do the cases of the job on stdin; say on the file descriptor of the first argument what was done."""
    from hostile.doors import door
    from hostile.seeds import Seeds

    job = Job(**json.load(sys.stdin))
    sys.dont_write_bytecode = True
    root = Path(job.root)
    with os.fdopen(int(sys.argv[2]), "w", buffering=1) as pipe:
        seeds = Seeds(Path(job.bundle), root / "seeds")
        doors = {name: door(name) for name in dict.fromkeys(name for _, name, _ in job.names)}
        _limit_memory()
        for each in job.names:
            name = Name(*each)
            print(json.dumps({"begins": each}), file=pipe)
            folder = root / "cases" / f"{name.door}-{name.index}"
            outcome = cases.run_case(name, folder, seeds, doors[name.door])
            if outcome.end == "violated" and job.keep:
                keep_inputs(folder, Path(job.keep) / f"{name.door}-{name.index}")
            cases.delete(folder)
            print(json.dumps({"ended": each, "outcome": asdict(outcome)}), file=pipe)


def keep_inputs(folder: Path, target: Path) -> None:
    """What a case was given, and what came of it."""
    shutil.rmtree(target, ignore_errors=True)
    for file in folder.rglob("*"):
        if file.is_file() and not file.is_symlink():
            copy = target / file.relative_to(folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, copy)


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MORE,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


class Worker:
    """A worker and what it says."""

    def __init__(self, job: Job, log: Path) -> None:
        reading, writing = os.pipe()
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                [sys.executable, str(SCRIPT), "--worker", str(writing)],
                stdin=subprocess.PIPE,
                stdout=errors,
                stderr=errors,
                pass_fds=[writing],
                env=os.environ | {"OMP_NUM_THREADS": "1", "INFEXPORT_MAX_PIXELS": str(cases.PIXELS)},
            )
        os.close(writing)
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asdict(job)).encode())
        self._process.stdin.close()
        self._pipe, self._rest = reading, b""
        self._selector = selectors.DefaultSelector()
        self._selector.register(reading, selectors.EVENT_READ)

    def hear(self, seconds: float) -> dict[str, Any] | None:
        """What it says next; None when it has ended.

        Raises:
            TimeoutError: it has said nothing for so long.
        """
        while b"\n" not in self._rest:
            if not self._selector.select(seconds):
                raise TimeoutError
            part = os.read(self._pipe, 65536)
            if not part:
                return None
            self._rest += part
        line, _, self._rest = self._rest.partition(b"\n")
        return dict(json.loads(line))

    def end(self) -> int:
        with suppress(subprocess.TimeoutExpired):  # its pipe closes before it has ended
            self._process.wait(2)
        self._process.kill()
        code = self._process.wait()
        self._selector.close()
        os.close(self._pipe)
        return code


def supervised(
    names: Sequence[Name],
    root: Path,
    bundle: Path,
    keep: Path | None = None,
    seconds: float = cases.SECONDS + GRACE,
    start: Callable[[Job, Path], Any] = Worker,
) -> Iterator[tuple[Name, Outcome]]:
    """Every case and how it ended, whatever became of the process that did it.

    Args:
        names: of the cases, in order.
        root: folder of all that is made.
        bundle, keep: as of `Job`.
        seconds: without a word after which a worker is killed.
        start: starts a worker.
    """
    rest = list(names)
    while rest:
        each = [(name.seed, name.door, name.index) for name in rest]
        worker = start(Job(str(root), str(bundle), None if keep is None else str(keep), each), root / "worker.log")
        begun: Name | None = None
        started, kind, silent = time.monotonic(), "crash", False
        try:
            while rest:
                # importing torch and making what is damaged is no case's time
                said = worker.hear(seconds if begun else 10 * seconds)
                if said is None:
                    break
                if "begins" in said:
                    begun, started = Name(*said["begins"]), time.monotonic()
                    continue
                yield rest.pop(0), Outcome(**said["outcome"])
                begun = None
        except TimeoutError:
            kind, silent = "hang", True
        code = worker.end()
        if not rest:
            return
        if begun is None:
            raise RuntimeError(f"a worker ended beside its cases, with {code}: see {root / 'worker.log'}")
        text = f"no word for {seconds:g} s" if silent else f"the process ended with {code}"
        if keep is not None:
            folder = root / "cases" / f"{begun.door}-{begun.index}"
            keep_inputs(folder, keep / folder.name)
        cases.delete(root / "cases")
        yield rest.pop(0), Outcome("violated", kind, text, time.monotonic() - started)
