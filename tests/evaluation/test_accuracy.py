"""How often answers are right: intervals, ranks, confusions, agreement; and what says which class an image is of."""

from __future__ import annotations

import math
import os

import numpy as np
import pytest
from PIL import Image

from infexport.errors import InfexportError
from infexport.evaluation.accuracy.dataset import Classes, Labelled, read_labelled
from infexport.evaluation.accuracy.metrics import accuracy, agreement, wilson

CLASSES = Classes(4, ["cat", "dog", "1", "dog house"])


@pytest.mark.parametrize(
    ("right", "total"), [(10, 10), (0, 10), (1, 1), (446, 450), (225, 450), (0, 1), (49_999, 50_000)]
)
def test_intervals_are_scipys(right, total):
    stats = pytest.importorskip("scipy.stats")
    truth = stats.binomtest(right, total).proportion_ci(0.95, "wilson")
    assert wilson(right, total) == pytest.approx((truth.low, truth.high), abs=1e-12)


def test_intervals_end_where_shares_do():
    assert wilson(10, 10) == (pytest.approx(0.72247, abs=1e-5), 1.0)
    assert wilson(0, 10) == (0.0, pytest.approx(0.27753, abs=1e-5))
    assert wilson(0, 0) == (0.0, 1.0)


def test_the_likeliest_class_and_the_five_likeliest():
    logits = np.array([[7, 6, 5, 4, 3, 2, 1.0]] * 7)
    found = accuracy(logits, np.arange(7))
    assert (found.top1.count, found.top1.total) == (1, 7)
    assert found.top5 is not None
    assert (found.top5.count, found.top5.total) == (5, 7)
    assert accuracy(logits[:, :5], np.arange(5).repeat(2)[:7]).top5 is None


def test_of_equal_logits_the_first_class_is_the_answer():
    found = accuracy(np.zeros((3, 6)), np.array([0, 4, 5]))
    assert found.top1.count == 1
    assert found.top5 is not None
    assert found.top5.count == 2


def test_every_class_and_what_it_is_taken_for():
    answers, labels = np.array([0, 2, 2, 1, 3, 3]), np.array([0, 0, 0, 0, 3, 3])
    cats, houses = accuracy(np.eye(4)[answers], labels).classes
    assert (cats.index, cats.right.count, cats.right.total, cats.confused, cats.times) == (0, 1, 4, 2, 2)
    assert (houses.index, houses.right.share, houses.confused, houses.times) == (3, 1.0, None, 0)


def test_no_images_are_no_share():
    found = accuracy(np.zeros((0, 4)), np.zeros(0, int))
    assert math.isnan(found.top1.share)
    assert found.classes == ()
    assert agreement(np.zeros((0, 4)), np.zeros((0, 4))).largest_difference == 0


def test_agreement():
    ours, theirs = np.array([[3.0, 4], [1, 0], [0, 1]]), np.array([[3.0, 4], [0, 1], [0, 2]])
    found = agreement(ours, theirs)
    assert (found.same.count, found.same.total, found.disagreeing) == (2, 3, (1,))
    assert found.largest_difference == pytest.approx(math.sqrt(2))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("classes", [1, 3, 7])
def test_a_row_with_a_logit_that_is_not_finite_is_never_right(bad, classes):
    logits = np.tile(np.arange(classes, 0, -1.0), (classes, 1))
    logits[np.arange(classes), np.arange(classes)] = bad  # of the image's own class
    logits = np.concatenate([logits, np.full((classes, classes), bad)])
    found = accuracy(logits, np.tile(np.arange(classes), 2))
    assert (found.top1.count, found.top1.total) == (0, 2 * classes)
    assert found.top5 is None or found.top5.count == 0
    assert [(one.right.count, one.right.total, one.confused) for one in found.classes] == [(0, 2, None)] * classes


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_no_answer_agrees_with_one_that_is_not_finite(bad):
    fine, wrong = np.ones((1, 3)), np.array([[1, bad, 1]])
    for ours, theirs in ((fine, wrong), (wrong, fine), (wrong, wrong)):
        found = agreement(np.concatenate([fine, ours]), np.concatenate([fine, theirs]))
        assert (found.same.count, found.disagreeing, found.largest_difference) == (1, (1,), math.inf)


