"""Listeners of a run: what they do and raise is theirs, and no image's failure."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from infexport import Predictor
from infexport.errors import InfexportError
from infexport.inference.prediction import Answered, Failure, Prediction
from infexport.inference.runners.onnxruntime import OrtRunner, OrtStages
from infexport.system.progress import ItemsDone, ProgressListener, SessionOpened, StageProgress, Status

IMAGES = list(np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8))


def predictor_of(bundle, execution, **options):
    return Predictor(bundle, size="native", threads=1, execution=execution, **options)


class Raising(ProgressListener):
    def __init__(self, kind):
        self.kind = kind

    def on_event(self, event):
        if isinstance(event, self.kind):
            raise BrokenPipeError(32, "Broken pipe")


@pytest.mark.parametrize(
    ("way", "kind"),
    [(way, kind) for way in ("whole", "stream", "scratch") for kind in (SessionOpened, Answered, ItemsDone)]
    + [(way, StageProgress) for way in ("stream", "scratch")]
    + [("scratch", Status)],
)
def test_what_a_listener_raises_ends_the_call_alone(way, kind, zoo_bundle, tmp_path, monkeypatch):
    opened = []
    for runner in (OrtRunner, OrtStages):
        enter = runner.__enter__
        monkeypatch.setattr(runner, "__enter__", lambda self, enter=enter: opened.append(self) or enter(self))
    options = {"scratch": tmp_path} if way == "scratch" else {}
    with predictor_of(zoo_bundle("digits-linear"), "whole" if way == "whole" else "stream", **options) as predictor:
        with pytest.raises(BrokenPipeError):
            predictor.predict(IMAGES, Raising(kind))
        assert all(isinstance(row, Prediction) for row in predictor.predict(IMAGES))
    assert len(opened) == 1  # what was opened before it raised is not opened again


@pytest.mark.parametrize("kind", [Answered, StageProgress, SessionOpened])
def test_a_listener_may_call_while_an_image_is_streamed(kind, zoo_bundle):
    predictor = predictor_of(zoo_bundle("digits-linear"), "stream", chunk=16)
    expected = [row.logits for row in predictor_of(zoo_bundle("digits-linear"), "stream", chunk=16).predict(IMAGES)]
    found = {}

    class Calling(ProgressListener):
        def on_event(self, event):
            if isinstance(event, kind) and "inner" not in found:
                found["inner"] = []
                found["inner"] = predictor.predict(IMAGES)

    thread = threading.Thread(target=lambda: found.update(outer=predictor.predict(IMAGES, Calling())), daemon=True)
    thread.start()
    thread.join(30)
    assert not thread.is_alive()
    for rows in found["inner"], found["outer"]:
        assert all(np.array_equal(row.logits, logits) for row, logits in zip(rows, expected, strict=True))


@pytest.mark.parametrize("kind", [SessionOpened, Answered])
def test_other_threads_go_on_while_a_listener_waits(kind, zoo_bundle):
    predictor = predictor_of(zoo_bundle("digits-linear"), "stream")
    done = threading.Event()

    class Waiting(ProgressListener):
        waited = True

        def on_event(self, event):
            if not isinstance(event, kind):
                return
            other = threading.Thread(target=lambda: predictor.predict(IMAGES[:1]) and done.set(), daemon=True)
            other.start()
            self.waited = done.wait(20) and self.waited

    listener = Waiting()
    assert len(predictor.predict(IMAGES[:1], listener)) == 1
    assert listener.waited


def test_answers_are_kept_where_another_graph_cannot_be_loaded(zoo_bundle, monkeypatch):
    def fail(self):
        raise InfexportError("no graph")

    # the first fits whole into this memory, the second is streamed
    large = np.zeros((1024, 1024, 3), np.uint8)
    predictor = predictor_of(zoo_bundle("digits-linear"), "auto", memory="180MB")
    first, second = predictor.predict([IMAGES[0], large])
    assert (first.execution, second.execution[:6]) == ("whole", "stream")
    for runner, images in ((OrtStages, [IMAGES[0], large, IMAGES[1]]), (OrtRunner, [large, IMAGES[0], large])):
        predictor.close()
        with monkeypatch.context() as patch:
            patch.setattr(runner, "__enter__", fail)
            first, second, third = predictor.predict(images)
            assert isinstance(first, Prediction)
            assert isinstance(second, Failure)
            assert second.error.summary == "no graph"
            assert isinstance(third, Prediction)
            with pytest.raises(InfexportError, match="no graph"):
                predictor.predict(images[1:2])
