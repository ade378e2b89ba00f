"""`run-engine`: predictions, files, sizes, batches, photographs, and images that fail."""

import csv
import json

import numpy as np
import pytest
import skimage.data
from PIL import Image
from support import relative_error


@pytest.fixture(scope="module")
def bundle(golden_bundle):
    return golden_bundle("reference_linear")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """The same scene in common image files: every mode, and sizes that are not multiples of the patch."""
    folder = tmp_path_factory.mktemp("photographs")
    astronaut = Image.fromarray(skimage.data.astronaut()).resize((205, 133))
    retina = Image.fromarray(skimage.data.retina()).resize((141, 141))
    astronaut.save(folder / "astronaut.jpg", quality=95)
    retina.save(folder / "retina.png")
    astronaut.convert("RGBA").save(folder / "rgba.png")
    astronaut.convert("L").save(folder / "grey.png")
    astronaut.convert("P", palette=Image.Palette.ADAPTIVE).save(folder / "palette.png")
    Image.fromarray(np.asarray(astronaut.convert("L")).astype(np.uint16) * 257).save(folder / "sixteen.png")
    astronaut.convert("CMYK").save(folder / "cmyk.jpg", quality=95)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    astronaut.transpose(Image.Transpose.ROTATE_90).save(folder / "turned.png", exif=exif)
    Image.new("RGB", (1, 1), (200, 10, 30)).save(folder / "one-pixel.png")
    return folder


def logits_of(infexport, bundle, images, output, *arguments):
    infexport("run-engine", bundle, *images, "-o", output, *arguments)
    with np.load(output) as arrays:
        return {file.rsplit("/", 1)[-1]: row for file, row in zip(arrays["files"], arrays["logits"], strict=True)}


@pytest.mark.parametrize("size", ["trained", "native", "64"])
def test_photographs_of_every_kind(size, infexport, bundle, photographs, tmp_path):
    logits = logits_of(infexport, bundle, [photographs], tmp_path / "out.npz", "--size", size)
    assert len(logits) == len(list(photographs.iterdir())) == 9
    assert all(np.isfinite(row).all() for row in logits.values())
    # grey in 8 and in 16 bits are the same picture, and so is the one with an EXIF rotation
    assert relative_error(logits["sixteen.png"], logits["grey.png"]) < 1e-6
    assert relative_error(logits["turned.png"], logits["rgba.png"]) < 1e-6
    assert relative_error(logits["cmyk.jpg"], logits["astronaut.jpg"]) < 0.1
    assert relative_error(logits["retina.png"], logits["astronaut.jpg"]) > 1e-3


def test_batching_changes_nothing(infexport, bundle, photographs, tmp_path):
    one = logits_of(infexport, bundle, [photographs], tmp_path / "one.npz", "--size", "native")
    four = logits_of(infexport, bundle, [photographs], tmp_path / "four.npz", "--size", "native", "--batch-size", 4)
    assert list(one) == list(four)
    for name, row in one.items():
        assert relative_error(four[name], row) < 1e-5


def test_a_crop_is_another_image_than_a_completed_one(infexport, bundle, photographs, tmp_path):
    arguments = ("run-engine", bundle, photographs / "astronaut.jpg", "--size", "native", "--json")
    pad = json.loads(infexport(*arguments).stdout)["images"][0]
    crop = json.loads(infexport(*arguments, "--edge", "crop").stdout)["images"][0]
    assert pad["grid"] == [17, 26]
    assert pad["padded_share"] == pytest.approx(1 - 205 * 133 / (26 * 8 * 17 * 8))
    assert crop["grid"] == [16, 25]
    assert crop["padded_share"] == 0


