"""`run-engine --heatmaps` and `--centrality`: pictures agree with the numbers, whole and streamed."""

import csv
import io
import json
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from matplotlib import colormaps
from PIL import Image
from support import ZOO, relative_error

from infexport.bundle.integrity import sealed
from infexport.evaluation.synthetic_images import synthetic_image
from infexport.images.transform import EvalTransform
from infexport.inference import centrality
from infexport.inference.centrality import Centrality
from infexport.outputs import heatmaps

HELD_OUT = ZOO / "canvases-held-out"
DIGITS = {row["file"]: row for row in csv.DictReader((HELD_OUT / "canvases.csv").open())}
NATIVE = ("--size", "native", "--top-k", 1)


def panel(figure, axes):
    """Return left, top, right and bottom of a figure's axes, in pixels of its PNG."""
    figure.draw_without_rendering()
    box = axes.get_window_extent()
    height = figure.bbox.height
    return box.x0, height - box.y1, box.x1, height - box.y0


def hottest(picture, box, image):
    """Return y and x, in pixels of the image, where a map's colour is nearest the top of its scale."""
    left, top, right, bottom = (round(x) for x in box)
    colours = np.asarray(picture.convert("RGB"), float)[top + 2 : bottom - 2, left + 2 : right - 2] / 255
    # blended with grey by 0.6 and 0.4, so that the hue is the map's
    hot, cold = (np.array(colormaps[heatmaps.COLOURS](x)[:3]) for x in (1.0, 0.0))
    grey = np.linspace(0, 1, 32)[:, None]
    far = np.abs(colours[:, :, None] - (0.6 * hot + 0.4 * grey)).sum(-1).min(-1)
    assert np.abs(0.6 * hot - 0.6 * cold).sum() > 0.3
    y, x = np.unravel_index(far.argmin(), far.shape)
    return y / far.shape[0] * image[0], x / far.shape[1] * image[1]


