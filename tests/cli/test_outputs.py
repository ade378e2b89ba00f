"""Outputs never replace inputs, and predictions are shown even if the files cannot be written."""

from __future__ import annotations

import csv
import errno
import json
import os
import shutil
import socket
import tempfile
import warnings
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import ZOO

from infexport import Predictor
from infexport.bundle import open_bundle
from infexport.errors import InfexportError
from infexport.outputs import files, heatmaps

DIGITS = sorted((ZOO / "digits-held-out").glob("*.png"))


@pytest.fixture(scope="module")
def bundle(zoo_bundle):
    return zoo_bundle("digits-linear")


@pytest.fixture
def images(tmp_path):
    """Folder with `a.png`, and `b` as JPEG and as PNG, which are different pictures."""
    folder = tmp_path / "images"
    folder.mkdir()
    shutil.copy(DIGITS[0], folder / "a.png")
    Image.open(DIGITS[1]).convert("RGB").save(folder / "b.jpg")
    shutil.copy(DIGITS[2], folder / "b.png")
    return folder


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


@pytest.mark.parametrize("given", ["folder", "files", "link", "url", "hard link"])
def test_a_map_never_replaces_an_image(given, infexport, bundle, images, tmp_path):
    before = contents(images)
    arguments, maps = [images], images
    if given == "files":
        arguments = sorted(images.iterdir())
    if given == "link":
        maps = tmp_path / "link"
        maps.symlink_to(images)
    if given == "url":
        arguments = [f"file://{images}/b.png"]
    if given == "hard link":
        maps = tmp_path / "maps"
        maps.mkdir()
        os.link(images / "a.png", maps / "a.png")
    result = infexport("run-engine", bundle, *arguments, "--heatmaps", maps, exit_code=2)
    assert "the heat map would replace an input" in result.stderr
    assert "choose another --heatmaps folder" in result.stderr
    assert not result.stdout
    assert contents(images) == before


def test_a_map_replaces_no_other_picture_but_maps(infexport, bundle, images, tmp_path):
    maps = tmp_path / "maps"
    maps.mkdir()
    shutil.copy(DIGITS[5], maps / "b.png")
    result = infexport("run-engine", bundle, images, "--heatmaps", maps, exit_code=2)
    assert "the heat map would replace another kind of file" in result.stderr
    (maps / "b.png").unlink()
    for _ in range(2):  # a map is replaced by the next one
        infexport("run-engine", bundle, images, "--heatmaps", maps)
    assert sorted(contents(maps)) == ["a.png", "b-2.png", "b.png"]


def test_maps_among_images_are_no_images_the_next_time(infexport, bundle, images):
    (images / "b.png").unlink()
    (images / "a.png").rename(images / "a.webp")
    Image.open(DIGITS[0]).save(images / "a.webp")
    first = json.loads(infexport("run-engine", bundle, images, "--heatmaps", images, "--json").stdout)
    assert sorted(contents(images)) == ["a.png", "a.webp", "b.jpg", "b.png"]
    for arguments in ([images], sorted(images.iterdir())):
        result = infexport("run-engine", bundle, *arguments, "--json")
        assert json.loads(result.stdout)["images"] == first["images"]
        assert "left out 2 heat maps that infexport drew" in result.stderr
    told = infexport("run-engine", bundle, images / "a.png", exit_code=2).stderr
    assert "no images, only heat maps" in told