def test_images_that_fail_don_t_stop_the_others(infexport, bundle, photographs, tmp_path):
    (tmp_path / "notes.png").write_text("no image")
    whole = (photographs / "astronaut.jpg").read_bytes()
    (tmp_path / "half.jpg").write_bytes(whole[: len(whole) // 2])
    good = photographs / "retina.png"
    files = (tmp_path / "notes.png", good, tmp_path / "half.jpg")
    result = infexport("run-engine", bundle, *files, "--json", "-o", tmp_path / "out.csv", exit_code=1)
    report = json.loads(result.stdout)
    assert [image["file"] for image in report["images"]] == [str(good)]
    assert [failure["file"] for failure in report["failed"]] == [str(files[0]), str(files[2])]
    assert result.stderr.count("error:") == 2
    assert "Traceback" not in result.stderr
    with (tmp_path / "out.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == [str(file) for file in files]
    assert [bool(row["label_1"]) for row in rows] == [False, True, False]
    assert [row["error"].partition(":")[0] for row in rows] == [
        "not an image that can be read", "", "damaged or truncated image",
    ]  # fmt: skip


def test_a_batch_that_fails_doesn_t_stop_the_others(infexport, bundle, photographs, monkeypatch):
    from infexport.errors import InfexportError
    from infexport.inference.runners.onnxruntime import OrtRunner

    run = OrtRunner.run

    def small_only(self, images):
        if images.size > 141 * 141 * 3:
            raise InfexportError("ONNX Runtime failed", hint="smaller")
        if images.shape[1] == 8:
            return {name: np.full_like(values, np.nan) for name, values in run(self, images).items()}
        return run(self, images)

    monkeypatch.setattr(OrtRunner, "run", small_only)
    report = infexport("run-engine", bundle, photographs, "--size", "native", "--json", exit_code=1)
    report = json.loads(report.stdout)
    assert report["images"] == []
    assert len(report["failed"]) == 9
    assert sum("not finite" in failure["error"] for failure in report["failed"]) == 1


def test_when_every_image_fails_the_file_says_so(infexport, bundle, tmp_path):
    (tmp_path / "a.png").write_text("no image")
    for suffix in ("csv", "json", "npz"):
        output = tmp_path / f"out.{suffix}"
        output.write_text("from an earlier run")
        infexport("run-engine", bundle, tmp_path / "a.png", "-o", output, "--features", exit_code=1)
    with (tmp_path / "out.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert "not an image" in row["error"]
    assert len(json.loads((tmp_path / "out.json").read_text())["failed"]) == 1
    with np.load(tmp_path / "out.npz") as arrays:
        assert arrays["logits"].shape == (1, 10)
        assert arrays["features"].shape == (1, 64)
        assert np.isnan(arrays["logits"]).all()
        assert "not an image" in arrays["errors"][0]


def test_a_file_name_that_is_no_utf8(infexport, bundle, photographs, tmp_path):
    import os
    import shutil

    name = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png")
    shutil.copy(photographs / "retina.png", name)
    infexport("run-engine", bundle, tmp_path, "-o", tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text())["images"][0]["file"].endswith("caf\ufffd.png")


class Session:
    """Session of ONNX Runtime's GPU package on a machine without a GPU."""

    def __init__(self, *arguments, providers, **options):
        self.providers = providers

    def get_providers(self):
        return ["CPUExecutionProvider"]


def test_a_silent_fall_back_to_the_cpu_is_an_error(monkeypatch, golden_bundle):
    import onnxruntime

    from infexport.bundle import open_bundle
    from infexport.errors import InfexportError
    from infexport.inference.runners.onnxruntime import OrtRunner

    providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: providers)
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    opened = open_bundle(golden_bundle("reference_linear"))
    with pytest.raises(InfexportError, match="asked for CUDAExecutionProvider, ONNX Runtime gave CPU"):
        OrtRunner(opened, "cuda").__enter__()
    with OrtRunner(opened, "auto") as runner:
        assert runner.provider == "cpu"


def test_json_csv_and_npz_say_the_same(infexport, bundle, golden_images, tmp_path):
    folder, io = golden_images("reference_linear")
    for suffix in ("json", "csv", "npz"):
        infexport("run-engine", bundle, folder, "-o", tmp_path / f"out.{suffix}", "--top-k", 3, "--features")
    document = json.loads((tmp_path / "out.json").read_text())
    with (tmp_path / "out.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    with np.load(tmp_path / "out.npz") as arrays:
        logits, features = arrays["logits"], arrays["features"]
    assert relative_error(logits, io["logits_f64"]) <= 5e-6
    exponents = np.exp(io["logits_f64"])
    probabilities = exponents / exponents.sum(-1, keepdims=True)
    for i, image in enumerate(document["images"]):
        best = np.argsort(-probabilities[i])[:3]
        assert [top["index"] for top in image["top"]] == best.tolist()
        assert [top["probability"] for top in image["top"]] == pytest.approx(probabilities[i][best], rel=1e-5)
        assert rows[i]["label_1"] == image["top"][0]["label"]
        assert float(rows[i]["probability_3"]) == pytest.approx(image["top"][2]["probability"], rel=1e-5)
        assert image["features"] == pytest.approx(features[i].tolist())
        assert float(rows[i]["feature_63"]) == pytest.approx(features[i][63])
    assert (tmp_path / "out.npz").stat().st_mode & 0o444 == 0o444


def test_people_see_labels_and_probabilities(infexport, bundle, golden_images):
    folder, _ = golden_images("reference_linear")
    result = infexport("run-engine", bundle, folder / "0.png", "--top-k", 2)
    name, *lines = result.stdout.splitlines()
    assert name == str(folder / "0.png")
    assert len(lines) == 2
    assert all("%" in line for line in lines)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--output", "out.xlsx"), "expected .json, .csv, .npz"),
        (("--output", "/proc/none/out.json"), "cannot write the output"),
        (("--features",), "--features needs"),
        (("--size", "huge"), "neither trained, native nor"),
        (("--size", "²"), "neither trained, native nor"),
        (("--provider", "cuda"), "has no CUDAExecutionProvider"),
    ],
)
def test_wrong_usage(arguments, words, infexport, bundle, photographs):
    result = infexport("run-engine", bundle, photographs / "retina.png", *arguments, exit_code=2)
    assert words in result.stderr
    assert result.stdout == ""


def test_nothing_to_run(infexport, bundle, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "hint:" in infexport("run-engine", bundle, tmp_path / "empty", exit_code=2).stderr
    assert "hint:" in infexport("run-engine", bundle, tmp_path / "nowhere.png", exit_code=2).stderr
    assert "not a bundle" in infexport("run-engine", tmp_path, tmp_path / "empty", exit_code=2).stderr


def test_a_modified_bundle_is_refused(infexport, bundle, photographs, tmp_path):
    import shutil

    shutil.copytree(bundle, tmp_path / "b")
    weights = tmp_path / "b" / "model.onnx.data"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    result = infexport("run-engine", tmp_path / "b", photographs / "retina.png", exit_code=2)
    assert "model.onnx.data" in result.stderr
    assert "model.onnx.data" not in result.stdout
    assert infexport("inspect", tmp_path / "b", exit_code=1)
