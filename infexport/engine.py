"""Bundle → engine for a GPU, with a sidecar that says what it is."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infexport import tensorrt_rtx
from infexport.bundle import ENGINES, Bundle, sha256
from infexport.errors import InfexportError
from infexport.extras import require


@dataclass(frozen=True)
class Target:
    """A GPU to build for: `compute_capability` is what NVIDIA calls it, `enum` the library's name of it."""

    compute_capability: str
    enum: str


TARGETS = {"a100": Target("8.0", "SM80")}

INT32_MAX = 2**31 - 1
CAVEAT = "built without a GPU and not run on the target; NVIDIA's support matrix lists TensorRT-RTX for consumer GPUs"


@dataclass(frozen=True)
class Profile:
    """The images an engine takes: sides in pixels and batch, from `min` over `opt`, which is fastest, to `max`."""

    min_size: int
    opt_size: int
    max_size: int
    opt_batch: int
    max_batch: int

    def shapes(self, input_kind: str) -> dict[str, list[list[int]]]:
        """Minimum, optimum and maximum shape of the graph's input."""
        triples = ((1, self.min_size), (self.opt_batch, self.opt_size), (self.max_batch, self.max_size))
        if input_kind == "uint8":
            return {"image": [[batch, size, size, 3] for batch, size in triples]}
        return {"pixels": [[batch, 3, size, size] for batch, size in triples]}


def default_profile(bundle: Bundle, max_size: int | None = None, max_batch: int = 8) -> Profile:
    """One patch to `max_size` (4 times the trained size, at least 1024), best at the trained size.

    Raises:
        InfexportError: a maximum that is no whole number of patches, below the trained size, or too large for TensorRT.
    """
    size, patch = bundle.manifest.config["image_size"], bundle.manifest.config["patch_size"]
    largest = max_size or max(4 * size, -(-1024 // patch) * patch)
    if largest % patch or largest < size:
        raise InfexportError(
            f"--max-size {largest} does not fit the model",
            f"expected a multiple of its patch, {patch}, and at least its trained size, {size}",
            f"for example --max-size {max(size, round(largest / patch) * patch)}",
        )
    tokens = (largest // patch) ** 2 + 1
    hidden = max_batch * tokens * bundle.manifest.config["mlp_dim"]
    if hidden > INT32_MAX:
        raise InfexportError(
            "the largest tensor would have more elements than TensorRT counts",
            f"the MLP's hidden layer, [{max_batch}, {tokens}, {bundle.manifest.config['mlp_dim']}], has {hidden:,} "
            f"elements, more than {INT32_MAX:,}",
            "give a smaller --max-size or --max-batch",
        )
    return Profile(patch, size, largest, 1, max_batch)


def build_engine(bundle: Bundle, target: str, profile: Profile) -> tuple[Path, dict[str, Any]]:
    """Build `engines/<target>-fp32.engine` in the bundle with TensorRT-RTX. Needs no GPU.

    Returns:
        The engine's file and its sidecar, which is written beside it as `<file>.json`.

    Raises:
        InfexportError: the extra is missing, or the library refuses or crashes.
    """
    if bundle.manifest.precision != "fp32":
        raise InfexportError(
            f"engines are built from fp32 bundles, this one is {bundle.manifest.precision}",
            hint="convert the checkpoint with --precision fp32",
        )
    require(tensorrt_rtx.BINDINGS, tensorrt_rtx.LIBRARIES, extra="tensorrt-rtx")
    folder = bundle.path / ENGINES
    engine = folder / f"{target}-{bundle.manifest.precision}.engine"
    try:
        folder.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder) as scratch:
            built = Path(scratch) / engine.name
            response = _run_worker(
                Path(scratch),
                {
                    "model": str(bundle.model.resolve()),
                    "engine": str(built),
                    "compute_capability": TARGETS[target].enum,
                    "profile": profile.shapes(bundle.manifest.input),
                },
            )
            sidecar = {
                "target": target,
                "compute_capability": TARGETS[target].compute_capability,
                "precision": bundle.manifest.precision,
                "backend": "tensorrt-rtx",
                "backend_version": response["backend_version"],
                "profile": profile.shapes(bundle.manifest.input),
                "caveat": CAVEAT,
                "checkpoint": bundle.manifest.checkpoint["files"],
                "graph": bundle.manifest.graph,
                "sha256": sha256(built),
                "bytes": built.stat().st_size,
            }
            described = built.with_name(engine.name + ".json")
            described.write_text(json.dumps(sidecar, indent=2) + "\n")
            # killed between the two, a sidecar stands beside an engine it does not describe: its hash tells
            described.replace(engine.with_name(described.name))
            built.replace(engine)
    except OSError as error:
        raise InfexportError(
            f"cannot write the engine: {engine}",
            str(error),
            "the bundle must be writable, with room for the engine",
        ) from error
    return engine, sidecar


def _run_worker(scratch: Path, request: dict[str, Any]) -> dict[str, Any]:
    request_file, response_file = scratch / "request.json", scratch / "response.json"
    request_file.write_text(json.dumps(request))
    done = subprocess.run(
        # -P: a json.py in the folder this is run from must not be imported
        [sys.executable, "-P", "-m", "infexport.engine_worker", str(request_file), str(response_file)],
        capture_output=True,
        text=True,
        check=False,
    )
    if not response_file.is_file():
        raise InfexportError(
            f"TensorRT-RTX ended with exit code {done.returncode}",
            (done.stderr or done.stdout)[-2000:],
            "infexport doctor shows what is installed",
        )
    response: dict[str, Any] = json.loads(response_file.read_text())
    if "error" in response:
        raise InfexportError(response["error"], response["details"], response["hint"])
    return response
