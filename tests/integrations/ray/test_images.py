"""Many images on many workers give the results of one process, even if a worker dies."""

from __future__ import annotations

import csv
import json
import os
import signal
import sys
import threading
import time
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import train_digits
from PIL import Image
from support import relative_error

from infexport.bundle import open_bundle
from infexport.errors import InfexportError
from infexport.inference.options import InferenceOptions
from infexport.inference.prediction import Failure
from infexport.inference.predictor import Predictor
from infexport.integrations.ray import scaled
from infexport.integrations.ray.cluster import Workers
from infexport.integrations.ray.images import PART, part_size, predict
from infexport.system.progress import ItemsDone, ProgressListener

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The 450 held-out digits."""
    folder = tmp_path_factory.mktemp("digits")
    _, _, images, labels = train_digits.digits()
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        Image.fromarray(image).save(folder / f"{index:03}-{label}.png")
    return folder


@pytest.fixture(scope="module")
def bundle(zoo_bundle):
    return zoo_bundle("digits-linear")


def arrays(path):
    with np.load(path) as file:
        return {name: file[name] for name in file}


def test_every_held_out_digit(infexport, ray, bundle, digits, tmp_path):
    options = ("--batch-size", 8, "--threads", 1, "--features")
    infexport("run-engine", bundle, digits, "-o", tmp_path / "serial.npz", *options)
    told = infexport("run-engine", bundle, digits, "-o", tmp_path / "ray.npz", *options, "--ray", "--workers", 2).stderr
    assert "2 Ray workers of 1 cores each" in told
    serial, found = arrays(tmp_path / "serial.npz"), arrays(tmp_path / "ray.npz")
    assert len(found["files"]) == 450
    for name, values in serial.items():
        assert np.array_equal(found[name], values), name


class Noted(Predictor):
    """Records every part that it starts; waits at image `stop`, dies at `poison` and raises at `odd`."""

    folder, stop, poison, odd = None, None, None, None

    def predict(self, images, listener=None):
        names = [Path(image).name for image in images]
        with (self.folder / "begun").open("a") as file:
            file.write(f"{names[0]}\n")
        if self.stop in names:
            (self.folder / "waiting.partial").write_text(str(os.getpid()))
            (self.folder / "waiting.partial").rename(self.folder / "waiting")
            while not (self.folder / "go").exists():
                time.sleep(0.01)
        if self.poison in names:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.odd in names:
            raise ZeroDivisionError("by nothing")
        return super().predict(images, listener)


@pytest.fixture
def noted(ray, bundle, tmp_path, monkeypatch):
    """A `Noted` predictor, whose class is sent to the workers by value."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    monkeypatch.setattr(Noted, "folder", tmp_path)
    return Noted(bundle, batch_size=8, threads=1)


def same(rows, expected):
    assert [row.file for row in rows] == [row.file for row in expected]
    assert all(np.array_equal(row.logits, other.logits) for row, other in zip(rows, expected, strict=True))


def test_a_worker_that_is_killed_changes_nothing(ray, bundle, digits, noted, tmp_path, monkeypatch):
    files = sorted(digits.iterdir())
    size = part_size(450, 2, 8)
    monkeypatch.setattr(Noted, "stop", files[2 * size].name)

    def kill():
        while not (tmp_path / "waiting").exists():
            time.sleep(0.01)
        os.kill(int((tmp_path / "waiting").read_text()), signal.SIGKILL)
        (tmp_path / "go").touch()

    killer = threading.Thread(target=kill)
    killer.start()
    rows = predict(ray, Workers(2, 1, 0, None), noted, files, 8, ProgressListener())
    killer.join()
    same(rows, Predictor(bundle, batch_size=8, threads=1).predict(files))
    times = Counter((tmp_path / "begun").read_text().splitlines())
    assert times == Counter({file.name: 1 for file in files[::size]}) + Counter([files[2 * size].name])


