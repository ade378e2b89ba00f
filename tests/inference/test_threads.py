"""One Predictor, many threads: every call has its own rows, whatever the others do."""

from __future__ import annotations

import pickle
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from infexport import Predictor
from infexport.errors import InfexportError
from infexport.inference import call as one_call
from infexport.inference import planner
from infexport.inference.prediction import Answered, Failure, Prediction
from infexport.inference.runners.onnxruntime import OrtRunner
from infexport.system.progress import ProgressListener

THREADS = 8


@pytest.fixture(autouse=True)
def hasty():
    """Have threads exchanged as often as Python can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def images(count, side):
    return list(np.random.default_rng(0).integers(0, 256, (count, side, side, 3), np.uint8))


@pytest.mark.parametrize(
    ("way", "calls"),
    [
        ("whole", 12),
        ("stream", 3),
        ("scratch", 3),
        pytest.param("whole", 500, marks=pytest.mark.heavy),
        pytest.param("stream", 500, marks=pytest.mark.heavy),
    ],
)
def test_answers_are_those_of_one_thread(way, calls, zoo_bundle, tmp_path):
    options = {"execution": "whole"} if way == "whole" else {"execution": "stream", "chunk": 64}
    options |= {"scratch": tmp_path} if way == "scratch" else {}
    given = images(12, 64)
    with Predictor(zoo_bundle("digits-linear"), size="native", threads=1, **options) as predictor:
        expected = [row.logits for row in predictor.predict(given)]
        assert len({row.tobytes() for row in expected}) == len(expected)

        def call(thread):
            random = np.random.default_rng(thread)
            for _ in range(calls):
                chosen = random.permutation(len(given))[: random.integers(1, 4)]
                batch = [given[index] for index in chosen] + ([None] if random.integers(2) else [])
                rows = predictor.predict(batch)
                assert len(rows) == len(batch)
                assert all(isinstance(row, Failure) for row in rows[len(chosen) :])
                for index, row in zip(chosen, rows, strict=False):
                    assert np.array_equal(row.logits, expected[index])

        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(call, range(THREADS)))


def test_it_is_opened_once_by_many(zoo_bundle, monkeypatch):
    opened = []
    enter = OrtRunner.__enter__
    monkeypatch.setattr(OrtRunner, "__enter__", lambda self: opened.append(self) or enter(self))
    predictor = Predictor(zoo_bundle("digits-linear"), size="native", threads=1)
    begin = threading.Barrier(THREADS)

    def call(thread):
        begin.wait()
        return predictor.predict(images(1, 64))[0].logits

    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(call, range(THREADS)))
    assert len(opened) == 1
    assert all(np.array_equal(logits, found[0]) for logits in found)


def test_it_is_closed_when_nobody_is_in_it(zoo_bundle):
    """Closed again and again while others call it, it answers all the same."""
    predictor = Predictor(zoo_bundle("digits-linear"), size="native", threads=1)
    image = images(1, 64)
    (expected,) = predictor.predict(image)
    done = threading.Event()

    def close():
        while not done.is_set():
            predictor.close()

    closing = threading.Thread(target=close)
    closing.start()
    try:
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda _: predictor.predict(image)[0], range(12)))
    finally:
        done.set()
        closing.join()
    assert all(isinstance(row, Prediction) and np.array_equal(row.logits, expected.logits) for row in found)


def test_a_listener_may_close_and_call(zoo_bundle):
    predictor = Predictor(zoo_bundle("digits-linear"), size="native", threads=1)
    image = images(1, 64)

    class Calling(ProgressListener):
        inner = None

        def on_event(self, event):
            if isinstance(event, Answered):
                predictor.close()
                self.inner = predictor.predict(image)[0]

    listener = Calling()
    (row,) = predictor.predict(image, listener)
    assert np.array_equal(listener.inner.logits, row.logits)


def test_what_is_free_is_looked_at_by_every_call(zoo_bundle, monkeypatch):
    """The first call's memory is not every call's."""
    predictor = Predictor(zoo_bundle("digits-linear"), size="native")
    image = images(1, 64)
    assert isinstance(predictor.predict(image)[0], Prediction)
    monkeypatch.setattr(one_call, "usual_memory", lambda: 1000)
    (row,) = predictor.predict(image)
    assert isinstance(row, Failure)
    assert "does not fit into 1000B" in row.error.summary
    monkeypatch.setattr(one_call, "usual_memory", planner.usual_memory)
    assert isinstance(predictor.predict(image)[0], Prediction)


def test_a_relative_path_is_that_of_where_it_was_made(zoo_bundle, tmp_path, monkeypatch):
    bundle = zoo_bundle("digits-linear")
    monkeypatch.chdir(bundle.parent)
    predictor = Predictor(bundle.name, size="native")
    sent = pickle.dumps(predictor)
    monkeypatch.chdir(tmp_path)
    image = images(1, 64)
    assert np.array_equal(predictor.predict(image)[0].logits, pickle.loads(sent).predict(image)[0].logits)
    with pytest.raises(InfexportError, match="not a bundle"):
        Predictor(bundle.name).predict(image)
