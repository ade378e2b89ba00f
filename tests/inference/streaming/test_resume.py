"""An interrupted run goes on only with what is proven to be what it left: the same answer, or a fresh start."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from support import StatusRecorder
from torch_stages import Counting, Killed, torch_bundle

from infexport.errors import InfexportError
from infexport.evaluation.synthetic_images import synthetic_image
from infexport.images.strips import ArrayRows, Source
from infexport.inference.streaming import stream
from infexport.inference.streaming.resume import Identity, Scratch

SHAPES = {
    "linear": {},
    "pure": {"variant": "pure_infsa"},
    "terms": {"variant": "pure_infsa", "neumann_terms": 3},
}
CHUNK = 4
DAMAGES = ("deleted", "cut", "grown", "overwritten", "zeroed", "older record", "exchanged")


class Case:
    """One image and network, and a folder in which its runs are interrupted."""

    def __init__(self, shape, root, token_dtype="float32"):
        self.bundle, self.runner = torch_bundle(**SHAPES[shape])
        self.root, self.token_dtype, self.file = root / "scratch", token_dtype, root / "image"
        self.images = [synthetic_image(60, 76), np.ascontiguousarray(synthetic_image(60, 76)[::-1])]
        self.said: list[str] = []
        self.show(1)
        self.other = self.run()
        self.show(0)
        whole = Counting(self.runner)
        self.expected, self.calls = self.run(whole), whole.calls
        assert not list(self.root.iterdir())  # nothing is left after success

    def show(self, which):
        """Put one of two images of equal size and time in its place."""
        self.image = self.images[which]
        self.file.write_bytes(self.image.tobytes())
        os.utime(self.file, ns=(0, 0))

    def run(self, counting=None):
        self.said.clear()
        identity = Identity([self.file], {"chunk": CHUNK}, "a place")
        with Scratch(self.root, identity, StatusRecorder(self.said)) as scratch:
            source = Source(ArrayRows(self.image), 8, "pad")
            runner = counting or Counting(self.runner)
            return stream(self.bundle, runner, source, scratch, CHUNK, self.token_dtype, centrality=True)

    def interrupt(self, random, raises=Killed, before=1.0):
        """End a run anywhere after its first record, before a share of its calls."""
        last = int(random.integers(25, int(before * self.calls) + 1))
        with pytest.raises(raises if isinstance(raises, type) else type(raises)):
            self.run(Counting(self.runner, last, after=bool(random.integers(2)), raises=raises))
        (folder,) = self.root.iterdir()
        return folder

    def same(self, found, expected=None):
        expected = expected or self.expected
        pairs = ((getattr(found, name), getattr(expected, name)) for name in ("logits", "features"))
        cells = found.centrality.cells, expected.centrality.cells
        return all(np.array_equal(*pair) for pair in (*pairs, cells))


def damage(kind, folder, random):
    """Damage one of the files that hold rows or maps, and tell which."""
    file = random.choice(
        sorted(file for file in folder.iterdir() if file.suffix in ("", ".npy") and file.name != "lock")
    )
    size = file.stat().st_size
    start = int(random.integers(size))
    if kind == "deleted":
        file.unlink()
    elif kind == "cut":
        os.truncate(file, start)
    elif kind == "grown":
        os.truncate(file, size + 100)
    else:
        content = bytearray(file.read_bytes())
        if kind == "overwritten":
            for place in random.integers(size, size=20):
                content[place] ^= 1 << int(random.integers(8))
        elif kind == "zeroed":
            content[start : start + 4096] = bytes(len(content[start : start + 4096]))
        file.write_bytes(content)
    return file.name


@pytest.mark.parametrize(
    ("shape", "token_dtype"),
    [("linear", "float32"), ("linear", "float16"), ("pure", "float32"), ("terms", "float32")],
    ids=str,
)
def test_killed_anywhere_the_answer_is_the_same_bit_for_bit(shape, token_dtype, tmp_path):
    case, random = Case(shape, tmp_path, token_dtype), np.random.default_rng(0)
    for _ in range(5):
        case.interrupt(random)
        with pytest.raises(Killed):  # killed again, in the run that goes on
            case.run(Counting(case.runner, int(random.integers(1, 20))))
        last = Counting(case.runner)
        assert case.same(case.run(last))
        assert last.calls < case.calls
        assert case.said == [
            "an earlier run was interrupted: checking what it left",
            "going on where an earlier run was interrupted",
        ]
        assert not list(case.root.iterdir())


def check_damaged(shape, kind, times, root, seed=0):
    """Interrupt, damage and run again; return how often it went on, and how often it started anew."""
    case, random = Case(shape, root), np.random.default_rng(seed)
    went_on, anew = 0, 0
    for _ in range(times):
        folder = case.interrupt(random, before=0.4 if kind == "older record" else 1)
        names = ["rows "]
        if kind == "older record":
            # the rows are of a later moment than the record, as after a power cut
            record = (folder / "state.npz").read_bytes()
            with pytest.raises(Killed):
                case.run(Counting(case.runner, int(random.integers(30, 60))))
            (folder / "state.npz").write_bytes(record)
        elif kind == "exchanged":
            case.show(1)
            assert case.same(case.run(), case.other)
            assert case.said == [f"starting anew: the run that is kept in {folder} had another image"]
            case.show(0)
        else:
            names = [damage(kind, folder, random)]
        assert case.same(case.run()), (kind, names)
        if case.said[-1].startswith("going on"):
            went_on += 1
            # where rows that are not read again have changed
            assert kind not in ("deleted", "cut", "grown") or names[0].startswith("centrality"), names
        else:
            anew += 1
            assert case.said[-1].startswith("starting anew, an earlier run cannot be gone on with: "), case.said
            assert any(name in case.said[-1] for name in names), case.said
    return went_on, anew


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("shape", ["linear", "pure"])
def test_what_was_damaged_is_not_gone_on_with(shape, kind, tmp_path):
    went_on, anew = check_damaged(shape, kind, 3, tmp_path)
    assert went_on if kind == "exchanged" else anew


@pytest.mark.heavy
@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("shape", SHAPES)
def test_what_was_damaged_at_thirty_moments(shape, kind, tmp_path):
    went_on, anew = check_damaged(shape, kind, 30, tmp_path, seed=1)
    print(f"{shape}, {kind}: went on {went_on}, started anew {anew}, right each time")


@pytest.mark.parametrize(
    "error", [MemoryError(), InfexportError("failed in a stage", "bad allocation"), OSError(5, "I/O error")], ids=str
)
def test_errors_of_the_environment_keep_what_was_done(error, tmp_path):
    case, random = Case("linear", tmp_path), np.random.default_rng(2)
    case.interrupt(random, raises=error)
    assert case.said[-1].startswith("interrupted: the same command goes on")
    last = Counting(case.runner)
    assert case.same(case.run(last))
    assert case.said[-1].startswith("going on")
    assert last.calls < case.calls


@pytest.mark.parametrize("where", ["pwrite", "replace"])
def test_a_disk_that_is_full_in_the_middle_keeps_what_was_done(where, tmp_path, monkeypatch):
    case = Case("linear", tmp_path)
    module, most, calls = (os, 60, 0) if where == "pwrite" else (Path, 3, 0)
    real = getattr(module, where)

    def full(*arguments, **options):
        nonlocal calls
        calls += 1
        if calls > most:
            raise OSError(28, "No space left on device")
        return real(*arguments, **options)

    monkeypatch.setattr(module, where, full)
    with pytest.raises(InfexportError, match="cannot use the scratch file"):
        case.run()
    monkeypatch.undo()
    last = Counting(case.runner)
    assert case.same(case.run(last))
    assert case.said[-1].startswith("going on")
    assert last.calls < case.calls