def test_an_image_that_its_worker_dies_of_is_one_failure(ray, bundle, digits, noted, monkeypatch):
    files = sorted(digits.iterdir())[:24]
    monkeypatch.setattr(Noted, "poison", files[9].name)
    done = []

    class Counted(ProgressListener):
        def on_event(self, event):
            if isinstance(event, ItemsDone):
                done.append(event.count)

    rows = predict(ray, Workers(2, 1, 0, None), noted, files, 8, Counted())
    assert isinstance(rows[9], Failure)
    assert rows[9].error.summary == f"the worker died on every attempt: {files[9]}"
    others = [index for index in range(24) if index != 9]
    alone = Predictor(bundle, batch_size=8, threads=1).predict([files[index] for index in others])
    for index, row in zip(others, alone, strict=True):  # those of its part were in batches of their own
        assert relative_error(rows[index].logits, row.logits) <= 1e-5
    assert sum(done) == 24


def test_an_exception_of_a_worker_is_told_as_it_is(ray, bundle, digits, noted, monkeypatch):
    """It is not reported as a death, for which the hint would be more memory."""
    files = sorted(digits.iterdir())[:8]
    monkeypatch.setattr(Noted, "odd", files[3].name)
    rows = predict(ray, Workers(2, 1, 0, None), noted, files, 8, ProgressListener())
    (failed,) = [index for index, row in enumerate(rows) if isinstance(row, Failure)]
    assert failed == 3
    assert (rows[3].error.summary, rows[3].error.details) == ("a worker failed", "ZeroDivisionError: by nothing")


def test_a_failed_image_is_a_row_with_its_error(infexport, ray, bundle, digits, tmp_path):
    first, second = sorted(digits.iterdir())[:2]
    (tmp_path / os.fsdecode(b"name-\xff.png")).write_bytes(second.read_bytes())
    bad = tmp_path / os.fsdecode(b"bad-\xff.png")
    bad.write_bytes(first.read_bytes()[:60])
    images = (first, bad, tmp_path / os.fsdecode(b"name-\xff.png"))
    names = [str(first), f"{tmp_path}/bad-\ufffd.png", f"{tmp_path}/name-\ufffd.png"]
    outputs = [tmp_path / f"out.{suffix}" for suffix in ("json", "csv", "npz", "parquet")]
    for output in outputs:
        ray_or_not = ("--ray",) if output.suffix == ".parquet" else ()
        result = infexport("run-engine", bundle, *images, "-o", output, "--features", *ray_or_not, exit_code=1)
        assert result.stderr.count("error:") == 1
    document = json.loads(outputs[0].read_text())
    assert [image["file"] for image in document["images"]] == [names[0], names[2]]
    assert [failed["file"] for failed in document["failed"]] == [names[1]]
    assert "damaged or truncated" in document["failed"][0]["error"]
    with outputs[1].open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == names
    assert [bool(row["error"]) for row in rows] == [False, True, False]
    assert rows[1]["label_1"] == rows[1]["feature_0"] == ""
    found = arrays(outputs[2])
    assert found["files"].tolist() == names
    assert "damaged or truncated" in found["errors"][1]
    assert np.isnan(found["logits"]).all(1).tolist() == [False, True, False]
    table = pyarrow.parquet.read_table(outputs[3]).to_pylist()
    assert [row["file"] for row in table] == names
    assert [row["label_1"] for row in table] == [rows[0]["label_1"], None, rows[2]["label_1"]]
    assert np.array_equal(np.array(table[2]["logits"], np.float32), found["logits"][2])
    assert np.array_equal(np.array(table[2]["features"], np.float32), found["features"][2])


def test_an_output_s_rows_are_the_serial_ones(infexport, ray, bundle, digits, tmp_path, monkeypatch):
    """Names are those given, although workers run in another folder."""
    monkeypatch.chdir(digits)
    names = [file.name for file in sorted(digits.iterdir())[:5]]
    for name, options in (("serial", ()), ("ray", ("--ray",))):
        infexport("run-engine", bundle, *names, "--threads", 1, "-o", tmp_path / f"{name}.csv", *options)
    assert (tmp_path / "ray.csv").read_text() == (tmp_path / "serial.csv").read_text()


