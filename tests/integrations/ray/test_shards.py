"""One image on several workers gives the result of one process, even if a worker dies."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image
from support import relative_error

from infexport.bundle import open_bundle
from infexport.errors import InfexportError
from infexport.evaluation.synthetic_images import synthetic_image
from infexport.inference.executor import Run
from infexport.inference.options import InferenceOptions
from infexport.inference.prediction import Failure
from infexport.inference.streaming.sharding import exchanged_bytes
from infexport.integrations.ray import scaled
from infexport.integrations.ray.shards import Worker
from infexport.system.progress import ProgressListener, StageProgress, Status

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    path = tmp_path_factory.mktemp("scene") / "scene.tif"
    tifffile.imwrite(path, np.tile(synthetic_image(512, 512), (2, 2, 1)), tile=(256, 256), photometric="rgb")
    return path


@pytest.fixture(scope="module", params=["torchvision_linear", "torchvision_pure"])
def bundle(request, golden_bundle):
    return open_bundle(golden_bundle(request.param))


def options_of(chunk=256):
    return InferenceOptions(execution="stream", chunk=chunk, size="native", threads=1)


def test_the_answer_of_one(ray, bundle, scene, tmp_path):
    Image.fromarray(tifffile.imread(scene)[:300, :500]).save(tmp_path / "part.png")
    files = [scene, tmp_path / "part.png"]
    expected = Run(bundle, options_of())(files)
    found = scaled("local", 2, True, bundle, options_of(), files, ProgressListener())
    for row, other in zip(found, expected, strict=True):
        assert (row.file, row.grid, row.padded_share) == (other.file, other.grid, other.padded_share)
        assert relative_error(row.logits, other.logits) <= 1e-5
        assert relative_error(row.features, other.features) <= 1e-5
        assert row.execution == "stream, 2 shards, tokens in memory"


class Killer(ProgressListener):
    """Kills a worker in a stage."""

    def __init__(self, processes, stage):
        self.processes, self.stage = processes, stage
        self.messages, self.killed = [], None

    def on_event(self, event):
        if isinstance(event, StageProgress) and event.stage == self.stage and self.killed is None:
            self.killed = self.processes("InfexportShard")[-1]
            os.kill(self.killed, signal.SIGKILL)
        elif isinstance(event, Status):
            self.messages.append(event.message)


@pytest.mark.parametrize("stage", [1, 3])
def test_a_worker_that_is_killed_changes_no_bit(ray, bundle, scene, processes, stage):
    (expected,) = scaled("local", 2, True, bundle, options_of(), [scene], ProgressListener())
    killer = Killer(processes, stage)
    (found,) = scaled("local", 2, True, bundle, options_of(), [scene], killer)
    assert np.array_equal(found.logits, expected.logits)
    assert np.array_equal(found.features, expected.features)
    assert any("was lost" in message for message in killer.messages)


def test_an_image_that_fails_does_not_stop_the_others(ray, bundle, scene, tmp_path):
    content = scene.read_bytes()
    (tmp_path / "cut.tif").write_bytes(content[: len(content) // 2])
    Image.fromarray(synthetic_image(8, 300)).save(tmp_path / "flat.png")
    files = [tmp_path / "cut.tif", tmp_path / "flat.png", scene]
    cut, flat, good = scaled("local", 2, True, bundle, options_of(), files, ProgressListener())
    assert isinstance(cut, Failure)
    assert "damaged or truncated" in cut.error.summary
    assert "2 shards of an image with 1 rows of patches" in flat.error.summary
    assert flat.error.hint == "use at most 1 workers"
    assert not isinstance(good, Failure)


def test_a_shard_that_does_not_fit(ray, bundle, scene):
    options = InferenceOptions(execution="stream", memory=2**20, size="native", threads=1)
    (row,) = scaled("local", 2, True, bundle, options, [scene], ProgressListener())
    assert re.match(r"a shard of [\d,]+ tokens does not fit into 1MiB", row.error.summary)
    assert "more --workers" in row.error.hint


def test_a_bundle_that_cannot_be_run_is_no_image_s_failure(ray, bundle, scene):
    options = InferenceOptions(execution="stream", size="native", provider="engine", threads=1)
    with pytest.raises(InfexportError, match="engine"):
        scaled("local", 2, True, bundle, options, [scene, scene], ProgressListener())


def test_a_copy_of_what_was_fetched_is_deleted(ray, bundle, scene):
    def left():
        return set(Path(tempfile.gettempdir()).glob("infexport-*/image*"))

    before = left()
    (row,) = scaled("local", 2, True, bundle, options_of(), [f"file://{scene}"], ProgressListener())
    assert not isinstance(row, Failure)
    assert not left() - before  # others may delete their own meanwhile


def test_lack_of_memory_is_the_image_s_failure(ray, bundle, scene, monkeypatch):
    from infexport.integrations.ray.shards import Worker

    def take(self, image, rows):
        raise MemoryError("8 TB of tokens")

    monkeypatch.setattr(Worker, "take", take)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    (row,) = scaled("local", 1, True, bundle, options_of(), [scene], ProgressListener())
    assert row.error.summary == "a worker does not have enough memory"


def test_by_the_command(infexport, ray, bundle, scene):
    result = infexport(
        "run-engine", bundle.path, scene, "--size", "native", "--ray", "--shard-image", "--workers", 2,
        "--threads", 1, "--json",
    )  # fmt: skip
    (image,) = json.loads(result.stdout)["images"]
    assert image["execution"] == "stream, 2 shards, tokens in memory"
    assert re.search(r"2 workers exchanged [\d,]+ bytes of sums and [\d,]+ of tokens", result.stderr)


@pytest.mark.heavy
def test_the_paper_s_model_at_9216(infexport, ray, processes, tmp_path):
    """331,777 tokens on two workers exchange the documented number of bytes, even if a worker dies."""
    from bench_stream import Case, make_bundle
    from make_bigtiff import photographs, write

    bundle, scene = make_bundle(Case("linear", "fp32", 9216, "memory"), tmp_path), tmp_path / "scene.tif"
    write(scene, 9216, 9216, photographs([]))
    options = options_of(None)
    (alone,) = Run(bundle, options)([scene])
    told = Killer(processes, stage=-1)
    (together,) = scaled("local", 2, True, bundle, options, [scene], told)
    assert relative_error(together.logits, alone.logits) <= 1e-5
    (message,) = (message for message in told.messages if "exchanged" in message)
    assert f"{exchanged_bytes(bundle.manifest.config, 2):,} bytes of sums and 0 of tokens" in message
    killer = Killer(processes, stage=5)
    (mended,) = scaled("local", 2, True, bundle, options, [scene], killer)
    assert killer.killed is not None
    assert np.array_equal(mended.logits, together.logits)


def test_a_damaged_image_is_named_by_its_url(zoo_bundle, tmp_path):
    """A worker's error names the URL, not the fetched copy."""
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.writestr("bad.png", b"no image")
    url = f"zip://bad.png::file://{tmp_path}/all.zip"
    bundle = open_bundle(zoo_bundle("digits-linear"))
    worker = Worker(bundle.path, bundle.manifest.digest, options_of(None))
    with pytest.raises(InfexportError) as caught:
        worker.look(url)
    worker.leave()
    assert url in caught.value.summary
