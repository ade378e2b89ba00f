"""Choose what runs a bundle: engines on a GPU, or ONNX Runtime."""

from __future__ import annotations

from functools import cached_property

from infexport.bundle import Bundle
from infexport.bundle.manifest import CENTRALITY_MODEL
from infexport.errors import InfexportError
from infexport.inference.engine_selection import STATES, EngineSet, Kind, choose
from infexport.inference.options import check_engine
from infexport.inference.runners.base import ImageRunner, StageRunner
from infexport.inference.runners.onnxruntime import OrtRunner, OrtStages, candidates, import_onnxruntime
from infexport.inference.runners.tensorrt import EngineRunner, EngineStages
from infexport.inference.streaming import CHUNK
from infexport.system.gpus import local_gpu


class RunnerFactory:
    """Opens runners of one bundle.

    Args:
        bundle: what to run.
        provider: `engine`, or a provider of `OrtRunner`. `auto` takes the engines that fit this machine's GPU, if they
            are one set. Otherwise, and for images outside their profiles, it takes ONNX Runtime on a GPU or the CPU.
        engine: name of a set of engines, `<target>-<precision>`; None for the one that fits.
        threads: of ONNX Runtime.
        centrality: tokens' centrality is asked for. Engines of stages give it; for the whole graph ONNX Runtime does.

    Attributes:
        notes: remarks for the user on the choice, complete once `engines` has been read.
    """

    def __init__(
        self,
        bundle: Bundle,
        provider: str = "auto",
        engine: str | None = None,
        threads: int | None = None,
        centrality: bool = False,
    ) -> None:
        self.bundle, self.threads, self._engine, self._centrality = bundle, threads, engine, centrality
        self.notes: list[str] = []
        self._provider = "engine" if engine is not None and provider == "auto" else provider
        check_engine(provider, engine)

    @cached_property
    def engines(self) -> dict[Kind, EngineSet]:
        """Engines in use, by what they run; empty where ONNX Runtime runs everything.

        Raises:
            InfexportError: engines were asked for, and none fits this machine.
        """
        found: dict[Kind, EngineSet] = {}
        if self._provider != "engine" and not (self._provider == "auto" and self.bundle.sidecars):
            return found
        gpu = local_gpu()
        if gpu is None and self._provider == "auto":
            return found
        refused: list[InfexportError] = []
        for kind in KINDS[self._centrality :]:
            try:
                engines = choose(self.bundle, kind, self._engine, gpu)
            except InfexportError as error:
                refused.append(error)
                continue
            if all(engines.backend == other.backend for other in found.values()):  # a process can use one backend
                found[kind] = engines
        if self._provider == "engine" and not found:
            raise refused[0]
        if not found:
            reasons = "; ".join([refused[0].summary, *refused[0].details.splitlines()])
            self.notes.append(f"no engine is used: {reasons}")
        for engine in self.bundle.engines if found else ():
            if engine.state not in ("current", "stale"):  # other engines replace it, but the user should know
                self.notes.append(f"not used: {engine.file}: {STATES[engine.state]}")
        return found

    @property
    def engines_alone(self) -> bool:
        """Tell whether ONNX Runtime must not be used where no engine fits."""
        return self._provider == "engine"

    @property
    def seeks_gpu(self) -> bool:
        """Tell whether ONNX Runtime tries a GPU first; only a session shows whether there is one."""
        return candidates(self._provider, import_onnxruntime().get_available_providers())[0] != "cpu"

    @property
    def precision(self) -> str:
        """Precision of the engines in use, or of the bundle where there are none."""
        return next(iter(self.engines.values())).precision if self.engines else self.bundle.manifest.precision

    def chunk(self, asked: int | None) -> int:
        """Return the tokens of a streamed chunk: as asked for, as the stages' engines were built for, or CHUNK."""
        streaming = self.engines.get("stream")
        return asked or (streaming and streaming.chunk) or CHUNK

    def runner(self, placed: bool = False) -> ImageRunner:
        """Return a runner of the whole graph, not entered yet; for `placed` see `OrtRunner`.

        Raises:
            InfexportError: engines were asked for, and there is none of the whole graph; or none that gives centrality.
        """
        if self._centrality:
            if self.engines_alone:
                raise InfexportError(
                    "an engine of the whole graph gives no centrality",
                    "its outputs are logits and features",
                    "stream through engines of stages (--execution stream), or leave out --engine or --provider engine",
                )
            self._check_centrality()
            return OrtRunner(self.bundle, self._provider, self.threads, placed, centrality=True)
        if "whole" in self.engines or self.engines_alone:
            return EngineRunner(self.bundle, self.engines.get("whole") or choose(self.bundle, "whole", self._engine))
        return OrtRunner(self.bundle, self._provider, self.threads, placed)

    def _check_centrality(self) -> None:
        if CENTRALITY_MODEL not in self.bundle.manifest.files:
            raise InfexportError(
                "this bundle does not give centrality",
                "it was converted by an earlier infexport",
                "convert the checkpoint again",
            )

    def stages(self) -> StageRunner:
        """Return a runner of the stages, not entered yet.

        Raises:
            InfexportError: engines were asked for, and there are none of the stages.
        """
        if self._centrality:
            self._check_centrality()
        if "stream" in self.engines or self.engines_alone:
            return EngineStages(self.bundle, self.engines.get("stream") or choose(self.bundle, "stream", self._engine))
        return OrtStages(self.bundle, self._provider, self.threads)


KINDS: tuple[Kind, Kind] = ("whole", "stream")
