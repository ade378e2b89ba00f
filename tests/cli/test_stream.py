"""`run-engine` with streamed images: choice of execution, errors, and killed runs."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import skimage.data
import tifffile
from support import GOLDEN, relative_error

from infexport.evaluation.synthetic_images import synthetic_image


@pytest.fixture(scope="module")
def bundle(golden_bundle):
    return golden_bundle("reference_linear")


@pytest.fixture(scope="module")
def photograph(tmp_path_factory):
    path = tmp_path_factory.mktemp("photograph") / "astronaut.tif"
    tifffile.imwrite(path, skimage.data.astronaut(), tile=(128, 128), photometric="rgb")
    return path


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """Large enough that a run takes some seconds."""
    path = tmp_path_factory.mktemp("scene") / "scene.tif"
    tifffile.imwrite(path, np.tile(synthetic_image(512, 512), (4, 4, 1)), tile=(256, 256), photometric="rgb")
    return path


def logits(infexport, bundle, image, output, *options):
    infexport("run-engine", bundle, image, "--size", "native", "-o", output, *options)
    with np.load(output) as arrays:
        return arrays["logits"]


def test_streamed_or_whole_the_answer_is_the_same(infexport, bundle, photograph, tmp_path):
    whole = logits(infexport, bundle, photograph, tmp_path / "whole.npz", "--execution", "whole")
    for name, options in {
        "memory": (),
        "small chunks": ("--chunk", 100),
        "disk": ("--scratch", tmp_path / "scratch"),
    }.items():
        found = logits(infexport, bundle, photograph, tmp_path / "s.npz", "--execution", "stream", *options)
        assert relative_error(found, whole) <= 1e-5, name
    assert not list((tmp_path / "scratch").iterdir())


@pytest.mark.slow
def test_other_sizes_and_a_bundle_of_normalised_pixels(infexport, photograph, tmp_path):
    checkpoint, config = GOLDEN / "reference_linear.safetensors", GOLDEN / "reference_linear.json"
    options = ("--config", config, "--input", "float32", "--precision", "int8")
    infexport("convert", "checkpoint", checkpoint, *options, "-o", tmp_path / "bundle")
    for size in ("trained", "300"):
        arguments = ("run-engine", tmp_path / "bundle", photograph, "--size", size, "--json")
        whole, streamed = (
            json.loads(infexport(*arguments, "--execution", execution).stdout)["images"][0]
            for execution in ("whole", "stream")
        )
        assert whole["grid"] == streamed["grid"]
        assert whole["execution"] == "whole"
        assert streamed["execution"] == "stream, tokens in memory"
        assert streamed["top"][0]["index"] == whole["top"][0]["index"]
        assert streamed["top"][0]["probability"] == pytest.approx(whole["top"][0]["probability"], abs=0.05)


def test_auto_takes_what_fits(infexport, bundle, photograph, scene, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def way(image, *options):
        result = infexport("run-engine", bundle, image, "--size", "native", "--json", *options)
        return json.loads(result.stdout)["images"][0]["execution"]

    assert way(photograph) == "whole"
    assert way(photograph, "--scratch", tmp_path) == "stream, tokens on disk"
    assert way(scene) == "stream, tokens in memory"
    assert way(scene, "--memory", "135MB") == "stream, tokens on disk"
    assert way(scene, "--tokens", "float16") == "stream, tokens in memory in float16"
    assert not list((tmp_path / "infexport").iterdir())


def test_what_does_not_fit_is_refused_with_the_smallest_that_would(infexport, bundle, scene):
    arguments = ("run-engine", bundle, scene, "--size", "native")
    result = infexport(*arguments, "--memory", "50MB", exit_code=1)
    assert "does not fit into 48MiB" in result.stderr
    least = result.stderr.rpartition("--memory ")[2].split()[0]
    assert "error" not in infexport(*arguments, "--memory", least).stderr
    whole = infexport(*arguments, "--memory", least, "--execution", "whole", exit_code=1).stderr
    assert "--execution whole needs about" in whole
    assert "and --execution stream with tokens on disk" in whole


def test_a_package_for_gpus_where_there_is_none(infexport, bundle, scene, monkeypatch):
    """Streaming works as on any CPU."""
    import onnxruntime

    providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: providers)
    result = infexport("run-engine", bundle, scene, "--size", "native", "--json")
    assert json.loads(result.stdout)["images"][0]["execution"] == "stream, tokens in memory"
    assert "running on cpu" in result.stderr


def test_float16_says_what_it_costs(infexport, bundle, scene, tmp_path):
    arguments = ("run-engine", bundle, scene, "--size", "native", "--execution", "stream", "--tokens", "float16")
    image = json.loads(infexport(*arguments, "--json").stdout)["images"][0]
    assert 1e-5 < image["rounding"] < 5e-4
    assert "float16; each time by a relative error of" in infexport(*arguments).stdout


def test_a_bundle_without_stages(infexport, golden_bundle, photograph):
    arguments = ("run-engine", golden_bundle("torchvision_linear", "--no-fold"), photograph, "--size", "native")
    assert "no stages to stream through" in infexport(*arguments, "--execution", "stream", exit_code=1).stderr
    assert infexport(*arguments).stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--memory", "lots"), "no amount of memory"),
        (("--memory", "0GiB"), "no amount of memory"),
        (("--chunk", "0"), "x>=1"),
        (("--execution", "whole", "--scratch", "."), "scratch would be ignored: execution is whole"),
    ],
)
def test_wrong_usage(arguments, words, infexport, bundle, photograph):
    assert words in infexport("run-engine", bundle, photograph, *arguments, exit_code=2).stderr


def test_images_are_needed(infexport, bundle):
    assert "IMAGES" in infexport("run-engine", bundle, exit_code=2).stderr


def test_a_truncated_image_is_one_error_and_leaves_nothing(infexport, bundle, scene, photograph, tmp_path):
    content = scene.read_bytes()
    (tmp_path / "cut.tif").write_bytes(content[: len(content) // 2])
    arguments = ("--size", "native", "--scratch", tmp_path / "scratch", "--json")
    result = infexport("run-engine", bundle, tmp_path / "cut.tif", photograph, *arguments, exit_code=1)
    report = json.loads(result.stdout)
    assert [image["file"] for image in report["images"]] == [str(photograph)]
    assert "damaged or truncated" in report["failed"][0]["error"]
    assert result.stderr.count("error:") == 1
    assert not list((tmp_path / "scratch").iterdir())


def test_a_failure_holds_on_to_nothing(bundle, scene, tmp_path):
    """The traceback of an error must not keep the tokens of the failed image in memory."""
    from infexport.bundle import open_bundle
    from infexport.inference.executor import Run
    from infexport.inference.options import InferenceOptions

    content = scene.read_bytes()
    (tmp_path / "cut.tif").write_bytes(content[: len(content) // 2])
    options = InferenceOptions(execution="stream", memory=10**10, size="native")
    (failure,) = Run(open_bundle(bundle), options)([tmp_path / "cut.tif"])
    assert "damaged or truncated" in failure.error.summary
    assert failure.error.__traceback__ is failure.error.__cause__ is failure.error.__context__ is None


def command(bundle, image, output, *options):
    python = [sys.executable, "-m", "infexport", "run-engine", bundle, image, "--size", "native", "-o", output]
    return [str(part) for part in (*python, "--execution", "stream", "--threads", "1", *options)]


def test_a_full_disk_is_one_error_before_work_starts(bundle, scene, tmp_path):
    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))

    done = subprocess.run(
        command(bundle, scene, tmp_path / "out.npz", "--scratch", tmp_path / "scratch"),
        capture_output=True, text=True, preexec_fn=small_files, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.count("error:") == 1
    assert "no room for 0.02 GB of tokens" in done.stderr
    assert "sweep" not in done.stderr
    assert not list((tmp_path / "scratch").iterdir())


def wait_for_records(run, folder, count):
    """Wait until `folder` contains a number of records of a run, which must still be running."""
    seen = set()
    while len(seen) < count:
        assert run.poll() is None, f"the run ended after {len(seen)} records"
        seen |= {file.stat().st_mtime_ns for file in folder.glob("*/state.npz")}
        time.sleep(0.001)


@pytest.mark.parametrize("name", ["reference_linear", "torchvision_pure"])
def test_killed_at_any_moment_the_same_command_goes_on(name, golden_bundle, scene, photograph, tmp_path):
    bundle, image = golden_bundle(name), photograph if "pure" in name else scene
    options = ("--scratch", tmp_path / "scratch", "--chunk", 64)
    subprocess.run(command(bundle, image, tmp_path / "whole.npz", *options), check=True, capture_output=True)
    with np.load(tmp_path / "whole.npz") as arrays:
        expected = arrays["logits"]
    for records in (1, 2, 4):
        with subprocess.Popen(command(bundle, image, tmp_path / "out.npz", *options), stderr=subprocess.DEVNULL) as run:
            wait_for_records(run, tmp_path / "scratch", records)
            run.send_signal(signal.SIGKILL)
        done = subprocess.run(
            command(bundle, image, tmp_path / "out.npz", *options), check=True, capture_output=True, text=True
        )
        assert "going on where an earlier run was interrupted" in done.stderr
        with np.load(tmp_path / "out.npz") as arrays:
            assert np.array_equal(arrays["logits"], expected)
        assert not list((tmp_path / "scratch").iterdir())
        (tmp_path / "out.npz").unlink()


def label_and_messages(infexport, bundle, image, output, *options):
    result = infexport("run-engine", bundle, image, "--size", "native", "--threads", 1, "-o", output, *options)
    with np.load(output) as arrays:
        return arrays["logits"], result.stderr


def test_an_exchanged_image_or_another_option_is_a_run_of_its_own(infexport, bundle, tmp_path, monkeypatch):
    """A new image of equal size and time at the same path gets its own prediction; the old progress is kept."""
    from infexport.inference.streaming import driver

    image, scratch = tmp_path / "image.tif", tmp_path / "scratch"
    contents = []
    for pixels in (synthetic_image(200, 200), np.ascontiguousarray(synthetic_image(200, 200)[::-1])):
        tifffile.imwrite(image, pixels, photometric="rgb")
        contents.append(image.read_bytes())
    assert len(contents[0]) == len(contents[1])

    def show(which):
        image.write_bytes(contents[which])
        os.utime(image, ns=(0, 0))

    options = ("--chunk", 16, "--scratch", scratch)
    expected = []
    for which in (0, 1):
        show(which)
        expected.append(label_and_messages(infexport, bundle, image, tmp_path / "out.npz", *options)[0])
    assert not np.array_equal(*expected)
    show(0)
    recorded = []
    with monkeypatch.context() as patch:
        real = driver.Driver.units

        def ends(self, index, position):
            if index == 4:
                recorded.append(position)
                raise MemoryError
            return real(self, index, position)

        patch.setattr(driver.Driver, "units", ends)
        arguments = ("run-engine", bundle, image, "--size", "native", "--threads", 1, *options)
        failed = infexport(*arguments, exit_code=1)
    assert recorded
    assert "not enough memory for an image" in failed.stderr
    assert "interrupted: the same command goes on" in failed.stderr
    (left,) = scratch.iterdir()
    show(1)
    found, said = label_and_messages(infexport, bundle, image, tmp_path / "out.npz", *options)
    assert f"starting anew: the run that is kept in {left} had another image" in said
    assert np.array_equal(found, expected[1])
    show(0)
    said = label_and_messages(infexport, bundle, image, tmp_path / "out.npz", "--chunk", 20, "--scratch", scratch)[1]
    assert f"starting anew: the run that is kept in {left} had another chunk" in said
    found, said = label_and_messages(infexport, bundle, image, tmp_path / "out.npz", *options)
    assert "going on where an earlier run was interrupted" in said
    assert np.array_equal(found, expected[0])
    assert not list(scratch.iterdir())


def test_interrupted_by_hand_it_says_so_and_clean_deletes_it(infexport, bundle, scene, tmp_path):
    options = ("--scratch", tmp_path / "scratch", "--chunk", 2)
    with subprocess.Popen(
        command(bundle, scene, tmp_path / "out.npz", *options), stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell ignores it in the background
    ) as run:  # fmt: skip
        wait_for_records(run, tmp_path / "scratch", 1)  # well before the last of tens of thousands of chunks
        run.send_signal(signal.SIGINT)
        messages = run.stderr.read()
    assert run.returncode == 130
    assert "interrupted: the same command goes on" in messages
    assert list((tmp_path / "scratch").iterdir())
    result = infexport("run-engine", bundle, "--clean", "--scratch", tmp_path / "scratch")
    assert "freed 0.0" in result.stderr
    assert not list((tmp_path / "scratch").iterdir())
