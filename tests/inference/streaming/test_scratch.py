"""Runs that are interrupted go on; what has changed starts anew; nothing is left behind."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from support import StatusRecorder
from torch_stages import Counting, Killed, torch_bundle

from infexport.errors import InfexportError, LastingError
from infexport.evaluation.synthetic_images import synthetic_image
from infexport.images.strips import ArrayRows, Source
from infexport.inference.streaming import stream
from infexport.inference.streaming.driver import Position
from infexport.inference.streaming.resume import Identity, Scratch, clean
from infexport.inference.streaming.token_store import FileStore
from infexport.system.progress import SILENT


@pytest.fixture
def image_file(tmp_path):
    path = tmp_path / "image"
    path.write_bytes(b"pixels")
    return path


def left_by(root, identity, position=None, said=None, error=Killed):
    """A folder as a run leaves it that was killed, or ended by an error."""
    with (
        suppress(Killed, Exception),
        Scratch(root, identity, StatusRecorder(said if said is not None else [])) as scratch,
    ):
        (scratch.folder / "tokens").write_bytes(b"x" * 5000)
        scratch.record(position or Position(3, 5))
        raise error
    return scratch.folder


def test_a_record_is_read_as_it_was_written(image_file, tmp_path):
    sums, added = {"mass": np.arange(2.0)}, {"moment": np.ones((1, 2))}
    checksums = {"tokens/3": np.arange(4, dtype=np.uint32)}
    left_by(tmp_path, Identity([image_file], {"chunk": 7}), Position(3, 5, sums, added, checksums=checksums))
    with Scratch(tmp_path, Identity([image_file], {"chunk": 7}), SILENT) as scratch:
        again = scratch.position
    assert (again.stage, again.done) == (3, 5)
    for found, expected in ((again.sums, sums), (again.added, added), (again.checksums, checksums)):
        assert {name: value.tolist() for name, value in found.items()} == {n: v.tolist() for n, v in expected.items()}


def test_every_fingerprint_has_a_folder_of_its_own(image_file, tmp_path):
    """A run with other options neither destroys one that was interrupted nor waits for one that is alive."""
    said: list[str] = []
    first = left_by(tmp_path, Identity([image_file], {"chunk": 7}, "a"), said=said)
    assert said[0].startswith("starting: no run of this image is kept in")
    with Scratch(tmp_path, Identity([image_file], {"chunk": 8}, "a"), StatusRecorder(said)) as other:
        assert other.position is None
        assert said[-1] == f"starting anew: the run that is kept in {first} had another chunk"
        with Scratch(tmp_path, Identity([image_file], {"chunk": 7}, "a"), SILENT) as again:
            assert again.folder == first
            assert (again.position.stage, again.position.done) == (3, 5)
            with Scratch(tmp_path, Identity([image_file], {"chunk": 7}, "a"), StatusRecorder(said)) as beside:
                assert said[-1] == f"starting: another process is in {first}"
                assert len({beside.folder, again.folder, other.folder}) == 3


def test_of_several_folders_that_with_a_record_is_gone_on_with(image_file, tmp_path):
    identity = Identity([image_file], {})
    with Scratch(tmp_path, identity, SILENT):
        left = left_by(tmp_path, identity)  # beside it
    with Scratch(tmp_path, identity, SILENT) as again:
        assert again.folder == left
        assert again.position is not None


@pytest.mark.parametrize("content", [b"PIXELS", b"other pixels"])
def test_another_image_in_its_place_is_another_run(content, image_file, tmp_path):
    status = image_file.stat()
    left_by(tmp_path, Identity([image_file], {}, "a"))
    image_file.write_bytes(content)
    os.utime(image_file, ns=(status.st_atime_ns, status.st_mtime_ns))
    said: list[str] = []
    with Scratch(tmp_path, Identity([image_file], {}, "a"), StatusRecorder(said)) as scratch:
        assert scratch.position is None
    assert said[0].endswith("had another image")


def test_arrays_of_equal_bytes_and_other_shapes_are_other_images():
    pixels = np.arange(48, dtype=np.uint8)
    names = {Identity(pixels.reshape(shape), {}).name for shape in ((2, 8, 3), (4, 4, 3), (8, 2, 3))}
    assert len(names) == 3


def test_all_files_of_a_slide_count(image_file, tmp_path):
    (tmp_path / "data").write_bytes(b"level 0")
    files = [image_file, tmp_path / "data"]
    before = Identity(files, {}).name
    (tmp_path / "data").write_bytes(b"LEVEL 0")
    assert Identity(files, {}).name != before


def test_an_error_of_ours_leaves_nothing(image_file, tmp_path):
    with pytest.raises(InfexportError, match="damaged"), Scratch(tmp_path / "s", Identity([image_file], {}), SILENT):
        raise InfexportError("damaged")
    assert not list((tmp_path / "s").iterdir())


@pytest.mark.parametrize("error", [Killed(), InfexportError("no memory"), MemoryError(), OSError(5, "I/O error")])
def test_errors_that_may_pass_keep_what_was_recorded(error, image_file, tmp_path):
    said: list[str] = []
    left_by(tmp_path, Identity([image_file], {}), said=said, error=error)
    assert said[-1].startswith("interrupted: the same command goes on")
    with Scratch(tmp_path, Identity([image_file], {}), SILENT) as scratch:
        assert scratch.position.done == 5


def test_an_error_that_lasts_leaves_nothing(image_file, tmp_path):
    left_by(tmp_path, Identity([image_file], {}), error=LastingError("damaged"))
    assert not list(tmp_path.glob("infexport-*"))


def test_a_disk_that_fails_to_read_the_record_deletes_nothing(image_file, tmp_path, monkeypatch):
    folder = left_by(tmp_path, Identity([image_file], {}))
    read = Path.read_bytes

    def fails(path):
        if path.name == "state.npz":
            raise OSError(5, "Input/output error")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", fails)
    with pytest.raises(InfexportError, match="cannot use"), Scratch(tmp_path, Identity([image_file], {}), SILENT):
        pass
    monkeypatch.undo()
    with Scratch(tmp_path, Identity([image_file], {}), SILENT) as scratch:
        assert scratch.folder == folder
        assert scratch.position is not None


def test_clean_deletes_what_was_left_and_nothing_that_is_in_use(image_file, tmp_path):
    folder = left_by(tmp_path, Identity([image_file], {}))
    (tmp_path / "somebody else's").mkdir()
    with Scratch(tmp_path, Identity([image_file], {"chunk": 1}), SILENT) as alive:
        (alive.folder / "tokens").write_bytes(b"x" * 5000)
        assert clean(tmp_path) >= 5000
        assert not folder.exists()
        assert (alive.folder / "tokens").exists()
        assert clean(tmp_path) == 0
    assert (tmp_path / "somebody else's").exists()


@pytest.mark.parametrize("name", ["infexport-project", f"infexport-{'0' * 32}", f"infexport-{'0' * 32}-1-kept"])
def test_clean_deletes_no_folder_that_is_only_called_alike(name, image_file, tmp_path):
    (tmp_path / name).mkdir()
    for file in ("lock", "thesis"):
        (tmp_path / name / file).write_text("precious")
    folder = left_by(tmp_path, Identity([image_file], {}))
    clean(tmp_path)
    assert not folder.exists()
    assert (tmp_path / name / "thesis").read_text() == "precious"


def test_clean_goes_on_past_a_folder_of_somebody_else(image_file, tmp_path, monkeypatch):
    """Whose content may not even be looked at."""
    left_by(tmp_path, Identity([image_file], {}))
    other = tmp_path / f"infexport-{'0' * 32}-1"
    other.mkdir()
    lstat = Path.lstat

    def status(path):
        found = lstat(path)
        return os.stat_result([*found[:4], 12345, *found[5:]]) if path == other else found

    of_all = Path.is_file

    def is_file(path):
        if other in path.parents:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return of_all(path)

    monkeypatch.setattr(Path, "lstat", status)
    monkeypatch.setattr(Path, "is_file", is_file)
    assert clean(tmp_path) >= 5000
    assert sorted(tmp_path.iterdir()) == [image_file, other]


def test_clean_of_a_folder_that_cannot_be_listed_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InfexportError, match="cannot use the scratch file"):
        clean(tmp_path / "file")
    assert clean(tmp_path / "nothing") == 0


def test_a_disk_without_locks_is_told(image_file, tmp_path, monkeypatch):
    """And not taken for one on which other processes have all folders, whose numbers do not end."""

    def fail(*arguments):
        calls.append(arguments)
        assert len(calls) < 3
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    calls = []
    monkeypatch.setattr("fcntl.flock", fail)
    with pytest.raises(InfexportError) as error, Scratch(tmp_path, Identity([image_file], {}), SILENT):
        pass
    assert error.value.details == os.strerror(errno.ENOLCK)


def test_killed_while_it_is_deleted_it_starts_anew(image_file, tmp_path, monkeypatch):
    """Nothing is gone on with whose tokens may be gone."""
    identity, unlink = Identity([image_file], {}), Path.unlink
    folder = left_by(tmp_path, identity)
    deleted = []

    def dies(path, missing_ok=False):
        unlink(path, missing_ok)
        deleted.append(path.name)
        if path.name == "tokens":
            raise Killed

    monkeypatch.setattr(Path, "unlink", dies)
    with pytest.raises(Killed):
        clean(tmp_path)
    monkeypatch.undo()
    assert deleted[:2] == ["state.npz", "run.json"]
    assert (folder / "lock").exists()  # which --clean needs to find it again
    with Scratch(tmp_path, identity, SILENT) as scratch:
        assert scratch.position is None


def test_a_record_that_is_none_starts_anew(image_file, tmp_path):
    folder = left_by(tmp_path, Identity([image_file], {}))
    (folder / "state.npz").write_bytes(b"half a record")
    with Scratch(tmp_path, Identity([image_file], {}), SILENT) as scratch:
        assert scratch.position is None


def test_a_record_of_which_a_byte_has_changed_starts_anew(image_file, tmp_path):
    folder = left_by(tmp_path, Identity([image_file], {}))
    content = bytearray((folder / "state.npz").read_bytes())
    content[-30] ^= 1
    (folder / "state.npz").write_bytes(content)
    with Scratch(tmp_path, Identity([image_file], {}), SILENT) as scratch:
        assert scratch.position is None


@pytest.mark.parametrize("name", ["lock", "run.json.partial", "state.npz.partial", "run.json", "state.npz"])
def test_links_in_it_are_not_written_through(name, image_file, tmp_path):
    """Its name can be guessed: who finds the folder writable could have us overwrite any file of ours."""
    folder, victim = left_by(tmp_path, Identity([image_file], {})), tmp_path / "victim"
    victim.write_text("precious")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(victim)
    with suppress(InfexportError), Scratch(tmp_path, Identity([image_file], {}), SILENT) as scratch:
        scratch.record(Position())
    assert victim.read_text() == "precious"


def test_tokens_are_not_written_through_a_link(tmp_path):
    (tmp_path / "tokens").symlink_to(tmp_path / "victim")
    with pytest.raises(InfexportError, match="cannot use the scratch file"):
        FileStore(tmp_path / "tokens", 1, 1, np.float32)
    assert not (tmp_path / "victim").exists()


def test_a_folder_of_somebody_else_is_refused(image_file, tmp_path, monkeypatch):
    identity = Identity([image_file], {})
    (tmp_path / f"{identity.name}-1").mkdir()
    monkeypatch.setattr("os.geteuid", lambda: 12345)
    with pytest.raises(InfexportError, match="not this user's"), Scratch(tmp_path, identity, SILENT):
        pass


def test_rounding_is_that_of_the_whole_run(image_file, tmp_path):
    (bundle, runner), image = torch_bundle(), synthetic_image(100, 130)

    def run(counting):
        with Scratch(tmp_path / "scratch", Identity([image_file], {}), SILENT) as scratch:
            source = Source(ArrayRows(image), bundle.manifest.config.patch_size, "pad")
            return stream(bundle, counting, source, scratch, chunk=3, token_dtype="float16")

    whole = Counting(runner)
    expected = run(whole)
    with pytest.raises(Killed):
        run(Counting(runner, whole.calls))  # in the last stage, which writes nothing
    found = run(Counting(runner))
    assert np.array_equal(found.logits, expected.logits)
    assert found.rounding == pytest.approx(expected.rounding, rel=0.1)
