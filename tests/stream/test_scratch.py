"""Runs that are interrupted go on; what has changed starts anew; nothing is left behind."""

from __future__ import annotations

from contextlib import suppress

import numpy as np
import pytest

from infexport.bundle import open_bundle
from infexport.errors import InfexportError
from infexport.runners.ort import OrtStages
from infexport.stream import stream
from infexport.stream.driver import Position
from infexport.stream.scratch import Identity, Scratch, clean
from infexport.stream.source import ArrayRows, Source
from infexport.stream.stores import FileStore
from infexport.synthetic import synthetic_image


class Killed(BaseException):
    """Not an error: what a signal or a power cut is to the code."""


class Counting:
    """Stages that are interrupted in the `last`-th call, before or after it was computed."""

    def __init__(self, runner, last=None, after=False):
        self.runner, self.last, self.after, self.calls = runner, last, after, 0
        self.precision, self.max_rows = runner.precision, runner.max_rows

    def run(self, stage, feeds):
        self.calls += 1
        if self.calls == self.last and not self.after:
            raise Killed
        outputs = self.runner.run(stage, feeds)
        if self.calls == self.last:
            raise Killed
        return outputs


@pytest.fixture
def image_file(tmp_path):
    path = tmp_path / "image"
    path.write_bytes(b"pixels")
    return path


