"""The way an image is run: the fastest that fits, or a refusal that says what would."""

from __future__ import annotations

from pathlib import Path

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infexport.bundle import open_bundle
from infexport.cli.options import Bytes
from infexport.errors import InfexportError
from infexport.inference import planner
from infexport.inference.options import InferenceOptions
from infexport.inference.planner import WHOLE_TOKENS, Image, choose, estimates, size_text

FOUND = {"whole": 1000, "memory": 100, "disk": 10}
SMALL, LARGE = Image(WHOLE_TOKENS + 1, 1024), Image(WHOLE_TOKENS + 2, 1040)


@pytest.fixture
def bundle(golden_bundle, monkeypatch):
    monkeypatch.setattr(planner, "estimates", lambda bundle, options, image, chunk: FOUND)
    return open_bundle(golden_bundle("torchvision_linear"))


def options(asked="auto", scratch=None, **changes):
    return InferenceOptions(execution=asked, scratch=scratch, **changes)


@pytest.mark.parametrize(
    ("asked", "image", "memory", "expected"),
    [
        ("auto", SMALL, 1000, "whole"),
        ("auto", SMALL, 999, "memory"),
        ("auto", SMALL, 99, "disk"),
        ("auto", LARGE, 10_000, "memory"),
        ("auto", LARGE, 99, "disk"),
        ("stream", SMALL, 10_000, "memory"),
        ("stream", SMALL, 99, "disk"),
        ("whole", LARGE, 1000, "whole"),
    ],
)
def test_the_fastest_that_fits(asked, image, memory, expected, bundle):
    assert choose(bundle, options(asked), image, memory) == expected


@pytest.mark.parametrize("asked", ["auto", "stream"])
def test_a_scratch_folder_is_used(asked, bundle):
    assert choose(bundle, options(asked, Path()), SMALL, 10_000) == "disk"


@pytest.mark.parametrize(("asked", "memory"), [("auto", 9), ("stream", 9), ("whole", 999)])
def test_what_does_not_fit_is_refused(asked, memory, bundle):
    with pytest.raises(InfexportError, match="does not fit") as error:
        choose(bundle, options(asked), LARGE, memory)
    assert "--memory 10B" in error.value.hint
    assert ("and --execution stream with tokens on disk" in error.value.hint) == (asked == "whole")


def test_a_batch_that_does_not_fit_is_named(bundle):
    with pytest.raises(InfexportError, match="a batch of 8 images of 4,097 tokens does not fit into 999B") as error:
        choose(bundle, options("whole", batch_size=8), SMALL, 999)
    assert error.value.details == "--execution whole with --batch-size 8 needs about 1000B"
    assert "or a smaller --batch-size" in error.value.hint
    with pytest.raises(InfexportError, match="an image of 4,097 tokens does not fit into 9B") as error:
        choose(bundle, options("auto", batch_size=8), SMALL, 9)
    assert "--batch-size 8" in error.value.details


@pytest.mark.parametrize(
    ("size", "text"), [(1, "1B"), (100, "100B"), (2048, "2KiB"), (2**20, "1MiB"), (3 * 2**29, "1.5GiB")]
)
def test_amounts_as_people_read_them(size, text):
    assert size_text(size) == text


@pytest.mark.parametrize("name", ["torchvision_linear", "torchvision_pure"])
def test_memory_on_disk_hardly_grows(name, golden_bundle):
    bundle = open_bundle(golden_bundle(name))
    small, large = (estimates(bundle, options(), Image(n, 2048)) for n in (10_000, 10_000_000))
    assert large["disk"] == small["disk"]
    grown = (large["memory"] - small["memory"]) / (10_000_000 - 10_000)
    kept = 1 if name == "torchvision_linear" else 5  # tokens; queries, keys, values and what is mixed besides
    assert grown == pytest.approx(kept * 4 * bundle.manifest.config.embed_dim)
    half = estimates(bundle, options(tokens="float16"), Image(10_000_000, 2048))
    assert half["memory"] < large["memory"]
    assert estimates(bundle, options(batch_size=8), Image(10_000, 2048))["whole"] > 3 * small["whole"]


@given(st.integers(1, 2**45))
def test_sizes_are_read_as_they_are_written(size):
    up = Bytes().convert(size_text(size, up=True), None, None)
    assert size <= up <= max(1.01 * size + 1, size + (2**20 if size >= 2**20 else 2**10))


@pytest.mark.parametrize(
    ("text", "size"), [("1", 1), ("2GiB", 2**31), ("1.5 MB", 1_500_000), ("3kib", 3072), ("2tb", 2 * 10**12)]
)
def test_amounts_of_memory(text, size):
    assert Bytes().convert(text, None, None) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1GB", "1XB", "1e9", "0", "٣GB", "9" * 400])
def test_what_is_no_amount_of_memory(text):
    with pytest.raises(click.BadParameter, match="expected a number and a unit"):
        Bytes().convert(text, None, None)
