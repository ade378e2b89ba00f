"""`validate accuracy` on every held-out digit: whole, streamed and in int8, compared with PyTorch."""

import csv
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import train_digits
from PIL import Image
from safetensors.torch import load_file, save_file
from support import ZOO

from infexport.bundle.integrity import sealed
from infexport.errors import InfexportError
from infexport.evaluation.accuracy.dataset import Classes, read_labelled

RIGHT, ALL = 446, 450
"""Number of held-out digits that digits-linear classifies correctly."""


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The held-out digits in a folder per class."""
    folder = tmp_path_factory.mktemp("digits")
    _, _, images, labels = train_digits.digits()
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        (folder / str(label)).mkdir(exist_ok=True)
        Image.fromarray(image).save(folder / str(label) / f"{i:03}.png", compress_level=1)
    return folder


@pytest.fixture(scope="module")
def few(digits, tmp_path_factory):
    """Three digits of every class."""
    folder = tmp_path_factory.mktemp("few")
    for label in digits.iterdir():
        (folder / label.name).mkdir()
        for file in sorted(label.iterdir())[:3]:
            shutil.copy(file, folder / label.name)
    return folder


@pytest.fixture(scope="module")
def bundle(zoo_bundle):
    return zoo_bundle("digits-linear")


def report_of(infexport, *arguments, exit_code=0):
    return json.loads(infexport("validate", "accuracy", *arguments, "--json", exit_code=exit_code).stdout)


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def check_digits(report, name):
    recorded = json.loads((ZOO / name / "training.json").read_text())
    assert report["images"] == recorded["held_out_images"] == ALL
    assert report["top1"]["share"] == pytest.approx(recorded["held_out_accuracy"], abs=5e-5)
    assert report["top1"]["of"] == sum(one["images"] for one in report["classes"]) == ALL
    assert report["top1"]["count"] == sum(one["right"] for one in report["classes"])
    low, high = report["top1"]["interval"]
    assert 0.97 < low < report["top1"]["share"] < high < 1
    assert report["top5"]["count"] >= report["top1"]["count"]
    assert report["passed"] is True
    assert report["failed"] == []


@pytest.mark.parametrize(("name", "options"), [("digits-pure", ()), ("digits-linear", ("--precision", "int8"))])
def test_every_held_out_digit(name, options, infexport, zoo_bundle, digits):
    report = report_of(infexport, zoo_bundle(name, *options), digits, "--batch-size", 64)
    check_digits(report, name)
    theirs = report["pytorch"]
    assert theirs["images"] == ALL
    assert "not with the code that trained them" in theirs["compared"]
    assert theirs["top1"] == report["top1"]
    assert theirs["agreement"]["share"] == 1
    low, high = (1e-3, 0.2) if options else (1e-9, 5e-6)
    assert low < theirs["largest_difference"] < high


def test_whole_then_streamed(infexport, bundle, digits, tmp_path):
    report = report_of(infexport, bundle, digits, "-o", tmp_path / "all.csv", "--no-pytorch")
    check_digits(report, "digits-linear")
    assert report["pytorch"] is None
    assert report["executions"] == {"whole": ALL}
    assert report["images_per_second"] > 0
    lines = rows(tmp_path / "all.csv")
    assert list(lines[0]) == ["file", "label", "predicted", "probability"]
    wrong = [line for line in lines if line["label"] != line["predicted"]]
    assert (len(lines), len(wrong)) == (ALL, ALL - RIGHT)

    # streaming loads a graph per stage and image: only the wrong ones, and some others
    some = wrong + [line for line in lines if line not in wrong][::20]
    with (tmp_path / "some.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, list(lines[0]))
        table.writeheader()
        table.writerows(some)
    arguments = (bundle, tmp_path / "some.csv", "--execution", "stream", "-o", tmp_path / "streamed.csv")
    report = report_of(infexport, *arguments, "--chunk", 5, "--threads", 1)
    assert report["executions"] == {"stream, tokens in memory": len(some)}
    assert report["top1"]["count"] == len(some) - len(wrong)
    assert report["pytorch"]["agreement"]["share"] == 1
    assert report["pytorch"]["largest_difference"] < 5e-6
    for ours, theirs in zip(rows(tmp_path / "streamed.csv"), some, strict=True):
        assert [ours[name] for name in ("file", "label", "predicted")] == [
            theirs[name] for name in ("file", "label", "predicted")
        ]
        assert ours["pytorch"] == ours["predicted"]
        assert float(ours["probability"]) == pytest.approx(float(theirs["probability"]), rel=1e-4)


def test_what_a_person_reads(infexport, bundle, few):
    result = infexport("validate", "accuracy", bundle, few, "--min-top1", 0.9)
    for words in (
        "30 images of 10 classes, on cpu with fp32",
        "top-1: 100.00%, 30 of 30, 95% interval 88.65% to 100.00%",
        "top-5: 100.00%",
        "class  images  right  recall",
        "compared: the bundle with infexport's own PyTorch network",
        "same top-1 as PyTorch: 100.00%, 30 of 30",
        "images per second: ",
        "accuracy holds: top-1 100.00%, at least 90.00% required",
    ):
        assert words in result.stdout
    assert "disagreement" not in result.stdout
    assert "running on PyTorch" in result.stderr


def test_many_classes_and_disagreements_are_cut_short(infexport, bundle, few, monkeypatch, tmp_path):
    from infexport.cli.commands import accuracy

    monkeypatch.setattr(accuracy, "ALL_CLASSES", 9)
    monkeypatch.setattr(accuracy, "WORST", 2)
    monkeypatch.setattr(accuracy, "DISAGREEMENTS", 5)
    result = infexport("validate", "accuracy", bundle, few, "--checkpoint", with_heads_swapped(tmp_path))
    lines = result.stdout.splitlines()
    start = lines.index("the 2 classes least often right:")
    assert [line.split()[0] for line in lines[start + 1 : start + 4]] == ["class", "0", "1"]
    assert "and 1 more: --json or --output has them" in lines


def with_heads_swapped(folder):
    """A checkpoint like digits-linear that takes 0 for 1 and 1 for 0."""
    state = load_file(ZOO / "digits-linear" / "model.safetensors")
    for name in ("head.weight", "head.bias"):
        state[name][[0, 1]] = state[name][[1, 0]]
    save_file(state, folder / "swapped.safetensors")
    return folder / "swapped.safetensors"


def test_other_weights_disagree(infexport, bundle, few, tmp_path):
    checkpoint = with_heads_swapped(tmp_path)
    report = report_of(infexport, bundle, few, "--checkpoint", checkpoint, "-o", tmp_path / "out.csv")
    assert report["passed"] is True
    assert report["top1"]["count"] == 30
    theirs = report["pytorch"]
    assert theirs["top1"]["count"] == theirs["agreement"]["count"] == 24
    assert theirs["largest_difference"] > 0.1
    assert len(theirs["disagreements"]) == 6
    for one in theirs["disagreements"]:
        assert one["label"] == one["bundle"]["label"] != one["pytorch"]["label"]
        assert one["bundle"]["probability"] == pytest.approx(one["pytorch"]["probability"], abs=1e-5)
    assert {one["label"] for one in theirs["disagreements"]} == {"0", "1"}
    differing = [line["file"] for line in rows(tmp_path / "out.csv") if line["predicted"] != line["pytorch"]]
    assert differing == [one["file"] for one in theirs["disagreements"]]


def test_the_required_accuracy(infexport, bundle, few, tmp_path):
    (tmp_path / "table.csv").write_text(f"file,label\n{few}/0/{min((few / '0').iterdir()).name},1\n")
    arguments = ("validate", "accuracy", bundle, tmp_path / "table.csv", "--no-pytorch", "--min-top1")
    assert "accuracy holds" in infexport(*arguments, 0).stdout
    assert "accuracy FAILED: top-1 0.00%, at least 50.00% required" in infexport(*arguments, 0.5, exit_code=1).stdout
    report = json.loads(infexport(*arguments, 0.5, "--json", exit_code=1).stdout)
    assert (report["passed"], report["required_top1"]) == (False, 0.5)
    assert report["classes"][0]["confused_with"] == {"label": "0", "images": 1}
    assert report["images_per_second"] is None
    assert "0<=x<=1" in infexport(*arguments, 98, exit_code=2).stderr


def test_images_that_cannot_be_read_count_neither_way(infexport, bundle, few, tmp_path):
    shutil.copytree(few, tmp_path / "few")
    (tmp_path / "few" / "3" / "damaged.png").write_text("no image")
    report = report_of(infexport, bundle, tmp_path / "few", exit_code=1)
    assert (report["images"], report["top1"]["count"], report["pytorch"]["images"]) == (30, 30, 30)
    assert [failure["file"] for failure in report["failed"]] == [str(tmp_path / "few" / "3" / "damaged.png")]

    (tmp_path / "table.csv").write_text("file,label\nmissing.png,3\n")
    result = infexport("validate", "accuracy", bundle, tmp_path / "table.csv", exit_code=1)
    assert "0 images" in result.stdout
    assert "cannot open image" in result.stderr
    report = report_of(infexport, bundle, tmp_path / "table.csv", exit_code=1)
    assert (report["images"], report["top1"]["share"]) == (0, None)


def test_what_pytorch_has_no_memory_for_is_told(infexport, bundle, few, monkeypatch, tmp_path):
    from infexport.errors import InfexportError
    from infexport.evaluation.pytorch_reference import TorchRunner

    run = TorchRunner.run

    def short(self, images):
        if images.mean() > 80:
            raise InfexportError("not enough memory for PyTorch")
        return run(self, images)

    monkeypatch.setattr(TorchRunner, "run", short)
    brighter = sum(np.asarray(Image.open(file)).mean() > 80 for file in few.rglob("*.png"))
    assert 0 < brighter < 30
    report = report_of(infexport, bundle, few, "-o", tmp_path / "out.csv", exit_code=1)
    assert (report["images"], report["pytorch"]["images"], len(report["failed"])) == (30, 30 - brighter, brighter)
    assert "not enough memory for PyTorch" in report["failed"][0]["details"]
    assert "--no-pytorch" in report["failed"][0]["hint"]
    assert sum(line["pytorch"] == "" for line in rows(tmp_path / "out.csv")) == brighter


@pytest.mark.parametrize("side", ["bundle", "PyTorch"])
def test_answers_that_are_no_numbers_fail_on_either_side(side, infexport, bundle, few, monkeypatch):
    from infexport.evaluation.pytorch_reference import TorchRunner
    from infexport.inference.runners.onnxruntime import OrtRunner

    runner = OrtRunner if side == "bundle" else TorchRunner
    run = runner.run
    monkeypatch.setattr(runner, "run", lambda self, images: {k: v * np.nan for k, v in run(self, images).items()})
    report = report_of(infexport, bundle, few, "--min-top1", 0, exit_code=1)
    assert (report["passed"], len(report["failed"])) == (False, 30)
    judged = report["pytorch"]
    assert (report["images"], judged["images"]) == ((0, 0) if side == "bundle" else (30, 0))
    assert judged["top1"]["count"] == judged["agreement"]["count"] == 0


def test_a_share_of_the_images_is_no_verdict(infexport, bundle, few, tmp_path):
    """Accuracy does not hold if an image could not be evaluated, even if all others are right."""
    (tmp_path / "table.csv").write_text(f"file,label\n{few}/0/{min((few / '0').iterdir()).name},0\nmissing.png,0\n")
    arguments = ("validate", "accuracy", bundle, tmp_path / "table.csv", "--no-pytorch", "--min-top1", 0.5)
    told = infexport(*arguments, exit_code=1).stdout
    assert "accuracy FAILED: top-1 100.00%, at least 50.00% required; 1 image could not be judged" in told
    assert "accuracy holds" not in told


def test_wrong_data(infexport, bundle, few, tmp_path):
    shutil.copytree(few, tmp_path / "few")
    (tmp_path / "few" / "3").rename(tmp_path / "few" / "three")
    told = infexport("validate", "accuracy", bundle, tmp_path / "few", exit_code=2).stderr
    assert "three\n  its classes: 0, 1, 2, 3" in told
    (tmp_path / "table.csv").write_text("image,label\na.png,3\n")
    assert "no column file" in infexport("validate", "accuracy", bundle, tmp_path / "table.csv", exit_code=2).stderr


def test_wrong_usage(infexport, bundle, few):
    arguments = ("validate", "accuracy", bundle, few)
    assert "leave one" in infexport(*arguments, "--no-pytorch", "--checkpoint", "c.pth", exit_code=2).stderr
    assert "expected .csv" in infexport(*arguments, "--output", "out.npz", exit_code=2).stderr


def test_no_pytorch_is_for_where_there_is_none(infexport, bundle, few, monkeypatch, tmp_path):
    shutil.copytree(bundle, tmp_path / "b")
    manifest = json.loads((tmp_path / "b" / "infexport.json").read_text())
    manifest["checkpoint"]["path"] = str(tmp_path / "gone")
    (tmp_path / "b" / "infexport.json").write_bytes(sealed(manifest))
    told = infexport("validate", "accuracy", tmp_path / "b", few, exit_code=2).stderr
    assert "the recorded checkpoint is gone" in told
    assert "--no-pytorch" in told

    from infexport.system import dependencies

    monkeypatch.setattr(dependencies, "installed", lambda module: module not in ("torch", "safetensors"))
    told = infexport("validate", "accuracy", bundle, few, exit_code=2).stderr
    assert "this needs torch" in told
    assert "--no-pytorch" in told

    arguments = ["infexport", "validate", "accuracy", str(tmp_path / "b"), str(few), "--no-pytorch"]
    code = f"import sys; sys.argv = {arguments!r}; from infexport.__main__ import main\n"
    code += "try: main()\nexcept SystemExit as end: assert not end.code\n"
    code += "print([m for m in ('torch', 'onnx', 'onnxscript', 'infvit.network', 'infsa_ops') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_modified_bundle(infexport, bundle, few, tmp_path):
    shutil.copytree(bundle, tmp_path / "b")
    labels = tmp_path / "b" / "labels.json"
    labels.write_text(labels.read_text() + "\n")
    arguments = ("validate", "accuracy", tmp_path / "b", few, "--no-pytorch")
    assert "was modified" in infexport(*arguments, exit_code=2).stderr
    result = infexport(*arguments, "--no-verify", "--min-top1", 0.9)
    assert "was modified" in result.stderr
    assert "(unverified" in result.stdout


def test_native_sizes_are_the_same_in_both(infexport, bundle, tmp_path):
    """PyTorch gets the same pixels for sides that are not multiples of the patch and for images of mixed sizes."""
    random = np.random.default_rng(0)
    for i, shape in enumerate([(33, 41), (33, 41), (40, 64), (16, 9)]):
        (tmp_path / "7").mkdir(exist_ok=True)
        Image.fromarray(random.integers(0, 256, (*shape, 3), np.uint8)).save(tmp_path / "7" / f"{i}.png")
    for edge in ("pad", "crop"):
        report = report_of(infexport, bundle, tmp_path, "--size", "native", "--edge", edge, "--batch-size", 2)
        assert report["images"] == report["pytorch"]["images"] == 4
        assert report["pytorch"]["agreement"]["share"] == 1
        assert report["pytorch"]["largest_difference"] < 5e-6


def test_a_pipe_is_no_list_of_labels(tmp_path):
    os.mkfifo(tmp_path / "labels.csv")
    with pytest.raises(InfexportError, match="no ordinary file"):
        read_labelled(tmp_path / "labels.csv", Classes(10, None))