@pytest.mark.parametrize("name", ["labels.json", "stream/out.csv", "out.npz"])
def test_nothing_is_written_into_a_bundle(name, infexport, bundle, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(bundle, other)
    (tmp_path / "link").symlink_to(other)
    for folder in (other, tmp_path / "link"):
        for options in (("-o", folder / name), ("--heatmaps", folder / "maps"), ("--heatmaps", folder)):
            result = infexport("run-engine", bundle, DIGITS[0], *options, exit_code=2)
            assert "is inside a bundle" in result.stderr
    assert open_bundle(other).verified
    assert contents(other).keys() == contents(bundle).keys()


def test_no_command_writes_into_a_bundle(infexport, bundle, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(bundle, other)
    table = tmp_path / "data.csv"
    table.write_text(f"file,label\n{DIGITS[0]},1\n")
    told = infexport("validate", "parity", bundle, "--report", other / "report.html", exit_code=2).stderr
    assert "the report is inside a bundle" in told
    told = infexport("validate", "accuracy", bundle, table, "--no-pytorch", "-o", other / "a.csv", exit_code=2).stderr
    assert "the output is inside a bundle" in told
    assert "is inside a bundle" in infexport("benchmark", bundle, "--plot", other / "a.png", exit_code=2).stderr
    checkpoint = ("convert", "checkpoint", ZOO / "digits-linear", "-o", other / "inner")
    assert "is inside a bundle" in infexport(*checkpoint, exit_code=2).stderr
    triton = ("package", "triton", bundle, "-o", other / "repository")
    assert "is inside a bundle" in infexport(*triton, exit_code=2).stderr
    assert open_bundle(other).verified


def test_a_table_of_classes_is_not_replaced(infexport, bundle, tmp_path):
    table = tmp_path / "data.csv"
    shutil.copy(DIGITS[0], tmp_path / "a.png")
    table.write_text("file,label\na.png,1\n")
    told = infexport("validate", "accuracy", bundle, table, "--no-pytorch", "-o", table, exit_code=2).stderr
    assert "the output would replace an input" in told
    assert table.read_text() == "file,label\na.png,1\n"


def test_a_link_is_written_through_and_a_mode_is_kept(infexport, bundle, tmp_path):
    target = tmp_path / "elsewhere" / "private.json"
    target.parent.mkdir()
    target.write_text("")
    target.chmod(0o600)
    (tmp_path / "out.json").symlink_to(target)
    infexport("run-engine", bundle, DIGITS[0], "-o", tmp_path / "out.json")
    assert (tmp_path / "out.json").is_symlink()
    assert json.loads(target.read_text())["images"][0]["index"] == 0
    assert target.stat().st_mode & 0o777 == 0o600
    assert [file.name for file in target.parent.iterdir()] == ["private.json"]


@pytest.mark.parametrize("there", ["pipe", "link to a socket", "folder of the maps", "long name"])
def test_a_place_for_no_file_is_refused_before_the_work(there, infexport, bundle, tmp_path):
    """A pipe or a device would be replaced by a file, such as /dev/null through a link when run as root."""
    output, more = tmp_path / "out.json", ()
    if there == "pipe":
        os.mkfifo(output)
    elif there == "link to a socket":
        socket.socket(socket.AF_UNIX).bind(os.path.relpath(tmp_path / "socket"))  # names of sockets must be short
        output.symlink_to(tmp_path / "socket")
    elif there == "folder of the maps":
        more = ("--heatmaps", output)
    else:
        output = output.with_name(f"{'x' * 260}.json")
    result = infexport("run-engine", bundle, DIGITS[0], "-o", output, *more, exit_code=2)
    assert "the output" in result.stderr
    assert not result.stdout
    with suppress(OSError):  # the name is too long
        assert not output.is_file()


@pytest.mark.parametrize("there", ["folder", "pipe", "link that leads nowhere"])
def test_a_map_replaces_only_maps(there, infexport, bundle, tmp_path):
    picture = tmp_path / "maps" / DIGITS[0].name
    picture.parent.mkdir()
    if there == "folder":
        picture.mkdir()
    elif there == "pipe":
        os.mkfifo(picture)
    else:
        picture.symlink_to(tmp_path / "elsewhere.png")
    result = infexport("run-engine", bundle, DIGITS[0], "--heatmaps", picture.parent, exit_code=2)
    assert "the heat map would replace another kind of file" in result.stderr
    assert not result.stdout
    assert not (tmp_path / "elsewhere.png").exists()


@pytest.mark.parametrize("inner", ["", "tokens"])
def test_a_scratch_folder_is_in_no_bundle(inner, infexport, bundle, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(bundle, other)
    (tmp_path / "link").symlink_to(other)
    for folder in (other / inner, tmp_path / "link" / inner):
        told = infexport("run-engine", bundle, DIGITS[0], "--scratch", folder, exit_code=2).stderr
        assert "the scratch folder is inside a bundle" in told
        with pytest.raises(InfexportError, match="the scratch folder is inside a bundle"):
            Predictor(bundle, scratch=folder).predict([DIGITS[0]])
    assert contents(other).keys() == contents(bundle).keys()


@pytest.mark.parametrize("suffix", [".CSV", ".Npz", ".JSON", ".PARQUET"])
def test_a_suffix_may_be_written_in_capitals(suffix, infexport, bundle, tmp_path):
    infexport("run-engine", bundle, DIGITS[0], "-o", tmp_path / f"out{suffix}")
    assert (tmp_path / f"out{suffix}").stat().st_size


@pytest.fixture
def full_disk(monkeypatch):
    """Function that makes writing to a folder fail as on a full disk."""

    def fill(folder):
        partial = files.partial_folder

        @contextmanager
        def none(parent):
            if parent == folder:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(parent))
            with partial(parent) as made:
                yield made

        monkeypatch.setattr(files, "partial_folder", none)

    return fill


@pytest.mark.parametrize("suffix", ["json", "csv", "npz", "parquet"])
def test_a_full_disk_in_the_end_loses_no_answer(suffix, infexport, bundle, tmp_path, full_disk, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "elsewhere"))
    (tmp_path / "elsewhere").mkdir()
    full_disk(tmp_path)
    result = infexport("run-engine", bundle, *DIGITS[:2], "-o", tmp_path / f"out.{suffix}", exit_code=2)
    assert result.stdout.count("%") >= 10
    assert "No space left on device" in result.stderr
    (kept,) = (tmp_path / "elsewhere").glob("infexport-kept-*")
    assert f"the predictions are in {kept / f'out.{suffix}'}" in result.stderr
    assert (kept / f"out.{suffix}").stat().st_size
    full_disk(kept.parent)
    result = infexport("run-engine", bundle, DIGITS[0], "-o", tmp_path / f"out.{suffix}", "--json", exit_code=2)
    assert len(json.loads(result.stdout)["images"]) == 1


def test_a_full_disk_while_centrality_is_written(infexport, bundle, tmp_path, monkeypatch):
    from infexport.outputs import results

    write = results._write_array

    def full(archive, name, values):
        if name == "centrality_1":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(archive, name, values)

    monkeypatch.setattr(results, "_write_array", full)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "elsewhere"))
    (tmp_path / "elsewhere").mkdir()
    out = tmp_path / "out.npz"
    result = infexport("run-engine", bundle, *DIGITS[:3], "--centrality", "-o", out, exit_code=2)
    assert result.stdout.count("%") >= 15
    assert "the predictions without centrality are in" in result.stderr
    (kept,) = (tmp_path / "elsewhere").glob("*/out.npz")
    with np.load(kept) as arrays:
        assert arrays["logits"].shape == (3, 10)
    assert [file.name for file in tmp_path.iterdir()] == ["elsewhere"]