@pytest.mark.parametrize("execution", ["whole", "stream"])
@pytest.mark.parametrize("name", ["linear", "pure"])
def test_the_brightest_place_is_the_digit_s(name, execution, infexport, zoo_bundle, tmp_path):
    file = next(file for file in DIGITS if file.startswith("128/"))
    digit = DIGITS[file]
    top, left, side = (int(digit[key]) for key in ("top", "left", "size"))
    options = ("--heatmaps", tmp_path / "maps", "--centrality", "-o", tmp_path / "out.npz", "--execution", execution)
    infexport("run-engine", zoo_bundle(f"canvases-{name}"), HELD_OUT / file, *NATIVE, *options)
    with np.load(tmp_path / "out.npz") as arrays:
        cells, of_class = arrays["centrality_0"], arrays["centrality_class_token_0"]
        assert arrays["centrality_step"].tolist() == [1]
    assert cells.shape == (4, 4, 16, 16)
    shares = cells / (cells.sum((-2, -1)) + of_class)[..., None, None]
    mean = shares.mean((0, 1))
    row, column = np.unravel_index(mean.argmax(), mean.shape)
    assert top <= 8 * row < top + side
    assert left <= 8 * column < left + side
    assert mean[top // 8 : top // 8 + 3, left // 8 : left // 8 + 3].sum() > 10 * 9 / 256
    picture = Image.open(tmp_path / "maps" / f"{file.rpartition('/')[2]}")
    # draw the same figure again to find its panels
    pixels, image = heatmaps.overview(HELD_OUT / file)
    figure = heatmaps.draw_figure(Centrality(cells, of_class, (16, 16), 1), pixels, image, (0, 128, 128, 0), "title")
    y, x = hottest(picture, panel(figure, figure.axes[1]), image)
    assert 8 * row - 1 <= y <= 8 * row + 9
    assert 8 * column - 1 <= x <= 8 * column + 9


def test_cells_are_drawn_where_their_patches_are(infexport, zoo_bundle, tmp_path, monkeypatch):
    """Picture and npz of an image whose grid is not a multiple of the step: 16 patches in 6 cells of 3."""
    monkeypatch.setattr(centrality, "MOST_NUMBERS", 4 * 4 * 6 * 6)
    file = max((file for file in DIGITS if file.startswith("128/")), key=lambda file: int(DIGITS[file]["left"]))
    options = ("--heatmaps", tmp_path / "maps", "--centrality", "-o", tmp_path / "out.npz", "--execution", "stream")
    infexport("run-engine", zoo_bundle("canvases-linear"), HELD_OUT / file, *NATIVE, *options)
    with np.load(tmp_path / "out.npz") as arrays:
        cells, of_class, (step,) = (arrays[f"centrality_{name}"] for name in ("0", "class_token_0", "step"))
        grid = tuple(arrays["centrality_grid"][0])
    assert (step, grid, cells.shape) == (3, (16, 16), (4, 4, 6, 6))
    found = Centrality(cells, of_class, grid, int(step))
    times = found.times_average(found.shares.mean((0, 1)))
    row, column = np.unravel_index(times.argmax(), times.shape)
    digit = DIGITS[file]
    assert int(digit["left"]) - 24 < 24 * column < int(digit["left"]) + 24
    pixels, image = heatmaps.overview(HELD_OUT / file)
    figure = heatmaps.draw_figure(found, pixels, image, (0, 128, 128, 0), "title")
    picture = Image.open(tmp_path / "maps" / file.rpartition("/")[2])
    y, x = hottest(picture, panel(figure, figure.axes[1]), image)
    assert 24 * row - 1 <= y <= min(24 * row + 25, 128)
    assert 24 * column - 1 <= x <= min(24 * column + 25, 128)


@pytest.mark.parametrize(
    ("grid", "step", "hot"),
    [((10, 10), 4, (9, 9)), ((7, 31), 1, (3, 24)), ((401, 390), 1, (300, 95)), ((101, 250), 40, (90, 245))],
    ids=str,
)
def test_a_hot_cell_is_seen_in_the_picture(grid, step, hot):
    cells = np.zeros((1, 1, *(-(-side // step) for side in grid)), np.float32)
    cells[(0, 0, *(at // step for at in hot))] = 1
    image = 8 * grid[0], 8 * grid[1]
    found = Centrality(cells, np.zeros((1, 1), np.float32), grid, step)
    figure = heatmaps.draw_figure(found, np.full((8, 8, 3), 100, np.uint8), image, (0, image[1], image[0], 0), "title")
    box, content = panel(figure, figure.axes[1]), io.BytesIO()
    figure.savefig(content)
    drawn = zip(hottest(Image.open(content), box, image), hot, grid, strict=True)
    for at, patch, side in drawn:
        first, last = patch // step * step, min((patch // step + 1) * step, side)
        assert first - 0.02 * side <= at / 8 <= last + 0.02 * side, (at / 8, first, last)


@pytest.mark.parametrize("image", [(16, 320_000), (320_000, 16)], ids=str)
def test_a_map_of_any_aspect_can_be_seen(image):
    grid = image[0] // 16, image[1] // 16
    cells = np.zeros((1, 1, *grid), np.float32)
    cells.reshape(-1)[15_000] = 1
    pixels = np.full((max(1, image[0] // 320), max(1, image[1] // 320), 3), 100, np.uint8)
    found = Centrality(cells, np.zeros((1, 1), np.float32), grid, 1)
    figure = heatmaps.draw_figure(found, pixels, image, (0, image[1], image[0], 0), "title")
    for axes in figure.axes[:2]:
        left, top, right, bottom = panel(figure, axes)
        assert min(right - left, bottom - top) >= 40
        assert axes.get_xlabel() == f"not to scale: the image is {image[1]} x {image[0]} pixels"
    box, content = panel(figure, figure.axes[1]), io.BytesIO()
    figure.savefig(content)
    where = np.divide(hottest(Image.open(content), box, image), image)
    assert where.max() == pytest.approx(0.75, abs=0.01)


def test_a_narrow_image_lies_below_its_map_where_it_is(tmp_path, monkeypatch):
    """30 pixels are averaged to 2: 15 and 15, not 20 and 10."""
    image = np.zeros((400, 30, 3), np.uint8)
    image[:, 15:] = 200
    Image.fromarray(image).save(tmp_path / "image.png")
    monkeypatch.setattr(heatmaps, "OVERVIEW", 20)
    pixels, size = heatmaps.overview(tmp_path / "image.png")
    assert size == (400, 30)
    assert pixels[..., 0].tolist() == [[0, 200]] * 20


def test_streamed_or_whole_the_numbers_are_the_same(infexport, zoo_bundle, tmp_path):
    Image.fromarray(synthetic_image(100, 133)).save(tmp_path / "image.png")
    found = []
    for options in (("--execution", "whole"), ("--execution", "stream", "--chunk", 37),
                    ("--scratch", tmp_path / "scratch", "--tokens", "float16")):  # fmt: skip
        infexport("run-engine", zoo_bundle("canvases-pure"), tmp_path / "image.png", *NATIVE, "--centrality", *options,
                  "-o", tmp_path / "out.npz")  # fmt: skip
        with np.load(tmp_path / "out.npz") as arrays:
            found.append(arrays["centrality_0"])
    assert found[0].shape == (4, 4, 13, 17)
    assert relative_error(found[1], found[0]) <= 1e-5
    assert 1e-6 < relative_error(found[2], found[0]) <= 1e-2
    assert not list((tmp_path / "scratch").iterdir())


@pytest.mark.parametrize(("detail", "panels"), [("mean", 2), ("layers", 4), ("heads", 16)])
def test_details(detail, panels, infexport, zoo_bundle, tmp_path, monkeypatch):
    seen, save = [], heatmaps.save

    def look(figure, file):
        seen.append(len([axes for axes in figure.axes if axes.images and axes.get_label() != "<colorbar>"]))
        save(figure, file)

    monkeypatch.setattr(heatmaps, "save", look)
    file = next(file for file in DIGITS if file.startswith("64/"))
    infexport("run-engine", zoo_bundle("canvases-linear"), HELD_OUT / file, *NATIVE, "--heatmaps", tmp_path,
              "--heatmap-detail", detail)  # fmt: skip
    assert seen == [panels]
    assert (tmp_path / file.rpartition("/")[2]).stat().st_size > 10_000


def test_a_picture_keeps_its_image_s_aspect(infexport, zoo_bundle, tmp_path):
    Image.fromarray(synthetic_image(60, 240)).save(tmp_path / "wide.png")
    infexport("run-engine", zoo_bundle("canvases-linear"), tmp_path / "wide.png", "--heatmaps", tmp_path / "maps")
    figure = heatmaps.draw_figure(
        Centrality(np.ones((1, 1, 8, 8), np.float32), np.zeros((1, 1), np.float32), (8, 8), 1),
        *heatmaps.overview(tmp_path / "wide.png"), (0, 240, 60, 0), "title",
    )  # fmt: skip
    for axes in figure.axes[:2]:
        left, top, right, bottom = panel(figure, axes)
        assert (right - left) / (bottom - top) == pytest.approx(4, rel=0.02)
    width, height = Image.open(tmp_path / "maps" / "wide.png").size
    assert width > 2 * height


def test_images_of_one_name_have_a_picture_each(infexport, zoo_bundle, tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        shutil.copy(HELD_OUT / next(iter(DIGITS)), tmp_path / folder / "scan.png")
    infexport(
        "run-engine", zoo_bundle("canvases-linear"), tmp_path / "a", tmp_path / "b", "--heatmaps", tmp_path / "maps"
    )
    assert sorted(path.name for path in (tmp_path / "maps").iterdir()) == ["scan-2.png", "scan.png"]


def test_names_are_never_taken_twice():
    files = [Path(name) for name in ("x/a.png", "y/a.png", "a-2.png", "z/a.tif", "b.png")]
    assert heatmaps.file_names(files) == ["a", "a-2", "a-2-2", "a-3", "b"]


@pytest.mark.parametrize("name", [b"$_$.png", b"sur\xff.png"])
def test_any_name_has_a_picture(name, infexport, zoo_bundle, tmp_path):
    file = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
    shutil.copy(HELD_OUT / next(iter(DIGITS)), file)
    infexport("run-engine", zoo_bundle("canvases-linear"), tmp_path, "--heatmaps", tmp_path / "maps")
    assert [path.name for path in (tmp_path / "maps").iterdir()] == [file.name]


def test_a_map_of_an_image_in_an_archive_has_the_image_s_name(infexport, zoo_bundle, tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for name in ("first.png", "in/second.png"):
            archive.write(HELD_OUT / next(iter(DIGITS)), name)
    titles = []
    draw_figure = heatmaps.draw_figure
    monkeypatch.setattr(heatmaps, "draw_figure", lambda *given: titles.append(given[4]) or draw_figure(*given))
    urls = [f"zip://{name}::file://{tmp_path}/all.zip" for name in ("first.png", "in/second.png")]
    infexport("run-engine", zoo_bundle("canvases-linear"), *urls, "--heatmaps", tmp_path / "maps")
    assert sorted(path.name for path in (tmp_path / "maps").iterdir()) == ["first.png", "second.png"]
    assert [title.partition(":")[0] for title in titles] == ["first", "second"]


def test_a_picture_that_cannot_be_written_loses_no_answer(infexport, zoo_bundle, tmp_path):
    images = [tmp_path / folder / f"{'a' * 251}.png" for folder in ("a", "b")]  # "-2" makes the second too long
    for image in images:
        image.parent.mkdir()
        shutil.copy(HELD_OUT / next(iter(DIGITS)), image)
    options = ("--heatmaps", tmp_path / "maps", "-o", tmp_path / "out.csv")
    result = infexport("run-engine", zoo_bundle("canvases-linear"), *images, *options, exit_code=1)
    assert "cannot write the heat map" in result.stderr
    assert "wrote 1 heat maps" in result.stderr
    assert len((tmp_path / "out.csv").read_text().splitlines()) == 3
    assert (tmp_path / "maps" / images[0].name).is_file()
    (tmp_path / "file").write_text("")
    result = infexport("run-engine", zoo_bundle("canvases-linear"), *images, "--heatmaps", tmp_path / "file" / "maps",
                       exit_code=2)  # fmt: skip
    assert "heat map" in result.stderr


def test_many_images_in_one_file(infexport, zoo_bundle, tmp_path):
    files = [HELD_OUT / file for file in DIGITS if file.startswith(("64/0", "64/1", "128/0"))]
    output = tmp_path / "out.npz"
    infexport("run-engine", zoo_bundle("canvases-linear"), *files, *NATIVE, "--centrality", "-o", output)
    with np.load(output) as arrays:
        assert [arrays[f"centrality_{i}"].shape[-1] for i in range(3)] == [8, 8, 16]
        assert "centrality_3" not in arrays


def test_an_overview_is_an_average(tmp_path, monkeypatch):
    image = synthetic_image(103, 150)
    Image.fromarray(image).save(tmp_path / "image.png")
    monkeypatch.setattr(heatmaps, "OVERVIEW", 40)
    pixels, size = heatmaps.overview(tmp_path / "image.png")
    assert size == (103, 150)
    assert pixels.shape == (26, 38, 3)
    # equal parts, to a pixel: 103 / 26 and 150 / 38
    assert np.abs(pixels[3, 5] - image[11:15, 19:23].mean((0, 1))).max() <= 1
    assert np.abs(pixels[-1, -1] - image[99:, 146:].mean((0, 1))).max() <= 1


def test_where_a_grid_lies():
    shortest = EvalTransform("shortest", 256, 224, "bicubic")
    exact = EvalTransform("exact", 32, 32, "bicubic")
    # 512 x 1024 becomes 256 x 512, of which the centre crop of 224 is used
    assert heatmaps.region((512, 1024), (14, 14), 16, "trained", shortest) == (288, 736, 480, 32)
    assert heatmaps.region((60, 240), (4, 4), 8, "trained", exact) == (0, 240, 60, 0)
    # padded, it reaches beyond the image
    assert heatmaps.region((100, 133), (13, 17), 8, "native", exact) == (0, 136, 104, 0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--centrality",), "--output FILE.npz"),
        (("--centrality", "-o", "out.csv"), "--output FILE.npz"),
        (("--heatmap-detail", "pixels", "--heatmaps", "maps"), "'mean', 'layers', 'heads'"),
        (("--heatmap-detail", "layers"), "--heatmaps DIR"),
    ],
)
def test_wrong_usage(arguments, words, infexport, zoo_bundle):
    assert words in infexport("run-engine", zoo_bundle("canvases-linear"), HELD_OUT, *arguments, exit_code=2).stderr


def test_a_bundle_of_before_says_what_to_do(infexport, zoo_bundle, tmp_path):
    shutil.copytree(zoo_bundle("canvases-linear"), tmp_path / "b")
    manifest = json.loads((tmp_path / "b" / "infexport.json").read_text())
    del manifest["files"]["centrality.onnx"]
    (tmp_path / "b" / "infexport.json").write_bytes(sealed(manifest))
    (tmp_path / "b" / "centrality.onnx").unlink()
    image = HELD_OUT / next(iter(DIGITS))
    result = infexport("run-engine", tmp_path / "b", image, "--heatmaps", tmp_path / "maps", exit_code=2)
    assert "this bundle does not give centrality" in result.stderr
    infexport("run-engine", tmp_path / "b", image)
