"""Images that are elsewhere: any URL that fsspec knows, such as s3://, gs://, https://."""

from __future__ import annotations

import errno
import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, TypeGuard

from PIL import Image

from infexport.errors import InfexportError
from infexport.images.decode import SUFFIXES, Pixels, expand_folders, find_images, without_drawn
from infexport.system.dependencies import require
from infexport.system.urls import scrubbed, segments, shown

__all__ = ["Item", "find", "find_urls", "is_url", "local_copy", "named", "shown"]

Item = Path | str | Pixels | Image.Image
"""An image: a file, its URL, uint8 RGB `[H, W, 3]`, or one that Pillow has opened or made."""


def is_url(item: object) -> TypeGuard[str]:
    return isinstance(item, str) and "://" in item


@contextmanager
def local_copy(item: Path | str) -> Iterator[Path]:
    """An image as a file on this machine; what was fetched is deleted afterwards.

    Errors that are raised while it is held name the item, as in `named`.

    Raises:
        InfexportError: a URL that cannot be fetched.
    """
    if is_url(item):
        with ExitStack() as held:
            with _errors(item):
                folder = held.enter_context(tempfile.TemporaryDirectory(prefix="infexport-"))
                # its suffix, and no more of a name that somebody else chose
                file = Path(folder) / f"image{PurePosixPath(segments(item)[0].path).suffix}"
                with named(item, file):
                    filesystem, path = _opened(item)
                    filesystem.get_file(path, str(file))
            held.enter_context(named(item, file))
            yield file
    else:
        yield Path(item)


@contextmanager
def named(item: object, file: object) -> Iterator[None]:
    """Rename the local copy to the item in errors and log records of the block.

    Args:
        item: as the user gave it; where it is no URL, nothing is changed.
        file: the copy.
    """
    if not is_url(item):
        yield
        return

    def given(text: str) -> str:
        return text.replace(str(file), shown(item))

    def rename(record: logging.LogRecord) -> bool:
        if str(file) in record.getMessage():
            record.msg, record.args = given(record.getMessage()), None
        return True

    log = logging.getLogger("infexport")
    log.addFilter(rename)
    try:
        yield
    except InfexportError as error:
        _reword(error, given)
        raise
    except OSError as error:
        error.filename = error.filename and given(os.fsdecode(error.filename))
        raise
    finally:
        log.removeFilter(rename)


def find(items: Iterable[Path | str]) -> list[Path | str]:
    """Find images as `images.find_images` does, of URLs, too.

    Raises:
        InfexportError: one that is not there or holds no images.
    """
    found: dict[Path | str, Path | str] = {}
    for item in items:
        if is_url(item):
            found |= {url: url for url in find_urls(item) if url not in found}
        else:
            for file in expand_folders([Path(item)]):
                found.setdefault(Path(os.path.realpath(file)), file)
    return without_drawn(list(found.values()))


def find_urls(url: str) -> list[str]:
    """The URL of an image, or of all images in a folder and those in it, sorted; hidden ones are left out.

    By HTTP there are no folders.

    Raises:
        InfexportError: nothing is there, it or a folder in it may not be read, or what reads such URLs is not
            installed.
    """
    first = segments(url)[0]
    with _errors(url):
        filesystem, path = _opened(url)
        # to list a page of HTML is to follow its links
        file = first.scheme in ("http://", "https://") or PurePosixPath(first.path).suffix.lower() in SUFFIXES
        if file or not filesystem.isdir(path):
            filesystem.info(path)  # raises the reason if there is none
            return [url]
        if "::" in url:
            raise InfexportError(f"a folder in an archive: {shown(url)}", hint="name its images, or unpack it")
        files = _files_below(filesystem, path)
    found = [f"{url.rstrip('/')}/{file}" for file in files if file.suffix.lower() in SUFFIXES]
    if not found:
        raise InfexportError(f"no images in folder: {shown(url)}", f"suffixes looked for: {' '.join(sorted(SUFFIXES))}")
    return found


def _files_below(filesystem: Any, folder: str) -> list[PurePosixPath]:
    """The visible files in a folder and those in it, relative to it, sorted.

    Raises:
        Exception: a folder that cannot be listed; `filesystem.find` leaves it out, and so does `walk`.
        InfexportError: an entry that is neither a file nor a folder, and may be a link to one.
    """
    from fsspec.implementations.local import LocalFileSystem

    if isinstance(filesystem, LocalFileSystem):  # its links are followed
        return [PurePosixPath(file.relative_to(folder)) for file in find_images([Path(folder)])]
    found, listed, waiting = [], set(), [folder]
    while waiting:
        listed.add(here := waiting.pop())
        for entry in filesystem.ls(here, detail=True):
            name = entry["name"].rstrip("/")
            file = PurePosixPath(name).relative_to(folder)
            if any(part.startswith(".") for part in file.parts):
                continue
            if entry["type"] == "directory":
                waiting += [name] if name not in listed else []
            elif entry["type"] == "file" or file.suffix.lower() in SUFFIXES:
                found.append(file)
            else:
                raise InfexportError(
                    f"neither a file nor a folder: {file}",
                    f"received an entry of type {entry['type']}, which may be a link to a folder",
                    "name the folder that it leads to, or the images",
                )
    return sorted(found)


def _opened(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path there."""
    import fsspec

    filesystem, path = fsspec.core.url_to_fs(url)
    return filesystem, path


def _reword(error: InfexportError, change: Callable[[str], str]) -> None:
    error.summary, error.details, error.hint = map(change, (error.summary, error.details, error.hint))
    error.args = (error.summary,)


@contextmanager
def _errors(url: str) -> Iterator[None]:
    """Raise any error of a file system as an `InfexportError`."""
    require("fsspec", extra="scale")
    try:
        yield
    except InfexportError as error:
        _reword(error, lambda text: scrubbed(text, url))
        raise
    except Exception as error:  # every file system raises its own
        # HTTP's says that a file is not there, whatever the server said
        reasons = [str(reason) for reason in (error, error.__cause__) if reason is not None]
        text = scrubbed(" ".join("; ".join(reasons).split()), url)
        hint = "check its spelling, and that the credentials of this machine may read it"
        if isinstance(error, ImportError | ValueError):
            hint = "install what fsspec needs for such URLs, or copy the images to this machine"
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            hint = f"it is copied to this machine first: make room in {tempfile.gettempdir()}, or set TMPDIR"
        raise InfexportError(
            f"cannot read {shown(url)}", f"{type(error).__name__}: {text or 'no reason given'}", hint
        ) from None