def test_a_drawing_that_fails_loses_no_answer(infexport, bundle, images, tmp_path, monkeypatch):
    figure = heatmaps.draw_figure

    def fail(centrality, pixels, image, extent, title, detail):
        if title.startswith("a:"):
            raise RuntimeError("the library's own")
        return figure(centrality, pixels, image, extent, title, detail)

    monkeypatch.setattr(heatmaps, "draw_figure", fail)
    options = ("--heatmaps", tmp_path / "maps", "-o", tmp_path / "out.csv")
    result = infexport("run-engine", bundle, images, *options, exit_code=1)
    assert "cannot draw the heat map" in result.stderr
    assert "RuntimeError: the library's own" in result.stderr
    assert "wrote 2 heat maps" in result.stderr
    with (tmp_path / "out.csv").open(newline="") as file:
        assert [bool(row["label_1"]) for row in csv.DictReader(file)] == [True] * 3


def test_signs_that_a_font_has_not_are_no_error(infexport, bundle, tmp_path):
    shutil.copy(DIGITS[0], tmp_path / "猫 \U0001f408.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        infexport("run-engine", bundle, tmp_path / "猫 \U0001f408.png", "--heatmaps", tmp_path / "maps")
    assert len(list((tmp_path / "maps").iterdir())) == 1


def test_every_entry_has_its_index(infexport, bundle, tmp_path):
    (tmp_path / "bad.png").write_text("no image")
    result = infexport("run-engine", bundle, DIGITS[0], tmp_path / "bad.png", DIGITS[1], "--json", exit_code=1)
    document = json.loads(result.stdout)
    assert [image["index"] for image in document["images"]] == [0, 2]
    assert [failure["index"] for failure in document["failed"]] == [1]


def test_the_place_of_a_kept_copy_is_a_path(tmp_path):
    assert files.local_path("file:///a/b.png") == Path("/a/b.png")
    assert files.local_path("s3://a/b.png") is None
    assert files.local_path("a/b.png") == Path("a/b.png")


def test_a_plot_or_a_page_that_fails_loses_no_answer(infexport, bundle, tmp_path, monkeypatch):
    from infexport.evaluation.benchmark import plots
    from infexport.evaluation.report import page

    def fail(*arguments, **more):
        raise RuntimeError("the library's own")

    monkeypatch.setattr(plots, "_scaling", fail)
    monkeypatch.setattr(page, "page", fail)
    plot = ("--sizes", 64, "--repeats", 1, "--plot", tmp_path / "plot.png", "--json")
    report = ("--sizes", 64, "--report", tmp_path / "report.html", "--json")
    for command, kind in (
        (("benchmark", bundle, *plot), "picture"),
        (("validate", "parity", bundle, *report), "report"),
    ):
        result = infexport(*command, exit_code=2)
        assert json.loads(result.stdout)
        assert f"cannot draw the {kind}" in result.stderr
        assert "RuntimeError: the library's own" in result.stderr
    assert not list(tmp_path.iterdir())


def test_a_full_disk_loses_no_accuracy(infexport, bundle, tmp_path, full_disk):
    table = tmp_path / "data.csv"
    table.write_text(f"file,label\n{DIGITS[0]},{DIGITS[0].name[0]}\n")
    (tmp_path / "out").mkdir()
    full_disk(tmp_path / "out")
    words = ("validate", "accuracy", bundle, table, "--no-pytorch", "-o", tmp_path / "out" / "a.csv", "--json")
    result = infexport(*words, exit_code=2)
    assert json.loads(result.stdout)["top1"]["share"] == 1
    assert "No space left on device" in result.stderr
