"""What runs a bundle, by what was asked for: engines on a GPU, or ONNX Runtime."""

from __future__ import annotations

from functools import cached_property

from infexport.bundle import ENGINES, Bundle
from infexport.engines import EngineSet, Kind, choose
from infexport.errors import InfexportError
from infexport.runners import Deployed, Stages
from infexport.runners.ort import OrtRunner, OrtStages
from infexport.runners.trt import EngineRunner, EngineStages
from infexport.targets import local_gpu


class Opening:
    """Opens runners of one bundle.

    Args:
        bundle: what to run.
        provider: `engine`, or as of `runners.ort.OrtRunner`. `auto` takes the engines that fit this machine's GPU, if
            that is one set of them, else, and for what these do not take, ONNX Runtime on a GPU, or on the CPU.
        engine: name of a set of engines, `<target>-<precision>`; None for the one that fits.
        threads: of ONNX Runtime.

    Attributes:
        notes: what a user would like to know of the choice, once `engines` is known.
    """

    def __init__(
        self, bundle: Bundle, provider: str = "auto", engine: str | None = None, threads: int | None = None
    ) -> None:
        self.bundle, self._threads, self._engine = bundle, threads, engine
        self.notes: list[str] = []
        self._provider = "engine" if engine is not None and provider == "auto" else provider
        if engine is not None and self._provider != "engine":
            raise InfexportError(
                f"--engine {engine} with --provider {provider}",
                "engines are run by --provider engine, or auto",
                "leave one of the two out",
            )

    @cached_property
    def engines(self) -> dict[Kind, EngineSet]:
        """The engines that are used, by what they run; none where ONNX Runtime does all.

        Raises:
            InfexportError: engines were asked for, and none fits this machine.
        """
        found: dict[Kind, EngineSet] = {}
        some = any((self.bundle.path / ENGINES).glob("*.engine.json"))
        if self._provider != "engine" and not (self._provider == "auto" and some):
            return found
        gpu = local_gpu()
        if gpu is None and self._provider == "auto":
            return found
        refused: list[InfexportError] = []
        for kind in KINDS:
            try:
                engines = choose(self.bundle, kind, self._engine, gpu)
            except InfexportError as error:
                refused.append(error)
                continue
            if all(engines.backend == other.backend for other in found.values()):  # a process uses one
                found[kind] = engines
        if self._provider == "engine" and not found:
            raise refused[0]
        if not found:
            reasons = "; ".join([refused[0].summary, *refused[0].details.splitlines()])
            self.notes.append(f"no engine is used: {reasons}")
        return found

    @property
    def engines_alone(self) -> bool:
        """Whether ONNX Runtime may not do what no engine can."""
        return self._provider == "engine"

    @property
    def precision(self) -> str:
        """Of what is run, where engines are used for all that they can."""
        return next(iter(self.engines.values())).precision if self.engines else self.bundle.manifest.precision

    def runner(self, placed: bool = False) -> Deployed:
        """Of the whole graph, not entered yet; `placed` as of `OrtRunner`.

        Raises:
            InfexportError: engines were asked for, and there is none of the whole graph.
        """
        if "whole" in self.engines or self.engines_alone:
            return EngineRunner(self.bundle, self.engines.get("whole") or choose(self.bundle, "whole", self._engine))
        return OrtRunner(self.bundle, self._provider, self._threads, placed)

    def stages(self) -> Stages:
        """Of the stages, not entered yet.

        Raises:
            InfexportError: engines were asked for, and there are none of the stages.
        """
        if "stream" in self.engines or self.engines_alone:
            return EngineStages(self.bundle, self.engines.get("stream") or choose(self.bundle, "stream", self._engine))
        return OrtStages(self.bundle, self._provider, self._threads)


KINDS: tuple[Kind, Kind] = ("whole", "stream")
