"""Storage of an image's tokens while it is streamed: rows in memory or in a scratch file."""

from __future__ import annotations

import errno
import math
import mmap
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from infexport.errors import InfexportError, LastingError
from infexport.inference.centrality import CENTRALITY
from infexport.inference.options import TokenDtype
from infexport.system.atomic_files import write_file
from infvit.config import InfViTConfig

Rows = NDArray[Any]


class Store(Protocol):
    """`rows` rows of `width` numbers, float32 or float16."""

    width: int

    def read(self, start: int, stop: int) -> Rows:
        """Rows `[stop − start, width]`; valid until the next call."""
        ...

    def kept(self, start: int, stop: int) -> Rows:
        """Rows as they are kept: rounded, where `read` gives float32 of them; valid until the next call."""
        ...

    def write(self, start: int, values: Rows) -> Rows:
        """Keep rows; returns them as they are kept, contiguous."""
        ...

    def close(self) -> None: ...


class MemoryStore:
    """Rows in memory; a read is a view.

    In huge pages where the system has them: touching gigabytes for the first time, 4 KiB at a time, took longer than
    writing them to disk.
    """

    def __init__(self, rows: int, width: int, dtype: type) -> None:
        count = rows * width
        size = max(1, count * np.dtype(dtype).itemsize)
        try:
            self._memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise MemoryError(f"{size / 1e9:.2f} GB of tokens") from error
        with suppress(AttributeError, OSError):
            self._memory.madvise(mmap.MADV_HUGEPAGE)
        self._values: Rows = np.frombuffer(self._memory, dtype, count).reshape(rows, width)
        self.width = width

    def read(self, start: int, stop: int) -> Rows:
        return self._values[start:stop]

    kept = read

    def write(self, start: int, values: Rows) -> Rows:
        self._values[start : start + len(values)] = values
        return self._values[start : start + len(values)]

    def close(self) -> None:
        del self._values, self._memory


class FileStore:
    """Rows in a file, none of which stay in this process's memory.

    Args:
        path: made, and must not be there yet.
        rows, width, dtype: see `Store`.
        left: the file is one that an interrupted run left, and is not made.

    Raises:
        Unproven: the file that was left is gone, or has another size.
        InfexportError: the disk has no room for it, or fails later.
    """

    def __init__(self, path: Path, rows: int, width: int, dtype: type, left: bool = False) -> None:
        self._dtype, self.width = np.dtype(dtype), width
        self._path, self._bytes = path, width * self._dtype.itemsize
        self._buffer: Rows = np.empty((0, width), dtype)
        size = max(1, rows * self._bytes)
        with scratch_errors(path):
            if left:
                check_left(path, size)
            flags = os.O_RDWR | os.O_NOFOLLOW | (0 if left else os.O_CREAT | os.O_EXCL)
            self._file = os.open(path, flags, 0o600)
        try:
            # all of it now: a full disk is an error before the work, not in it
            os.posix_fallocate(self._file, 0, size)
        except OSError as error:
            os.close(self._file)
            raise _no_room(path, size, error) from error

    def read(self, start: int, stop: int) -> Rows:
        if len(self._buffer) < stop - start:
            self._buffer = np.empty((stop - start, self.width), self._dtype)
        rows = self._buffer[: stop - start]
        view, done = memoryview(rows.data).cast("B"), 0
        while done < len(view):
            with scratch_errors(self._path):
                got = os.preadv(self._file, [view[done:]], start * self._bytes + done)
                if got == 0:
                    raise OSError(errno.EIO, "the file is shorter than it was made")
            done += got
        return rows

    kept = read

    def write(self, start: int, values: Rows) -> Rows:
        values = np.ascontiguousarray(values)
        view, done = memoryview(values.data).cast("B"), 0
        with scratch_errors(self._path):
            while done < len(view):
                done += os.pwrite(self._file, view[done:], start * self._bytes + done)
        return values

    def close(self) -> None:
        os.close(self._file)


class Unproven(Exception):
    """Something that an interrupted run left is not what it recorded."""


def check_left(path: Path, size: int) -> None:
    """Find out that a file is still there, and as large as an interrupted run left it.

    Raises:
        Unproven: it is gone, something else is in its place, or it has another size.
    """
    try:
        status = path.lstat()
    except FileNotFoundError as error:
        raise Unproven(f"the file {path.name} is gone") from error
    if not stat.S_ISREG(status.st_mode):
        raise Unproven(f"{path.name} is no ordinary file")
    if status.st_size != size:
        raise Unproven(f"the file {path.name} has {status.st_size:,} bytes of {size:,}")


@contextmanager
def scratch_errors(path: Path) -> Iterator[None]:
    """Raise the system's errors on a file of a scratch folder as an `InfexportError`."""
    try:
        yield
    except OSError as error:
        raise InfexportError(
            f"cannot use the scratch file: {path}",
            error.strerror or str(error),
            "check the folder, its permissions and the room left, or give another --scratch",
        ) from error


def replace_file(file: Path, content: bytes) -> None:
    """Write a file of a scratch folder; see `infexport.system.atomic_files.write_file`."""
    with scratch_errors(file):
        write_file(file, content, file.with_name(f"{file.name}.partial"))


def _no_room(path: Path, size: int, error: OSError) -> InfexportError:
    return InfexportError(
        f"no room for {size / 1e9:.2f} GB of tokens: {path.parent}",
        error.strerror or str(error),
        "free some, give another --scratch, or keep half as much with --tokens float16",
    )


