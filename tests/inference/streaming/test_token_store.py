"""Rows in memory and on disk, in half precision, and written behind where they are read."""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infexport.errors import InfexportError
from infexport.inference.streaming.token_store import FileStore, HalfStore, MemoryStore, Ring, Unproven, store_dtype


def rows(count, width=3, seed=0):
    return np.random.default_rng(seed).standard_normal((count, width)).astype(np.float32)


@pytest.fixture(params=["memory", "file"])
def make(request, tmp_path):
    """Rows, width and dtype → a store."""
    if request.param == "memory":
        return MemoryStore
    return lambda *arguments: FileStore(tmp_path / "rows", *arguments)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_what_was_written_is_read(make, dtype):
    store, values = make(10, 3, dtype), rows(10).astype(dtype)
    store.write(0, values[:4])
    store.write(4, values[4:])
    for start, stop in ((0, 10), (3, 5), (9, 10)):
        read = store.read(start, stop)
        assert read.dtype == dtype
        assert np.array_equal(read, values[start:stop])
    store.close()


def test_a_file_keeps_its_rows(tmp_path):
    first = FileStore(tmp_path / "rows", 5, 3, np.float32)
    first.write(1, rows(2))
    first.close()
    with pytest.raises(InfexportError, match="cannot use the scratch file"):
        FileStore(tmp_path / "rows", 5, 3, np.float32)  # made anew, it would have zeros in it
    again = FileStore(tmp_path / "rows", 5, 3, np.float32, left=True)
    assert np.array_equal(again.read(1, 3), rows(2))
    again.close()
    assert (tmp_path / "rows").stat().st_size == 5 * 3 * 4
    for rows_now, words in ((4, "has 60 bytes of 48"), (6, "has 60 bytes of 72")):
        with pytest.raises(Unproven, match=words):
            FileStore(tmp_path / "rows", rows_now, 3, np.float32, left=True)
    (tmp_path / "rows").unlink()
    with pytest.raises(Unproven, match="is gone"):
        FileStore(tmp_path / "rows", 5, 3, np.float32, left=True)


def test_a_full_disk_is_an_error_before_the_work(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(InfexportError, match=r"no room for 4\.00 GB of tokens") as error:
        FileStore(tmp_path / "rows", 1_000_000, 1000, np.float32)
    assert "--scratch" in error.value.hint


def test_half_precision_says_what_it_costs():
    store = HalfStore(MemoryStore(100, 64, np.float16))
    values = rows(100, 64)
    store.write(0, values)
    read = store.read(0, 100)
    assert read.dtype == np.float32
    error = np.linalg.norm(read - values) / np.linalg.norm(values)
    assert store.relative_error == pytest.approx(error, rel=1e-3)
    assert 1e-4 < error < 2**-11
    values[3, 5] = 70_000
    with pytest.raises(InfexportError, match="do not fit into float16") as caught:
        store.write(0, values)
    assert "7e+04" in caught.value.details


def test_sums_over_all_tokens_stay_float32():
    assert store_dtype("mixed", "fp16", token_dtype="float16") == np.float32
    assert store_dtype("tokens", "fp16", token_dtype="float32") == np.float32
    assert store_dtype("q", "fp16", token_dtype="float32") == np.float16
    assert store_dtype("tokens", "fp32", token_dtype="float16") == np.float16


@settings(max_examples=200, deadline=None)
@given(
    count=st.integers(1, 30), spare=st.integers(0, 40), chunk=st.integers(1, 9), sweeps=st.integers(1, 5),
    data=st.data(),
)  # fmt: skip
def test_a_killed_sweep_goes_on_from_any_record(count, spare, chunk, sweeps, data):
    """Every sweep adds 1 to all rows. Killed anywhere, it goes on from the last record, at most `spare` rows back."""
    ring = Ring(MemoryStore(count + spare, 3, np.float32), count, spare)
    values = np.arange(3 * count, dtype=np.float32).reshape(count, 3)
    ring.write(0, values, 0)
    for generation in range(1, sweeps + 1):
        recorded = 0
        start = 0
        kills = data.draw(st.integers(0, 3)) if spare else 0
        while start < count:
            stop = min(count, start + chunk)
            ring.write(start, ring.read(start, stop, generation - 1) + 1, generation)
            start = stop
            if kills and start - recorded <= spare:
                kills -= 1
                start = recorded
            elif start - recorded + chunk > spare:
                recorded = start
    assert np.array_equal(ring.read(0, count, sweeps), values + sweeps)
