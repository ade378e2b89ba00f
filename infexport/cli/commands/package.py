"""`infexport package`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from infexport.cli.console import Output
from infexport.cli.options import THREADS, Bytes, Size

OF_BACKENDS = {
    "engine": ("tensorrt", "python"),
    "threads": ("onnxruntime", "python"),
    "size": ("python",),
    "memory": ("python",),
    "max_pixels": ("python",),
}
"""Option → backends that have it, where not every backend does."""

INT32 = 2**31 - 1
"""Largest number that Triton's configuration can hold."""


@click.group()
def package() -> None:
    """Package a bundle for a server."""


@package.command("triton", short_help="Make a model for Triton Inference Server from BUNDLE.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--output", "-o", type=click.Path(path_type=Path, file_okay=False), required=True,
              help="Folder of the model repository, in which the model is made.")  # fmt: skip
@click.option("--name", help="Name of the model.  [default: the bundle's]")
@click.option("--force", is_flag=True, help="Replace an existing model of this name.")
@click.option("--backend", type=click.Choice(["onnxruntime", "tensorrt", "python"]), default="onnxruntime",
              show_default=True, help="Backend in Triton: its own ONNX Runtime or TensorRT, for images of whole "
              "patches, or infexport, for images of any size.")  # fmt: skip
@click.option("--engine", metavar="NAME", help="Engine to serve, such as a100-fp16; for tensorrt and python.")
@click.option("--device", type=click.Choice(["cpu", "gpu"]), help="Device to use.  [default: cpu; with engines, gpu]")
@click.option("--instances", type=click.IntRange(1, INT32), default=1, show_default=True, help="Number of instances.")
@click.option("--max-batch-size", type=click.IntRange(1, INT32), default=8, show_default=True,
              help="Images of equal size per batch.")  # fmt: skip
@click.option("--max-queue-delay", type=click.IntRange(0, INT32), default=0, show_default=True, metavar="MICROSECONDS",
              help="How long an image may wait for others of its size.")  # fmt: skip
@click.option("--threads", type=THREADS,
              help="Threads per instance, for onnxruntime and python.  [default: all cores]")  # fmt: skip
@click.option("--size", type=Size(), metavar="trained|native|N",
              help="Image size as in run-engine, for python.  [default: native]")  # fmt: skip
@click.option("--memory", type=Bytes(), help="Memory limit per instance, for python.  [default: 80% of what is free]")
@click.option("--max-pixels", type=click.IntRange(1, INT32),
              help="Refuse images with more pixels, for python.  [default: 8192 x 8192]")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the configuration as JSON.")
def triton(
    bundle: Path,
    output: Path,
    name: str | None,
    force: bool,
    backend: Any,
    device: Any,
    instances: int,
    max_batch_size: int,
    max_queue_delay: int,
    as_json: bool,
    **others: Any,
) -> None:
    """Make a model for Triton Inference Server from BUNDLE, in the model repository --output.

    Its configuration is checked against Triton's own protobuf and against the graph. The backends onnxruntime and
    tensorrt take only images of whole patches, as the graph does. The backend python completes the last patch and
    streams large images; it needs infexport in the server's Python.
    """
    from infexport.bundle import open_bundle
    from infexport.integrations.triton.config import Service, list_tensors, to_dict
    from infexport.integrations.triton.repository import default_name, package

    out = Output(as_json)
    given = {option: value for option, value in others.items() if value is not None}
    for option in given:
        if backend not in OF_BACKENDS[option]:
            flag = option.replace("_", "-")
            raise click.UsageError(f"--{flag} is for --backend {' or '.join(OF_BACKENDS[option])}, not {backend}")
    on_gpu = backend == "tensorrt" or others["engine"] is not None
    if on_gpu and device == "cpu":
        raise click.UsageError("--device cpu: engines run on a GPU")
    opened = open_bundle(bundle)
    out.bundle_warnings(opened)
    service = Service(
        name or default_name(opened),
        backend,
        device or ("gpu" if on_gpu else "cpu"),
        instances,
        max_batch_size,
        max_queue_delay,
        **given,
    )
    made = package(opened, output, service, force)
    out.data(f"model       {made.path}")
    out.data(f"backend     {backend}, on the {service.device.upper()}, {instances} at once")
    for kind, text in list_tensors(made.config):
        out.data(f"{kind:<11} {text}")
    if made.engine is not None:
        out.status(f"the server needs {made.engine.recorded.library}, as it was built with")
    out.status(f"serve it: tritonserver --model-repository {output}")
    out.document({"model": str(made.path), "config": to_dict(made.config)})