def test_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"labels \(3,\)"):
        accuracy(np.zeros((2, 4)), np.zeros(3, int))
    with pytest.raises(ValueError, match="the others"):
        agreement(np.zeros((2, 4)), np.zeros((2, 5)))


def images(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(folder / name)


def test_folders_named_by_labels_and_files_at_any_depth(tmp_path):
    images(tmp_path, "1/a.png", "dog house/b.png", "cat/deep/c.png", ".hidden/d.png")
    (tmp_path / "notes.txt").write_text("not looked at")
    found = read_labelled(tmp_path, CLASSES)
    assert found == [
        Labelled(tmp_path / "1" / "a.png", 2),
        Labelled(tmp_path / "cat" / "deep" / "c.png", 0),
        Labelled(tmp_path / "dog house" / "b.png", 3),
    ]


@pytest.mark.parametrize(
    ("labels", "names", "told"),
    [
        (["cat", "dog", "1", "dog house"], ["3", "cat"], "as labels: cat is class 0\nas indices: 3 is class 3"),
        (["cat", "dog", "1", "dog house"], ["0", "1"], "as labels: 1 is class 2\nas indices: 0 is class 0"),
        ([*"abc", "7", *"defgh"], ["3", "7"], "as labels: 7 is class 3\nas indices: 3 is class 3"),
        (["crane", "cat", "crane"], ["1", "crane"], "as labels: crane is class 0 or 2"),
        (None, ["3", "03", "1"], "one class"),
    ],
)
def test_folders_are_named_in_one_way_and_no_two_are_one_class(labels, names, told, tmp_path):
    images(tmp_path, *(f"{name}/a.png" for name in names))
    assert told in refused(tmp_path, Classes(10 if labels is None else len(labels), labels))


@pytest.mark.parametrize(
    ("labels", "names", "indices"),
    [
        (["cat", "dog", "1", "dog house"], ["1", "cat"], [2, 0]),
        (["x", "y", "z"], ["0", "2"], [0, 2]),
        (None, ["0", "2"], [0, 2]),
        (["0", "1", "10", "2"], ["1", "10", "2"], [1, 2, 3]),
        (["0", "1", "cat"], ["0", "2"], [0, 2]),
    ],
)
def test_the_same_names_mean_the_same_as_folders_and_in_a_table(labels, names, indices, tmp_path):
    images(tmp_path, *(f"{name}/a.png" for name in names))
    classes = Classes(4 if labels is None else len(labels), labels)
    assert [image.label for image in read_labelled(tmp_path, classes)] == indices
    table = tmp_path / "table.csv"
    table.write_text("file,label\n" + "".join(f"{name}/a.png,{name}\n" for name in names))
    assert [image.label for image in read_labelled(table, classes)] == indices


def test_two_folders_that_are_one(tmp_path):
    images(tmp_path, "cat/a.png")
    (tmp_path / "dog").symlink_to(tmp_path / "cat")
    assert "cat and dog" in refused(tmp_path)


def test_a_csv_file(tmp_path):
    table = tmp_path / "table.CSV"
    table.write_bytes(b'\xef\xbb\xbffile, top, label,,\r\na.png, 8, dog house\r\n"b/c,\r\nd.png", 16, cat\r\n')
    assert read_labelled(table, CLASSES) == [
        Labelled(tmp_path / "a.png", 3), Labelled(tmp_path / "b" / "c,\r\nd.png", 0)
    ]  # fmt: skip


def refused(path, classes=CLASSES):
    with pytest.raises(InfexportError) as caught:
        read_labelled(path, classes)
    return f"{caught.value.summary}\n{caught.value.details}\n{caught.value.hint}"


def test_folders_that_are_no_classes(tmp_path):
    images(tmp_path, "cat/a.png", "bird/b.png", "4/c.png")
    told = refused(tmp_path)
    assert "4, bird\n" in told
    assert "its classes: cat, dog, 1, dog house" in told
    assert "and 980 more" in refused(tmp_path, Classes(1000, None))


def test_folders_without_images_or_classes(tmp_path):
    assert "there is nothing of this name" in refused(tmp_path / "none")
    assert "no class folders" in refused(tmp_path)
    (tmp_path / "cat").mkdir()
    assert "no images in folder" in refused(tmp_path)
    images(tmp_path, "cat/a.png", "b.png")
    assert "in no class folder" in refused(tmp_path)
    assert "expected a folder" in refused(tmp_path / "b.png")


def test_a_label_of_two_classes_is_named_by_its_index(tmp_path):
    images(tmp_path, "crane/a.png")
    assert "crane: 0 or 2" in refused(tmp_path, Classes(3, ["crane", "cat", "crane"]))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "no column file and no column label"),
        ("name,label\na.png,cat\n", "no column file"),
        ("file,class\na.png,cat\n", "its first line has file, class"),
        ("file,label\n", "no images"),
        ("file,label\na.png\nb.png,cat\n,cat\n", "line 2, line 4"),
        ("file,label\na.png,cat\na.png,dog\n", "more than one line"),
        ("file,label\na/b.png,cat\na/./b.png,cat\n", "a/b.png (line 2) and a/./b.png (line 3)"),
        ("file,label\na.png,cat\na/../a.png,dog\n", "a.png (line 2) and a/../a.png (line 3)"),
        ("file,label,label\na.png,cat,dog\n", "more than one column label"),
        ("file,file,label\na.png,b.png,dog\n", "more than one column file"),
        ("file,label\na.png,cat,dog\n", "line 2"),
        ("file,label\na\0.png,cat\n", "NUL"),
        ("file,label\na.png,cat\nb.png,3\n", "as labels: cat (line 2) is class 0\nas indices: 3 (line 3) is class 3"),
        ("file,label\na.png,cat\nb.png,bird\nc.png,4\n", "bird (line 3), 4 (line 4)"),
        ("file,label\na.png," + "9" * 5000 + "\n", "its classes: cat"),
    ],
)
def test_csv_files_that_do_not_say(text, told, tmp_path):
    (tmp_path / "table.csv").write_text(text)
    assert told in refused(tmp_path / "table.csv")


