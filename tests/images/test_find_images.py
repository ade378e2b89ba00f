"""Images in folders: all of what was asked for is found, or an error says what is not."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st
from support import ZOO

from infexport.errors import InfexportError
from infexport.evaluation.accuracy.dataset import Classes, read_labelled
from infexport.images.decode import find_images
from infexport.images.fetch import find

DIGIT = min((ZOO / "digits-held-out").glob("*.png"))


def test_folders_are_expanded(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".hidden").mkdir()
    for name in ("z.PNG", "a.jpeg", "b/c.tiff", "notes.txt", ".hidden/d.png", "._a.jpeg"):
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    expected = [tmp_path / name for name in ("a.jpeg", "b/c.tiff", "z.PNG")]
    assert find_images([tmp_path]) == expected


def test_files_as_given_once(tmp_path):
    for name in ("b.png", "a.png", "scan.raw"):
        (tmp_path / name).touch()
    again = tmp_path / ".." / tmp_path.name / "b.png"
    given_paths = [tmp_path / "scan.raw", tmp_path / "b.png", again, tmp_path]
    assert find_images(given_paths) == [tmp_path / name for name in ("scan.raw", "b.png", "a.png")]


def test_hidden_parent_of_the_folder_named_is_fine(tmp_path):
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "a.png").touch()
    assert find_images([tmp_path / ".cache"]) == [tmp_path / ".cache" / "a.png"]


def test_nothing_there(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(InfexportError, match="no images in folder") as caught:
        find_images([tmp_path])
    assert ".png" in caught.value.details
    with pytest.raises(InfexportError, match=r"cannot find images: .*nowhere") as caught:
        find_images([tmp_path / "nowhere"])
    assert caught.value.details == "No such file or directory"
    assert caught.value.hint


def test_linked_folders_are_followed(tmp_path):
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    (tmp_path / "elsewhere" / "deep" / "b.png").touch()
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.png").touch()
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "z.png").symlink_to(folder / "a.png")
    expected = [folder / "a.png", folder / "linked" / "deep" / "b.png"]
    assert find_images([folder]) == expected
    assert find([f"file://{folder}"]) == [f"file://{file}" for file in expected]
    assert read_labelled(folder.parent, Classes(2, ["elsewhere", "folder"]))[0].file.name == "b.png"


def test_links_that_lead_back_end(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "x.png").touch()
    for name, target in (("up", ".."), ("self", "."), ("b/over", ".."), ("twin", "b")):
        (tmp_path / "a" / name).symlink_to(target)
    assert find_images([tmp_path / "a"]) == [tmp_path / "a" / "b" / "x.png"]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=8))
def test_whatever_the_links_every_file_is_found_once(tmp_path_factory, links):
    """Six folders in a row, each in the last, with an image each, and any links between them."""
    root = tmp_path_factory.mktemp("links")
    folders = [root / "/".join("abcdef"[: depth + 1]) for depth in range(6)]
    folders[-1].mkdir(parents=True)
    for folder in folders:
        (folder / "x.png").touch()
    for index, (place, target) in enumerate(links):
        (folders[place] / f"link{index}").symlink_to(folders[target])
    found = find_images([folders[0]])
    assert sorted(os.path.realpath(file) for file in found) == sorted(str(folder / "x.png") for folder in folders)
    assert found == sorted(found)


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path, monkeypatch, infexport, zoo_bundle):
    (tmp_path / "locked").mkdir()
    for name in ("a.png", "locked/b.png"):
        (tmp_path / name).write_bytes(DIGIT.read_bytes())
    listdir = os.listdir

    def forbidden(path):  # tests may run as root, whom no mode stops
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return listdir(path)

    monkeypatch.setattr(os, "listdir", forbidden)
    for place in (tmp_path, f"file://{tmp_path}"):
        with pytest.raises(InfexportError, match="cannot find images") as caught:
            find([place])
        assert caught.value.details == f"Permission denied: {tmp_path}/locked"
    result = infexport("run-engine", zoo_bundle("digits-linear"), tmp_path, exit_code=2)
    assert f"{tmp_path}/locked" in result.stderr


NOBODY = """
import os, sys
from pathlib import Path
from infexport.errors import InfexportError
from infexport.images.decode import find_images
os.setgid(65534); os.setuid(65534)
try:
    print(find_images([Path(sys.argv[1])]))
