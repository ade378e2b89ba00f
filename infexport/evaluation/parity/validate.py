"""Bundle and checkpoint → verdict: does what is deployed compute what PyTorch does?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from infexport.bundle import Bundle
from infexport.errors import InfexportError
from infexport.evaluation.parity.layers import Arithmetic, Part, judge, summand_size
from infexport.evaluation.parity.metrics import compare, tolerance_for
from infexport.evaluation.parity.result import Case, ParityResult
from infexport.evaluation.parity.tracing import GraphTracer, StageTracer, Trace, trace_torch
from infexport.evaluation.pytorch_reference import TorchRunner, enough_memory
from infexport.evaluation.recorded_checkpoint import load_recorded
from infexport.evaluation.synthetic_images import synthetic_batch
from infexport.images.decode import read_image
from infexport.images.preprocess import check_whole_patches, fit
from infexport.inference.runners import ImageRunner
from infexport.inference.runners.factory import RunnerFactory
from infexport.inference.runners.streamed import StreamRunner
from infexport.inference.runners.tensorrt import EngineRunner
from infexport.system.progress import (
    SILENT,
    ItemsDone,
    ProgressListener,
)
from infvit.checkpoint import Checkpoint


def default_sizes(bundle: Bundle) -> list[tuple[int, int]]:
    """The trained size, a smaller non-square one and a larger one: `(height, width)`."""
    size, patch = bundle.manifest.config.image_size, bundle.manifest.config.patch_size
    half = max(patch, size // 2 // patch * patch)
    return [(size, size), (half, size + patch), (2 * size, 2 * size)]


def _logits(runner: ImageRunner, batch: NDArray[np.uint8]) -> NDArray[Any]:
    """Return the logits of a batch, image by image where the runner does not take the whole batch."""
    parts = [batch] if runner.takes(batch.shape) else [batch[i : i + 1] for i in range(len(batch))]
    return np.concatenate([runner.run(part)["logits"] for part in parts])


class ParityComparer:
    """Judges one input after the other, once entered.

    Args:
        bundle: what is judged.
        checkpoint: what it must agree with.
        opening: of the bundle.
        stream: its stages are judged, not its graph.
        layers: every part of the network, too.

    Raises:
        InfexportError: parts are asked for of an engine, whose inside nobody sees.
    """

    def __init__(
        self, bundle: Bundle, checkpoint: Checkpoint, opening: RunnerFactory, stream: bool = False, layers: bool = False
    ) -> None:
        manifest = bundle.manifest
        mean, std = manifest.preprocessing.mean, manifest.preprocessing.std
        self.tolerance = tolerance_for(opening.precision, manifest.config.depth)
        self._bundle, self._layers, self._threads = bundle, layers, opening.threads
        self._arithmetic = Arithmetic(opening.precision, manifest.folded)
        self._truth = TorchRunner(checkpoint, mean, std, torch.float64)
        self._torch = TorchRunner(checkpoint, mean, std, torch.float32)
        self._runner = StreamRunner(bundle, opening) if stream else opening.runner()
        if layers and isinstance(self._runner, EngineRunner):
            raise InfexportError(
                "nobody sees into an engine of the whole graph",
                "--layers compares what every layer gives, and an engine has no such outputs",
                "judge the engines of its stages, --execution stream, or the graph: --provider cpu, without --engine",
            )
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        for runner in (self._truth, self._torch, self._runner):
            self._stack.enter_context(runner)
        if self._layers:
            _ = self._tracer  # a graph that cannot be traced is no input's failure
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def ran(self) -> str:
        """Return provider, precision and version of the bundle's runner, in words."""
        return f"{self._runner.provider}, {self._runner.version}"

    @cached_property
    def _tracer(self) -> Callable[[NDArray[np.uint8]], Trace]:
        if isinstance(self._runner, StreamRunner):
            return StageTracer(self._bundle, self._runner.stages, self._runner.chunk)
        return GraphTracer(self._bundle, self._runner.provider, self._threads)

    def __call__(self, name: str, batch: NDArray[np.uint8], file: Path | None = None) -> Case:
        """Compare the logits of images `[B, H, W, 3]` of whole patches, with their file where there is one."""
        logits = _logits(self._runner, batch)
        model, parts = self._truth.model, list[Part]()
        if self._layers:
            found, eager, truth = self._tracer(batch), trace_torch(self._torch, batch), trace_torch(self._truth, batch)
            with enough_memory(batch.shape):
                pixels = model.normalise(torch.from_numpy(batch))
                parts = judge(model.network, self._arithmetic, found, eager, truth, pixels)
            theirs, exact, features = eager.logits.numpy(), truth.logits.numpy(), truth.features
        else:
            theirs, given = self._torch.run(batch)["logits"], self._truth.run(batch)
            exact, features = given["logits"], torch.from_numpy(given["features"])
        with torch.no_grad():
            terms = summand_size(model.network.head, features).numpy()
        compared, beside = (compare(x, exact, self.tolerance, terms) for x in (logits, theirs))
        return Case(name, batch.shape, compared, beside, tuple(parts), logits, theirs, exact, file)


def validate(
    bundle: Bundle,
    checkpoint_path: Path,
    sizes: list[tuple[int, int]],
    images: list[Path],
    opening: RunnerFactory | None = None,
    stream: bool = False,
    layers: bool = False,
    listener: ProgressListener = SILENT,
) -> ParityResult:
    """Run the bundle, PyTorch and its float64 twin on the same inputs and judge.

    Args:
        bundle: opened, verified or not.
        checkpoint_path: what it must agree with.
        sizes: `(height, width)` of synthetic images, multiples of the patch; three of each, or one of many tokens.
        images: files, each at its own resolution, completed to whole patches. One that cannot be read is reported.
        opening: of the bundle, what is judged; None judges it in ONNX Runtime on the CPU.
        stream: judge its stages, chunk by chunk.
        layers: judge every part of the network, too.
        listener: told of every case that is done.

    Raises:
        InfexportError: a checkpoint that cannot be read, or a size that is no multiple of the patch.
    """
    patch, transform = bundle.manifest.config.patch_size, bundle.manifest.preprocessing.transform
    for height, width in sizes:
        check_whole_patches(height, width, patch)
    cases: list[Case] = []
    failed: list[tuple[Path, InfexportError]] = []
    checkpoint = load_recorded(checkpoint_path, bundle)
    with ParityComparer(bundle, checkpoint, opening or RunnerFactory(bundle, "cpu"), stream, layers) as comparer:

        @contextmanager
        def failing(name: Path) -> Iterator[None]:
            try:
                yield
            except InfexportError as error:
                failed.append((name, error))
            listener.on_event(ItemsDone(1))

        for height, width in sizes:
            with failing(Path(f"{height}x{width}")):
                cases.append(comparer(f"{height}x{width}", synthetic_batch(height, width, patch)))
        for path in images:
            with failing(path):
                pixels = fit(read_image(path), patch, "native", transform, "pad").pixels
                cases.append(comparer(str(path), pixels[None], path))
        ran = comparer.ran
    tolerance = comparer.tolerance
    return ParityResult(bundle.path, checkpoint_path, bundle.verified, ran, tolerance, tuple(cases), tuple(failed))
