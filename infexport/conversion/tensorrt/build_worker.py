"""Build engines and go: `python -m infexport.conversion.tensorrt.build_worker`, a JSON request on stdin.

A process of its own (see `system.workers`): a crash in the library is an error there and not the end of the caller.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from infexport.conversion.tensorrt.precision import Lowering
from infexport.errors import InfexportError
from infexport.inference.tensorrt_libraries import BACKENDS, errors_in, library_log, write_cache
from infexport.system.gpus import Target
from infexport.system.progress import (
    ItemsDone,
    ProgressEvent,
    ProgressListener,
)
from infexport.system.workers import serve

Tell = Callable[[dict[str, Any]], None]

LOW = ("HALF", "BF16", "INT8")
"""Types of less than float32."""
ROUNDED = {
    "ACTIVATION", "CAST", "CONSTANT", "GATHER", "IDENTITY", "ITERATOR", "QUANTIZE", "SHUFFLE", "SLICE", "SQUEEZE",
    "UNSQUEEZE",
}  # fmt: skip
"""Layers that may give them: factors of products, and what moves or clamps these. Never a sum, a product or a norm."""


class Builder:
    """Builds engines with one backend for one target.

    Args:
        request: `backend`; `target`, fields of `targets.Target`; `tf32`; `memory`, bytes or None; `caches`, a folder
            for what the library measured, by `gpu`, the name of the GPU here, or None.
        tell: told of progress.
    """

    def __init__(self, request: dict[str, Any], tell: Tell) -> None:
        self._backend = BACKENDS[request["backend"]]
        self._target = Target(**request["target"])
        self._tf32, self._memory = request["tf32"], request["memory"]
        self._tell = tell
        self.trt = self._backend.load()
        self._log = library_log(self.trt)
        self._builder = self.trt.Builder(self._log)
        self._cache = Path(request["caches"]) / (
            f"timing-{self._backend.name}-{self.trt.__version__}-{request['gpu'] or self._target.capability}.cache"
        )

    def build(
        self, name: str, graph: Path, engine: Path, profile: dict[str, list[list[int]]], options: str
    ) -> dict[str, Any]:
        """Parse, check and build.

        Args:
            name: of the graph, for people.
            graph: an ONNX file.
            engine: the file to write.
            profile: input → min, opt and max shape, for inputs whose shapes vary.
            options: that make it smaller, for people.

        Returns:
            `layers`, their number by kind and type, and `log`, what the library said.

        Raises:
            InfexportError: the parser or the builder refuses, with every one of its errors; or a sum is not in float32.
        """
        self._log.take()
        trt = self.trt
        network = self._builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, self._log)
        if not parser.parse_from_file(str(graph)):
            errors = [parser.get_error(i).desc() for i in range(parser.num_errors)]
            raise InfexportError(
                f"{self._backend.name}'s parser refuses {name}",
                "\n".join(dict.fromkeys(errors + errors_in(self._log.take()))),
                "convert the checkpoint again with this version of infexport",
            )
        parsed, layers = self._log.take(), count_layers(network)
        check_types(name, layers)
        config = self._config(network, profile)
        plan = self._builder.build_serialized_network(network, config)
        lines = self._log.take()
        if plan is None:
            # without a GPU every build logs that there is none; that is no reason for anything
            reasons = [error for error in errors_in(lines) if "Cuda Runtime" not in error]
            raise InfexportError(
                f"{self._backend.name} could not build {name}",
                "\n".join(reasons) or "it does not say why",
                f"try {options}",
            )
        with engine.open("wb") as file:
            file.write(memoryview(plan))
        self._keep_timings(config)
        return {"layers": layers, "log": [f"{severity}: {message}" for severity, message in [*parsed, *lines]]}

    def _config(self, network: Any, profile: dict[str, list[list[int]]]) -> Any:
        trt = self.trt
        config = self._builder.create_builder_config()
        self._backend.aim(trt, config, self._target)
        if not self._tf32:
            config.clear_flag(trt.BuilderFlag.TF32)
        shapes = self._builder.create_optimization_profile()
        for name, three in profile.items():
            shapes.set_shape(name, *(tuple(shape) for shape in three))
        config.add_optimization_profile(shapes)
        if self._memory is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, self._memory)
        kept = self._cache.read_bytes() if self._cache.is_file() else b""
        timings = config.create_timing_cache(kept)
        if timings is None or not config.set_timing_cache(timings, ignore_mismatch=False):
            config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)
        config.progress_monitor = _monitor(trt, self._tell)
        return config

    def _keep_timings(self, config: Any) -> None:
        if (cache := config.get_timing_cache()) is not None:
            write_cache(self._cache, cache)


def count_layers(network: Any) -> dict[str, dict[str, int]]:
    """Count layers by kind and type of their first output, as the library names both."""
    found: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        output = layer.get_output(0) if layer.num_outputs else None
        if output is not None:
            found[layer.type.name][output.dtype.name] += 1
    return {kind: dict(types) for kind, types in sorted(found.items())}


def check_types(name: str, layers: dict[str, dict[str, int]]) -> None:
    """Refuse a network in which sums, norms, energies or states are in less than float32.

    Raises:
        InfexportError: names the kinds of layers.
    """
    wrong = {kind: types for kind, types in layers.items() if kind not in ROUNDED and any(t in LOW for t in types)}
    if wrong:
        raise InfexportError(
            f"{name} sums in less than float32",
            "\n".join(f"{kind}: {types}" for kind, types in wrong.items()),
            "this is a bug in infexport",
        )


def _monitor(trt: ModuleType, tell: Tell) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if parent_phase is None:
                self._steps[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self._steps:
                tell({"phase": [phase_name, step + 1, self._steps[phase_name]]})
            return True  # False would cancel the build

        def phase_finish(self, phase_name: str) -> None:
            self._steps.pop(phase_name, None)

    return Monitor()


class _Calibrating(ProgressListener):
    """Reports calibration images as a phase of the build."""

    def __init__(self, total: int, tell: Tell) -> None:
        self._done, self._total, self._tell = 0, total, tell

    def on_event(self, event: ProgressEvent) -> None:
        if isinstance(event, ItemsDone):
            self._done += event.count
            self._tell({"phase": ["calibrating", self._done, self._total]})


def work(request: dict[str, Any], tell: Tell) -> None:
    """Build all engines of a request.

    Args:
        request: as of `Builder`, and `lowering`, fields of `lowering.Lowering`; `options`, as of `Builder.build`;
            `builds`, each with `name`, `graph`, `engine` and `profile`.
        tell: takes `version`, the library's; `status` and `phase`; of every engine `built`: `seconds`, `layers`, `log`.

    Raises:
        InfexportError: the library cannot be used, or refuses.
    """
    try:
        builder = Builder(request, tell)
    except InfexportError:
        raise
    except Exception as error:  # whatever the library raises must reach the user as a message
        details = f"{type(error).__name__}: {error}"
        raise InfexportError(f"{request['backend']} cannot be used", details, "infexport doctor") from error
    tell({"version": builder.trt.__version__})
    lowering = Lowering(**request["lowering"])
    images = request["lowering"]["images"]
    lowering.calibrate(_Calibrating(len(images), tell))
    for build in request["builds"]:
        started = time.perf_counter()
        tell({"status": f"building {build['name']}"})
        graph = lowering.graph(Path(build["graph"]))
        found = builder.build(build["name"], graph, Path(build["engine"]), build["profile"], request["options"])
        tell({"built": {"seconds": time.perf_counter() - started, **found}})


if __name__ == "__main__":
    serve(work)