except InfexportError as error:
    sys.exit(error.details)
"""


@pytest.mark.skipif(os.getuid() != 0, reason="changes the user of a process")
@pytest.mark.parametrize("mode", [0o000, 0o300, 0o600])
def test_a_mode_that_locks_a_folder_is_told(tmp_path, mode):
    for folder in [tmp_path, *tmp_path.parents]:
        if folder.is_relative_to(os.environ.get("TMPDIR", "/tmp")) and folder != Path("/tmp"):
            folder.chmod(0o755)
    (tmp_path / "locked" / "deep").mkdir(parents=True)
    (tmp_path / "a.png").touch()
    (tmp_path / "locked" / "deep" / "b.png").touch()
    (tmp_path / "locked").chmod(mode)
    done = subprocess.run([sys.executable, "-c", NOBODY, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip().startswith(f"Permission denied: {tmp_path}/locked")


def test_what_is_called_an_image_and_is_none_is_its_own_failure(tmp_path, infexport, zoo_bundle):
    """A link to nothing or to itself, a pipe, a socket: found, so that reading says what is wrong with each."""
    (tmp_path / "good.png").write_bytes(DIGIT.read_bytes())
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "self.png").symlink_to(tmp_path / "self.png")
    os.mkfifo(tmp_path / "pipe.png")
    with socket.socket(socket.AF_UNIX) as listening:
        here = Path.cwd()
        os.chdir(tmp_path)  # the name of a socket has 107 characters at most
        try:
            listening.bind("socket.png")
        finally:
            os.chdir(here)
        result = infexport("run-engine", zoo_bundle("digits-linear"), tmp_path, "--json", exit_code=1)
    document = json.loads(result.stdout)
    assert [Path(image["file"]).name for image in document["images"]] == ["good.png"]
    assert [Path(one["file"]).name for one in document["failed"]] == ["gone.png", "pipe.png", "self.png", "socket.png"]


def test_a_link_that_may_have_been_a_folder_is_an_error(tmp_path):
    (tmp_path / "a.png").touch()
    (tmp_path / "batch2").symlink_to(tmp_path / "unmounted")
    with pytest.raises(InfexportError, match="cannot find images") as caught:
        find_images([tmp_path])
    assert caught.value.details == f"a link that leads nowhere: {tmp_path}/batch2"


def test_names_that_are_no_utf_8(tmp_path, infexport, zoo_bundle):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    assert "no images" in infexport("run-engine", zoo_bundle("digits-linear"), folder, exit_code=2).stderr
    (folder / "a.png").write_bytes(DIGIT.read_bytes())
    assert find_images([tmp_path]) == [folder / "a.png"]
    assert (
        len(json.loads(infexport("run-engine", zoo_bundle("digits-linear"), tmp_path, "--json").stdout)["images"]) == 1
    )


@pytest.mark.parametrize("name", ["nul\0.png", "x" * 300])
def test_names_that_no_file_can_have(tmp_path, name):
    with pytest.raises(InfexportError, match="cannot find images"):
        find_images([tmp_path / name])


class Store(MemoryFileSystem):
    """A store with a folder that may not be listed, or a link that may lead to a folder."""

    protocol = "odd"
    store: ClassVar = {}
    locked, link = "", ""

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("odd://", "memory://"))

    def ls(self, path, detail=True, **options):
        if path == self.locked:
            raise PermissionError(13, "Access denied", path)
        entries = super().ls(path, detail=True, **options)
        return [entry | {"type": "link"} if entry["name"] == self.link else entry for entry in entries]


@pytest.mark.parametrize(
    ("odd", "words"), [({"locked": "/b/in"}, "Access denied"), ({"link": "/b/batch2"}, "may be a link to a folder")]
)
def test_a_store_s_folder_that_cannot_be_listed_is_an_error(odd, words, monkeypatch):
    fsspec.register_implementation("odd", Store, clobber=True)
    store = fsspec.filesystem("odd")
    for name in ("/b/a.png", "/b/in/c.png", "/b/batch2"):
        store.pipe(name, b"")
    assert find(["odd://b"]) == ["odd://b/a.png", "odd://b/in/c.png"]
    for name, value in odd.items():
        monkeypatch.setattr(Store, name, value)
    with pytest.raises(InfexportError) as caught:
        find(["odd://b"])
    assert words in caught.value.details