@pytest.mark.parametrize("name", ["torchvision_linear", "torchvision_pure"])
def test_killed_anywhere_the_answer_is_the_same_bit_for_bit(name, golden_bundle, image_file, tmp_path):
    bundle, image = open_bundle(golden_bundle(name)), synthetic_image(100, 130)
    identity = Identity(image_file, {"chunk": 3})

    def run(counting, said):
        with Scratch(tmp_path / "scratch", identity, said.append) as scratch:
            source = Source(ArrayRows(image), bundle.manifest.config["patch_size"], "pad")
            return stream(bundle, counting, source, scratch, chunk=3, centrality=True)

    with OrtStages(bundle, "cpu") as runner:
        whole = Counting(runner)
        expected = run(whole, [])
        assert not list((tmp_path / "scratch").iterdir())  # nothing is left after success
        random = np.random.default_rng(0)
        for trial in range(10):
            said: list[str] = []
            first = Counting(runner, int(random.integers(20, 3 * whole.calls // 4)), after=bool(trial % 2))
            second = Counting(runner, int(random.integers(2, 20)))  # killed again, in the run that goes on
            for killed in (first, second):
                with pytest.raises(Killed):
                    run(killed, said)
            last = Counting(runner)
            found = run(last, said)
            assert np.array_equal(found.logits, expected.logits)
            assert np.array_equal(found.features, expected.features)
            assert np.array_equal(found.centrality.cells, expected.centrality.cells)
            assert last.calls < whole.calls
            assert sum("going on" in line for line in said) >= 1
            assert not list((tmp_path / "scratch").iterdir())


def test_what_changed_starts_anew_and_says_so(image_file, tmp_path):
    said: list[str] = []

    def interrupted(facts):
        scratch = Scratch(tmp_path, Identity(image_file, facts), said.append)
        scratch.__enter__()
        position = scratch.position
        scratch.record(Position(3, 5, {"mass": np.arange(2.0)}, {"moment": np.ones((1, 2))}))
        scratch.__exit__(Killed, Killed(), None)
        return position

    assert interrupted({"chunk": 7}) is None
    again = interrupted({"chunk": 7})
    assert (again.stage, again.done) == (3, 5)
    assert again.sums["mass"].tolist() == [0, 1]
    assert again.added["moment"].tolist() == [[1, 1]]
    assert interrupted({"chunk": 8}) is None
    assert "chunk" in said[-2]
    image_file.write_bytes(b"other pixels")
    assert interrupted({"chunk": 8}) is None
    assert "image size" in said[-2]


def test_an_error_of_ours_leaves_nothing(image_file, tmp_path):
    with pytest.raises(InfexportError, match="damaged"), Scratch(tmp_path / "s", Identity(image_file, {}), print):
        raise InfexportError("damaged")
    assert not list((tmp_path / "s").iterdir())


def test_one_process_at_a_time(image_file, tmp_path):
    identity = Identity(image_file, {})
    with Scratch(tmp_path, identity, print) as scratch:
        (scratch.folder / "tokens").write_bytes(b"x" * 5000)
        with pytest.raises(InfexportError, match="is being run already"), Scratch(tmp_path, identity, print):
            pass
        assert clean(tmp_path) == 0  # what is in use stays
        assert (scratch.folder / "tokens").exists()


def test_clean_deletes_what_was_left(image_file, tmp_path):
    scratch = Scratch(tmp_path, Identity(image_file, {}), print)
    scratch.__enter__()
    (scratch.folder / "tokens").write_bytes(b"x" * 5000)
    scratch.__exit__(Killed, Killed(), None)
    (tmp_path / "somebody else's").mkdir()
    assert clean(tmp_path) >= 5000
    assert not scratch.folder.exists()
    assert (tmp_path / "somebody else's").exists()


def interrupted(root, identity):
    """A folder as a run leaves it that was killed."""
    scratch = Scratch(root, identity, print)
    scratch.__enter__()
    (scratch.folder / "tokens").write_bytes(b"x" * 5000)
    scratch.record(Position(3, 5))
    scratch.__exit__(Killed, Killed(), None)
    return scratch.folder


def test_killed_while_it_is_deleted_it_starts_anew(image_file, tmp_path, monkeypatch):
    """Nothing is gone on with whose tokens may be gone."""
    from pathlib import Path

    identity, unlink = Identity(image_file, {}), Path.unlink
    folder = interrupted(tmp_path, identity)
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
    with Scratch(tmp_path, identity, print) as scratch:
        assert scratch.position is None


def test_a_record_that_is_none_starts_anew(image_file, tmp_path):
    folder = interrupted(tmp_path, Identity(image_file, {}))
    (folder / "state.npz").write_bytes(b"half a record")
    with Scratch(tmp_path, Identity(image_file, {}), print) as scratch:
        assert scratch.position is None


def test_a_record_of_which_a_byte_has_changed_starts_anew(image_file, tmp_path):
    folder = interrupted(tmp_path, Identity(image_file, {}))
    content = bytearray((folder / "state.npz").read_bytes())
    content[-30] ^= 1
    (folder / "state.npz").write_bytes(content)
    with Scratch(tmp_path, Identity(image_file, {}), print) as scratch:
        assert scratch.position is None


@pytest.mark.parametrize("name", ["lock", "run.json.partial", "state.npz.partial", "run.json", "state.npz"])
def test_links_in_it_are_not_written_through(name, image_file, tmp_path):
    """Its name can be guessed: who finds the folder writable could have us overwrite any file of ours."""
    folder, victim = interrupted(tmp_path, Identity(image_file, {})), tmp_path / "victim"
    victim.write_text("precious")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(victim)
    with suppress(InfexportError), Scratch(tmp_path, Identity(image_file, {}), print) as scratch:
        scratch.record(Position())
    assert victim.read_text() == "precious"


def test_tokens_are_not_written_through_a_link(tmp_path):
    (tmp_path / "tokens").symlink_to(tmp_path / "victim")
    with pytest.raises(InfexportError, match="cannot use the scratch file"):
        FileStore(tmp_path / "tokens", 1, 1, np.float32)
    assert not (tmp_path / "victim").exists()


def test_a_folder_of_somebody_else_is_refused(image_file, tmp_path, monkeypatch):
    identity = Identity(image_file, {})
    (tmp_path / identity.name).mkdir()
    monkeypatch.setattr("os.geteuid", lambda: 12345)
    with pytest.raises(InfexportError, match="not this user's"), Scratch(tmp_path, identity, print):
        pass


def test_a_disk_that_fills_up_later_is_our_error(image_file, tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    scratch = Scratch(tmp_path, Identity(image_file, {}), print)
    with pytest.raises(InfexportError, match="cannot use the scratch file"), scratch:
        scratch.record(Position(1, 2))
    assert not list(tmp_path.glob("infexport-*"))


def test_rounding_is_that_of_the_whole_run(golden_bundle, image_file, tmp_path):
    bundle, image = open_bundle(golden_bundle("torchvision_linear")), synthetic_image(100, 130)

    def run(counting):
        with Scratch(tmp_path / "scratch", Identity(image_file, {}), print) as scratch:
            source = Source(ArrayRows(image), bundle.manifest.config["patch_size"], "pad")
            return stream(bundle, counting, source, scratch, chunk=3, half=True)

    with OrtStages(bundle, "cpu") as runner:
        whole = Counting(runner)
        expected = run(whole)
        with pytest.raises(Killed):
            run(Counting(runner, whole.calls))  # in the last stage, which writes nothing
        found = run(Counting(runner))
    assert np.array_equal(found.logits, expected.logits)
    assert found.rounding == pytest.approx(expected.rounding, rel=0.1)
