"""Contents of a bundle and cost of its runs, as `inspect` shows them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

from infexport.bundle import Bundle
from infexport.errors import InfexportError
from infexport.evaluation.flops import embedding_cost, matmul_cost
from infexport.inference import memory
from infexport.inference.options import InferenceOptions
from infexport.inference.planner import ExecutionMode, Image, choose, estimates
from infexport.inference.runners import Placement
from infexport.inference.runners.factory import RunnerFactory
from infexport.inference.runners.onnxruntime import OrtRunner, Port
from infexport.inference.streaming import CHUNK
from infexport.system.dependencies import require
from infvit.config import InfViTConfig

SIDES = (224, 512, 1024, 2048, 4096, 8192, 16_384, 32_768, 65_536)
"""Sides of the images that are weighed by default, in pixels, besides the trained one."""


@dataclass(frozen=True)
class Part:
    """Parameters of a part of the network as trained: of one, and how many there are."""

    name: str
    each: int
    times: int = 1

    @property
    def all(self) -> int:
        return self.each * self.times


def list_parts(config: InfViTConfig) -> list[Part]:
    """All parameters, from the pixels on; layers are equal.

    Args:
        config: the fields of `infvit.InfViTConfig`, as a manifest records them.
    """
    width, hidden, depth = config.embed_dim, config.mlp_dim, config.depth
    square, bias = width**2 + width, config.qkv_bias
    attention = 3 * (width**2 + width * bias) + square * (2 if config.attention_dense else 1)
    if config.variant != "softmax":
        attention += config.num_heads if config.rho_per_head else 1
    parts = [
        Part("patch embedding", (3 * config.patch_size**2 + 1) * width),
        Part("class token", width),
        Part("positions", ((config.image_size // config.patch_size) ** 2 + 1) * width),
        Part("layer: attention", attention, depth),
        Part("layer: MLP", 2 * width * hidden + hidden + width, depth),
        Part("layer: norms", 4 * width, depth),
        Part("last norm", 2 * width),
        Part("head", (width + 1) * config.num_classes),
    ]
    if config.pooler:
        parts.insert(-1, Part("pooler", square))
    return parts


@dataclass(frozen=True)
class Resolution:
    """Cost of an image of one size.

    Attributes:
        height, width: in pixels, whole patches.
        tokens: patches and the class token.
        multiply_adds: of matrix products with every patch, token or pair of tokens, of the graph as it is.
        memory: way → predicted peak resident bytes of the process on a CPU, of every way that the bundle has.
        scratch: bytes of tokens on disk, where these are kept there; None where the bundle cannot stream.
        auto: the way that `auto` takes on a CPU; None where none fits.
    """

    height: int
    width: int
    tokens: int
    multiply_adds: int
    memory: dict[ExecutionMode, int]
    scratch: int | None
    auto: ExecutionMode | None


def resolutions(bundle: Bundle, sizes: Sequence[tuple[int, int]] | None, limit: int) -> list[Resolution]:
    """Return the cost of single images of several sizes.

    Args:
        bundle: opened.
        sizes: `(height, width)` in pixels, completed to whole patches; None for the trained size and SIDES.
        limit: bytes that the process may take.
    """
    config = bundle.manifest.config
    patch, trained = config.patch_size, config.image_size
    if sizes is None:
        sizes = [(side, side) for side in (*(() if trained in SIDES else (trained,)), *SIDES)]
    whole = [(-(-height // patch) * patch, -(-width // patch) * patch) for height, width in sizes]
    return [_resolution(bundle, height, width, limit) for height, width in dict.fromkeys(whole)]


def _resolution(bundle: Bundle, height: int, width: int, limit: int) -> Resolution:
    manifest, config = bundle.manifest, bundle.manifest.config
    tokens = config.tokens(height, width)
    work = matmul_cost(config, manifest.folded, tokens)
    options, image = InferenceOptions(), Image(tokens, width)
    auto: ExecutionMode | None
    try:
        auto = choose(bundle, options, image, limit)
    except InfexportError:
        auto = None
    return Resolution(
        height,
        width,
        tokens,
        work.dense + work.attention + embedding_cost(config, tokens),
        estimates(bundle, options, image),
        None if manifest.stages is None else memory.kept(manifest, tokens, CHUNK, token_dtype="float32", on_disk=True),
        auto,
    )


@dataclass
class Graph:
    """The graph as its file has it, and as it is loaded; None where that could not be found out.

    Attributes:
        opsets: domain → version of its operators, as written; `""` is ONNX's own.
        operators: operator → nodes, as written: bodies of operators are not counted.
        runs_on: where it was loaded, by what and in which precision, in words.
        placement: where the nodes run, once bodies are in their place.
        inputs, outputs: as ONNX Runtime has them.
        unknown: what could not be found out, and why, a line each.
    """

    opsets: dict[str, int] | None = None
    operators: Counter[str] | None = None
    runs_on: str | None = None
    placement: Placement | None = None
    inputs: list[Port] | None = None
    outputs: list[Port] | None = None
    unknown: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        ports: dict[str, Any] = {"inputs": self.inputs, "outputs": self.outputs}
        return vars(self) | {name: found and [asdict(port) for port in found] for name, found in ports.items()}


def read_graph(bundle: Bundle, provider: str | None = None, engine: str | None = None) -> Graph:
    """Read the graph, and load it.

    Args:
        bundle: opened; one that was changed is loaded only where that is asked for.
        provider, engine: see `inference.runners.factory.RunnerFactory`; with neither it is loaded on the CPU, if
            that is possible.

    Raises:
        InfexportError: a provider or an engine was asked for, and it cannot be loaded there.
    """
    graph = Graph()
    try:
        _read(graph, bundle)
    except InfexportError as error:
        graph.unknown.append(f"operators as written: {error.one_line(hint=True)}")
    try:
        if bundle.changed and not (provider or engine):
            raise InfexportError("a bundle that was changed is not loaded", hint="--provider cpu loads it all the same")
        _load(graph, bundle, provider or ("engine" if engine else "cpu"), engine)
    except InfexportError as error:
        if provider or engine:
            raise
        graph.unknown.append(f"inputs, outputs and where nodes run: {error.one_line(hint=True)}")
    return graph


def _read(graph: Graph, bundle: Bundle) -> None:
    require("onnx", extra="export")
    import onnx

    try:
        model = onnx.load(bundle.model, load_external_data=False)
    except Exception as error:  # protobuf raises its own kinds
        raise InfexportError(f"onnx cannot read {bundle.model}", str(error)) from error
    graph.opsets = {each.domain: each.version for each in model.opset_import}
    graph.operators = Counter(
        f"{node.domain}::{node.op_type}" if node.domain else node.op_type for node in model.graph.node
    )


def _load(graph: Graph, bundle: Bundle, provider: str, engine: str | None) -> None:
    with RunnerFactory(bundle, provider, engine).runner(placed=True) as runner:
        graph.runs_on, graph.placement = f"{runner.provider}, {runner.version}, {runner.precision}", runner.placement
        if isinstance(runner, OrtRunner):
            graph.inputs, graph.outputs = runner.ports
            return
    with suppress(InfexportError), OrtRunner(bundle, "cpu") as whole:  # engines run without ONNX Runtime
        graph.inputs, graph.outputs = whole.ports