@pytest.mark.parametrize("name", ["dog", "dog.old"])
@pytest.mark.parametrize("target", ["nowhere", "itself"])
def test_a_class_folder_on_a_disk_that_is_not_there_is_told(name, target, tmp_path):
    images(tmp_path, "cat/a.png")
    (tmp_path / name).symlink_to(tmp_path / (name if target == "itself" else target))
    told = refused(tmp_path)
    assert f"cannot open {tmp_path}\n" in told
    assert f": {tmp_path / name}\n" in told


@pytest.mark.parametrize("which", ["", "up/data"])
def test_a_folder_that_may_not_be_read_is_told(which, tmp_path, forbid):
    (tmp_path / "up" / "data").mkdir(parents=True)
    folder = tmp_path / "up" / "data" if which == "up/data" else tmp_path / "data"
    images(folder, "cat/a.png")
    forbid(tmp_path / "up" if which == "up/data" else folder / which)
    assert "Permission denied" in refused(folder)


def test_csv_files_that_cannot_be_read(tmp_path):
    (tmp_path / "table.csv").write_bytes(b"file,label\n\xff\xfe.png,cat\n")
    assert "not a CSV file" in refused(tmp_path / "table.csv")
    assert "cannot open" in refused(tmp_path / "none.csv")
    if os.geteuid():
        (tmp_path / "table.csv").chmod(0)
        assert "Permission denied" in refused(tmp_path / "table.csv")