def test_what_ran_is_told(ray, infexport, golden_bundle, digits):
    bundle, image = golden_bundle("reference_linear", "--precision", "fp16"), min(digits.iterdir())
    told = infexport("run-engine", bundle, image, "--ray", "--workers", 1, "--threads", 1).stderr
    assert told.count("running on cpu with fp16") == 1
    assert "fp16 on the CPU is computed in float32" in told


def test_what_a_run_says_of_an_image_is_kept(ray, bundle, digits):
    """Every field of a row is kept, including the rounding error."""
    files = [min(digits.iterdir()), digits / "gone.png"]
    options = InferenceOptions(execution="stream", chunk=64, tokens="float16", size="native", threads=1)
    expected = Predictor.of(open_bundle(bundle), options).predict(files)
    row, failure = scaled("local", 1, False, open_bundle(bundle), options, files, ProgressListener())
    for name in ("file", "grid", "padded_share", "execution", "rounding"):
        assert getattr(row, name) == getattr(expected[0], name), name
    assert row.rounding > 0
    assert np.array_equal(row.features, expected[0].features)
    assert failure.to_dict() == expected[1].to_dict()


def test_a_pipeline_of_one_s_own(ray, bundle, digits):
    """The pipeline of docs/scale.md passes other columns of a row through."""
    import ray.data

    files = sorted(digits.iterdir())[:6]
    rows = [{"image": np.array(Image.open(file).convert("RGB")), "truth": file.stem[-1]} for file in files]
    dataset = ray.data.from_items(rows).map_batches(
        Predictor, fn_constructor_args=(str(bundle),), batch_size=3, concurrency=1, num_cpus=1
    )
    found = dataset.take_all()
    expected = Predictor(bundle)(files)
    assert sorted(row["truth"] for row in found) == sorted(file.stem[-1] for file in files)
    logits = {row["truth"]: row["logits"] for row in found}
    for file, values in zip(files, expected["logits"], strict=True):
        if sum(other.stem[-1] == file.stem[-1] for other in files) == 1:
            assert relative_error(logits[file.stem[-1]], values) <= 1e-5


def test_many_images_by_ray_s_client(bundle, digits):
    options = InferenceOptions()
    with pytest.raises(InfexportError, match="many images cannot be distributed through ray://head:10001"):
        scaled(
            "ray://head:10001", None, False, open_bundle(bundle), options, [min(digits.iterdir())], ProgressListener()
        )


def test_nothing_that_ray_will_remove_is_used(ray, bundle, digits):
    from ray.util.annotations import RayDeprecationWarning

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        predict(
            ray, Workers(1, 1, 0, None), Predictor(bundle, threads=1), [min(digits.iterdir())], 1, ProgressListener()
        )
    assert not [str(one.message) for one in caught if issubclass(one.category, RayDeprecationWarning)]


def test_workers_that_cannot_open_the_bundle(ray, bundle, digits, tmp_path):
    predictor = Predictor(tmp_path / "gone")
    with pytest.raises(InfexportError, match="not a bundle"):
        predict(ray, Workers(1, 1, 0, None), predictor, sorted(digits.iterdir())[:2], 1, ProgressListener())


def test_more_workers_than_cores(ray, bundle, digits):
    options = InferenceOptions()
    with pytest.raises(InfexportError, match="not enough cores for 1000 workers of 1 cores each") as caught:
        scaled("local", 1000, False, open_bundle(bundle), options, sorted(digits.iterdir())[:1], ProgressListener())
    assert caught.value.details.startswith("the cluster has ")


@pytest.mark.parametrize(
    ("images", "workers", "batch", "size"),
    [(10_000, 4, 1, PART), (10_000, 4, 12, 120), (10_000, 4, 200, 200), (100, 4, 1, 7), (10, 4, 8, 8), (1, 2, 1, 1)],
)
def test_parts_are_whole_batches(images, workers, batch, size):
    assert part_size(images, workers, batch) == size
