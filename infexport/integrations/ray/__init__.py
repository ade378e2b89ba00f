"""Prediction in several processes with Ray: many images over workers, or one image over all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from infexport.bundle import Bundle
from infexport.errors import InfexportError
from infexport.inference.items import display_name
from infexport.inference.options import InferenceOptions
from infexport.inference.prediction import ImageResult
from infexport.inference.predictor import Predictor
from infexport.integrations.ray import images as many
from infexport.integrations.ray import shards
from infexport.integrations.ray.cluster import connected, plan_workers
from infexport.system.progress import ProgressListener, Status


def scaled(
    address: str,
    count: int | None,
    shard_image: bool,
    bundle: Bundle,
    options: InferenceOptions,
    images: Sequence[Path | str],
    listener: ProgressListener,
) -> list[ImageResult]:
    """Predict on Ray workers; return a prediction or a failure for every image, in order.

    Args:
        address: address of the cluster; see `cluster.connected`.
        count: number of workers; see `cluster.plan_workers`.
        shard_image: all workers run each image together; otherwise each runs images of its own.
        bundle: the bundle, open in this process; the workers open it at the same path.
        options: options of the run; `memory` and `threads` apply to each worker.
        images: files that the workers can read at the same paths, or URLs.
        listener: receives progress events.

    Raises:
        InfexportError: there is no cluster, it has too few resources, or the bundle cannot be run.
    """
    # paths become absolute: a worker has another current folder
    bundle = replace(bundle, path=bundle.path.absolute())
    named = [image.absolute() if isinstance(image, Path) else image for image in images]
    scratch = options.scratch and options.scratch.absolute()
    if address.startswith("ray://") and not shard_image:
        raise InfexportError(
            f"many images cannot be distributed through {address}",
            "Ray Data does not run over Ray's client protocol",
            "run this on a node of the cluster with --ray auto, or submit it with: ray job submit",
        )
    with connected(address) as ray:
        workers = plan_workers(ray, count, options.threads, shard_image)
        listener.on_event(Status(f"{workers.count} Ray workers of {workers.threads} cores each"))
        free, needed = ray.available_resources().get("CPU", 0), workers.count * workers.threads
        if free < needed:
            listener.on_event(Status(f"waiting for cores: {free:.0f} are free in the cluster, {needed} are needed"))
        memory = options.memory or workers.memory
        options = replace(options, memory=memory, scratch=scratch, threads=workers.threads)
        if shard_image:
            rows = shards.predict(ray, workers, bundle, options, named, listener)
        else:
            predictor = Predictor.of(bundle, options)
            rows = many.predict(ray, workers, predictor, named, options.batch_size, listener)
    return [replace(row, file=display_name(images, index)) for index, row in enumerate(rows)]