class HalfStore:
    """Float32 rows kept in float16, and the rounding error of that.

    Args:
        store: of float16 rows.

    Attributes:
        squares: Σ rounding² and Σ row² of the writes that were measured, float64.
    """

    EVERY = 16
    """Writes of which one is measured."""

    def __init__(self, store: Store) -> None:
        self._store, self._writes, self.width = store, 0, store.width
        self.squares = np.zeros(2)

    @property
    def relative_error(self) -> float:
        """‖rounding‖ / ‖rows‖ of one write, over the writes that were measured."""
        rounding, norm = self.squares
        return math.sqrt(rounding / norm) if norm else 0.0

    def read(self, start: int, stop: int) -> Rows:
        return self._store.read(start, stop).astype(np.float32)

    def kept(self, start: int, stop: int) -> Rows:
        return self._store.kept(start, stop)

    def write(self, start: int, values: Rows) -> Rows:
        """Write float32 rows.

        Raises:
            LastingError: a number that float16 has not.
        """
        try:
            with np.errstate(over="raise"):
                rounded = values.astype(np.float16)
        except FloatingPointError as error:
            raise LastingError(
                "tokens do not fit into float16",
                f"the largest is {np.abs(values).max():.3g}, expected at most 65504",
                "keep them in float32: --tokens float32",
            ) from error
        if self._writes % self.EVERY == 0:
            exact = values.astype(np.float64)
            self.squares += ((rounded - exact) ** 2).sum(), (exact**2).sum()
        self._writes += 1
        return self._store.write(start, rounded)

    def close(self) -> None:
        self._store.close()


def store_dtype(name: str, precision: str, token_dtype: TokenDtype) -> type[np.float32] | type[np.float16]:
    """Return the dtype of kept rows; sums over all tokens are always float32.

    Args:
        name: of the rows.
        precision: of the bundle; its Neumann kernel takes float16 queries, keys and values in `fp16`.
        token_dtype: of everything else.
    """
    kernel = precision == "fp16" and name in ("q", "k", "v")
    return np.float16 if kernel or (token_dtype == "float16" and name not in ("mixed", CENTRALITY)) else np.float32


class Stores:
    """Makes the stores of a run.

    Args:
        config: of the bundle.
        precision: of what runs its stages.
        token_dtype: of the rows that may be rounded.
        folder: of their files; None keeps them in memory.
        squares: name → `HalfStore.squares` so far; added to.
        left: the files are those of an interrupted run.
    """

    def __init__(
        self,
        config: InfViTConfig,
        precision: str,
        token_dtype: TokenDtype,
        folder: Path | None,
        squares: dict[str, NDArray[np.float64]],
        left: bool = False,
    ) -> None:
        self._config, self._precision, self._token_dtype = config, precision, token_dtype
        self._folder, self._squares, self._left = folder, squares, left
        self._halves: list[HalfStore] = []

    def __call__(self, name: str, rows: int) -> Store:
        """A store of so many rows."""
        dtype = store_dtype(name, self._precision, self._token_dtype)
        width = self._config.num_heads if name == CENTRALITY else self._config.embed_dim
        store: Store
        if self._folder is None:
            store = MemoryStore(rows, width, dtype)
        else:
            store = FileStore(self._folder / name, rows, width, dtype, self._left)
        if dtype == store_dtype(name, self._precision, "float32"):
            return store
        self._halves.append(HalfStore(store))
        self._halves[-1].squares = self._squares.setdefault(name, self._halves[-1].squares)
        return self._halves[-1]

    @property
    def relative_error(self) -> float:
        """The largest of the stores that round; 0 where none does."""
        return max((store.relative_error for store in self._halves), default=0.0)


class Ring:
    """Rows that are written again and again, each time `spare` rows before where they lay.

    So what is written overwrites what was read at least `spare` rows earlier, and a sweep that was killed can go on
    from any point not further back. With no spare rows they are overwritten where they lie.

    Args:
        store: of `rows + spare` rows.
        rows, spare: numbers of rows.
    """

    def __init__(self, store: Store, rows: int, spare: int) -> None:
        self.store = store
        self._capacity, self._spare = rows + spare, spare

    def _parts(self, start: int, stop: int, generation: int) -> list[tuple[int, int]]:
        first = (start - generation * self._spare) % self._capacity
        count = min(stop - start, self._capacity - first)
        return [(first, count), (0, stop - start - count)]

    def read(self, start: int, stop: int, generation: int) -> Rows:
        """Rows as the `generation`-th sweep that wrote them left them, counted from 0."""
        (first, count), (_, rest) = self._parts(start, stop, generation)
        rows = self.store.read(first, first + count)
        if not rest:
            return rows
        return np.concatenate([rows.copy(), self.store.read(0, rest)])

    def kept(self, start: int, stop: int, generation: int) -> Iterator[Rows]:
        """The same rows as they are kept, in one part or two."""
        for first, count in self._parts(start, stop, generation):
            if count:
                yield self.store.kept(first, first + count)

    def write(self, start: int, values: Rows, generation: int) -> list[Rows]:
        """Write rows over those that are no longer needed; returns them as they are kept, in one part or two."""
        if values.shape[1] != self.store.width:
            raise LastingError(
                "rows of tokens that are not as wide as the manifest says",
                f"received {values.shape[1]} numbers each, expected {self.store.width}",
                "convert the checkpoint again",
            )
        (first, count), (_, rest) = self._parts(start, start + len(values), generation)
        kept = [self.store.write(first, values[:count])]
        if rest:
            kept.append(self.store.write(0, values[count:]))
        return kept
