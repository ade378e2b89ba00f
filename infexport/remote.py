"""Images that are elsewhere: any URL that fsspec knows, such as s3://, gs://, https://."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, TypeGuard

from PIL import Image

from infexport.errors import InfexportError
from infexport.extras import require
from infexport.images import SUFFIXES, Pixels, find_images

Item = Path | str | Pixels | Image.Image
"""An image: a file, its URL, uint8 RGB `[H, W, 3]`, or one that Pillow has opened or made."""


def is_url(item: object) -> TypeGuard[str]:
    return isinstance(item, str) and "://" in item


def shown(url: str) -> str:
    """A URL without what may be a secret: passwords, and the query, which may be a signature."""
    scheme, _, rest = url.partition("://")
    place, slash, path = rest.partition("/")
    return f"{scheme}://{place.rpartition('@')[2]}{slash}{path.partition('?')[0]}"


@contextmanager
def at_hand(item: Path | str) -> Iterator[Path]:
    """An image as a file on this machine; what was fetched is deleted afterwards.

    Raises:
        InfexportError: a URL that cannot be fetched.
    """
    if is_url(item):
        with tempfile.TemporaryDirectory(prefix="infexport-") as folder:
            # its suffix, and no more of a name that somebody else chose
            name = PurePosixPath(item.partition("?")[0].partition("::")[0])
            file = Path(folder) / f"image{name.suffix}"
            with _errors(item):
                filesystem, path = _opened(item)
                filesystem.get_file(path, str(file))
            yield file
    else:
        yield Path(item)


def find(items: Iterable[Path | str]) -> list[Path | str]:
    """As `images.find_images`, of URLs, too.

    Raises:
        InfexportError: one that is not there or holds no images.
    """
    found: dict[Path | str, Path | str] = {}
    for item in items:
        if is_url(item):
            found |= {url: url for url in find_urls(item) if url not in found}
        else:
            for file in find_images([Path(item)]):
                found.setdefault(file.resolve(), file)
    return list(found.values())


def find_urls(url: str) -> list[str]:
    """The URL of an image, or of all images in a folder and those in it, sorted; hidden ones are left out.

    By HTTP there are no folders.

    Raises:
        InfexportError: nothing is there, it may not be read, or what reads such URLs is not installed.
    """
    scheme, name = url.partition("://")[0], url.partition("?")[0].partition("::")[0]
    with _errors(url):
        filesystem, path = _opened(url)
        # to list a page of HTML is to follow its links
        file = scheme in ("http", "https") or PurePosixPath(name).suffix.lower() in SUFFIXES
        if file or not filesystem.isdir(path):
            filesystem.info(path)  # raises the reason if there is none
            return [url]
        if "::" in url:
            raise InfexportError(f"a folder in an archive: {shown(url)}", hint="name its images, or unpack it")
        inside = [PurePosixPath(file).relative_to(path) for file in sorted(filesystem.find(path))]
    found = [
        f"{url.rstrip('/')}/{file}"
        for file in inside
        if file.suffix.lower() in SUFFIXES and not any(part.startswith(".") for part in file.parts)
    ]
    if not found:
        raise InfexportError(f"no images in folder: {shown(url)}", f"suffixes looked for: {' '.join(sorted(SUFFIXES))}")
    return found


def _opened(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path there."""
    import fsspec

    filesystem, path = fsspec.core.url_to_fs(url)
    return filesystem, path


@contextmanager
def _errors(url: str) -> Iterator[None]:
    """What a file system says, which may be anything, as our error."""
    require("fsspec", extra="scale")
    try:
        yield
    except InfexportError:
        raise
    except Exception as error:  # every file system raises its own
        # HTTP's says that a file is not there, whatever the server said
        reasons = [str(reason) for reason in (error, error.__cause__) if reason is not None]
        text = " ".join("; ".join(reasons).split()).replace(url, shown(url))
        for secret in (url.partition("://")[2].partition("/")[0].rpartition("@")[0], url.partition("?")[2]):
            text = text.replace(secret, "…") if secret else text
        hint = "check its spelling, and that the credentials of this machine may read it"
        if isinstance(error, ImportError | ValueError):
            hint = "install what fsspec needs for such URLs, or copy the images to this machine"
        raise InfexportError(
            f"cannot read {shown(url)}", f"{type(error).__name__}: {text or 'no reason given'}", hint
        ) from None
