"""How often answers are right: intervals, ranks, confusions, agreement; and what says which class an image is of."""

from __future__ import annotations

import math
import os

import numpy as np
import pytest
from PIL import Image

from infexport.accuracy import accuracy, agreement, wilson
from infexport.errors import InfexportError
from infexport.labelled import Classes, Labelled, read_labelled

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


def test_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"labels \(3,\)"):
        accuracy(np.zeros((2, 4)), np.zeros(3, int))
    with pytest.raises(ValueError, match="the others"):
        agreement(np.zeros((2, 4)), np.zeros((2, 5)))


def images(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(folder / name)


def test_a_label_goes_before_an_index(tmp_path):
    images(tmp_path, "1/a.png", "3/b.png", "cat/deep/c.png", ".hidden/d.png")
    (tmp_path / "notes.txt").write_text("not looked at")
    found = read_labelled(tmp_path, CLASSES)
    assert found == [
        Labelled(tmp_path / "1" / "a.png", 2),
        Labelled(tmp_path / "3" / "b.png", 3),
        Labelled(tmp_path / "cat" / "deep" / "c.png", 0),
    ]


def test_a_csv_file(tmp_path):
    table = tmp_path / "table.csv"
    table.write_bytes(b"\xef\xbb\xbffile, top, label\r\na.png, 8, dog house\r\nb/c.png, 16, 0\r\n")
    assert read_labelled(table, CLASSES) == [
        Labelled(tmp_path / "a.png", 3), Labelled(tmp_path / "b" / "c.png", 0)
    ]  # fmt: skip
    assert read_labelled(table, Classes(4, ["x", "y", "0", "dog house"]))[1].label == 2


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
        ("file,label\na.png,cat\nb.png,bird\nc.png,4\n", "bird (line 3), 4 (line 4)"),
        ("file,label\na.png," + "9" * 5000 + "\n", "its classes: cat"),
    ],
)
def test_csv_files_that_do_not_say(text, told, tmp_path):
    (tmp_path / "table.csv").write_text(text)
    assert told in refused(tmp_path / "table.csv")


def test_csv_files_that_cannot_be_read(tmp_path):
    (tmp_path / "table.csv").write_bytes(b"file,label\n\xff\xfe.png,cat\n")
    assert "not a CSV file" in refused(tmp_path / "table.csv")
    assert "cannot open" in refused(tmp_path / "none.csv")
    if os.geteuid():
        (tmp_path / "table.csv").chmod(0)
        assert "Permission denied" in refused(tmp_path / "table.csv")
