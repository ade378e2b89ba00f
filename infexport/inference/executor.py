"""Sessions that are shared by all calls that run images through a bundle."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import ExitStack

from infexport.bundle import Bundle
from infexport.bundle.manifest import check_outside_bundles
from infexport.images.fetch import Item
from infexport.inference.call import Call
from infexport.inference.options import InferenceOptions
from infexport.inference.prediction import ImageResult
from infexport.inference.runners import ImageRunner, StageRunner, spread
from infexport.inference.runners.factory import RunnerFactory
from infexport.system.progress import ProgressListener, SessionOpened, Status


class Run:
    """Runs images through a bundle, images of equal grids together where they are run whole.

    Threads may share it: calls share nothing but the opened sessions. Images that are run whole run concurrently;
    streamed images take turns.

    Args:
        bundle: what to run.
        options: of the run.
        opening: opens the runners; None makes one from the options.

    Raises:
        InfexportError: the scratch folder is inside a bundle.
    """

    def __init__(self, bundle: Bundle, options: InferenceOptions, opening: RunnerFactory | None = None) -> None:
        if options.scratch is not None:
            check_outside_bundles(options.scratch, "scratch folder", is_folder=True)
        self.bundle, self.options = bundle, options
        self.opening = opening or RunnerFactory(
            bundle, options.provider, options.engine, options.threads, options.centrality
        )
        self.streaming = threading.RLock()  # reentrant: a listener may start a call
        """Held while an image is streamed: stages are loaded one after the other."""
        self._lock = threading.RLock()
        self._calls, self._closing = 0, False
        self._sessions = ExitStack()
        self._runner: ImageRunner | None = None
        self._stages: StageRunner | None = None
        self._on_gpu: bool | None = None
        self._noted = False

    def __call__(
        self, images: Sequence[Item], listener: ProgressListener | None = None, keep_centrality: bool = True
    ) -> list[ImageResult]:
        """Return a row for every image, in their order. An error of one image is a failure in its row.

        Args:
            images: see `infexport.images.fetch.Item`.
            listener: receives the progress.
            keep_centrality: predictions keep the centrality that the options ask for; else only the listener gets it.

        Raises:
            InfexportError: the bundle cannot be run at all.
            Exception: raised by the listener.
        """
        with self._lock:
            self._calls += 1
        try:
            return Call(self, images, listener or ProgressListener(), keep_centrality).run()
        finally:
            with self._lock:
                self._calls -= 1
                if self._closing and not self._calls:
                    self._close()

    def close(self) -> None:
        """Release the sessions once the last running call is done; the next call opens them again."""
        with self._lock:
            self._closing = True
            if not self._calls:
                self._close()

    def _close(self) -> None:
        self._runner = self._stages = None
        self._closing = False
        self._sessions.close()

    def runner(self, listener: ProgressListener) -> ImageRunner:
        """Return the runner of the whole graph, loading it on first use."""
        with self._lock:
            first = self._runner is None
            if self._runner is None:
                self._runner = self._sessions.enter_context(self.opening.runner())
            runner = self._runner
        if first:  # outside the lock: the listener may wait for other threads, or fail
            listener.on_event(SessionOpened(runner.provider, runner.precision))
            if runner.provider != "cpu" and (split := spread(runner.placement)):
                listener.on_event(Status(f"{split}; infexport inspect --provider {self.options.provider} shows which"))
        return runner

    def stages(self, listener: ProgressListener) -> StageRunner:
        """Return the runner of the stages, for a caller that holds `streaming`."""
        with self._lock:
            first = self._stages is None
            if self._stages is None:
                self._stages = self._sessions.enter_context(self.opening.stages())
            stages = self._stages
        if first:
            listener.on_event(SessionOpened(stages.provider, stages.precision))
        return stages

    def on_gpu(self, listener: ProgressListener) -> bool:
        """Tell whether whole images are run on a GPU; the first call reports why engines are not used."""
        with self._lock:
            engines = bool(self.opening.engines)  # cached; the first access searches
            first, self._noted = not self._noted, True
        for note in self.opening.notes if first else ():
            listener.on_event(Status(note))
        if self._on_gpu is None:
            self._on_gpu = engines or (self.opening.seeks_gpu and self.runner(listener).provider != "cpu")
        return self._on_gpu
