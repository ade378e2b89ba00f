"""Centrality as a map: shares, cells, and what the average patch is."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infexport.inference import centrality
from infexport.inference.centrality import Centrality, centrality_from_tokens, map_step, summed
from infexport.outputs.heatmaps import overlay


def in_cells(patches, step):
    """Centrality that a streamed run gives of the values of patches `[rows, columns]`, in one layer and head."""
    cells = [summed(patches[row : row + step, :, None], step)[:, 0] for row in range(0, len(patches), step)]
    return Centrality(np.stack(cells)[None, None], np.zeros((1, 1), np.float32), patches.shape, step)


def means(values, parts):
    """Means over equal parts of the first axis, of values that are constant in between."""
    sums = np.concatenate([np.zeros((1, values.shape[1])), values.cumsum(0)])
    edges = np.linspace(0, len(values), parts + 1)
    found = np.stack([np.interp(edges, np.arange(len(sums)), column) for column in sums.T], axis=1)
    return np.diff(found, axis=0) * parts / len(values)


def test_shares_are_of_everything_and_zero_where_there_is_nothing():
    tokens = np.array([[[1, 2, 3, 4, 0, 0, 6], [0] * 7]], np.float32)
    found = centrality_from_tokens(tokens, (2, 3))
    assert found.cells.shape == (1, 2, 2, 3)
    assert found.class_token.tolist() == [[1, 0]]
    assert found.shares[0, 0] == pytest.approx(np.array([[2, 3, 4], [0, 0, 6]]) / 16)
    assert not found.shares[0, 1].any()
    times = found.times_average(found.shares)
    assert times[0, 0].mean() == pytest.approx(1)
    assert not times[0, 1].any()


def test_a_cell_at_the_edge_counts_fewer_patches():
    cells = np.array([[[[4, 2], [2, 1]]]], np.float32)  # 3x3 patches, each as much as any other
    found = Centrality(cells, np.zeros((1, 1), np.float32), (3, 3), 2)
    assert found.times_average(found.shares) == pytest.approx(np.ones((1, 1, 2, 2)))


@given(st.integers(1, 20), st.integers(1, 30), st.integers(1, 6), st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_cells_sum_up_what_is_in_them(height, width, step, heads):
    rows = np.random.default_rng(0).random((height, width, heads)).astype(np.float32)
    cells = np.stack([summed(rows[start : start + step], step) for start in range(0, height, step)])
    for i in range(len(cells)):
        for j in range(cells.shape[1]):
            inside = rows[i * step : (i + 1) * step, j * step : (j + 1) * step]
            assert cells[i, j] == pytest.approx(inside.sum((0, 1)), rel=1e-5)


def test_the_step_is_the_least_that_fits(monkeypatch):
    monkeypatch.setattr(centrality, "MOST_NUMBERS", 1000)
    assert map_step((10, 10), 10) == 1
    assert map_step((10, 11), 10) == 2
    assert map_step((4096, 4096), 1) == 133
    assert -((-4096 // 133) ** 2) <= 1000 < (-(-4096 // 132)) ** 2


@given(
    st.integers(1, 60), st.integers(1, 60), st.integers(1, 20), st.integers(1, 90), st.integers(1, 90),
    st.integers(0, 1000),
)  # fmt: skip
@settings(max_examples=50, deadline=None)
def test_a_pixel_is_the_mean_of_what_lies_under_it(height, width, step, tall, wide, seed):
    patches = np.random.default_rng(seed).random((height, width))
    found = in_cells(patches, step)
    values = found.times_average(found.shares)[0, 0]
    # every patch has what the average patch of its cell has
    spread = values.repeat(step, 0)[:height].repeat(step, 1)[:, :width].astype(np.float64)
    assert spread.mean() == pytest.approx(1, rel=1e-5)
    expected = means(means(spread, tall).T, wide).T
    assert found.raster(values, (tall, wide)) == pytest.approx(expected, rel=1e-4, abs=1e-6)


@given(st.data(), st.integers(1, 300), st.integers(1, 300), st.integers(1, 40))
@settings(max_examples=150, deadline=None)
def test_a_hot_patch_is_drawn_where_it_is(data, height, width, step):
    row, column = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    patches = np.zeros((height, width))
    patches[row, column] = 1
    found = in_cells(patches, step)
    # as docs/centrality.md says: a cell begins at its number times the step
    i, j = (int(n) for n in np.unravel_index(found.cells[0, 0].argmax(), found.cells.shape[2:]))
    assert (i, j) == (row // step, column // step)
    tall, wide = data.draw(st.integers(1, 120)), data.draw(st.integers(1, 120))
    mixed, _ = overlay(found, np.full((tall, wide, 3), 100, np.uint8))
    green = mixed[..., 1].astype(int)  # which rises from one end of the colours to the other
    ys, xs = np.nonzero(green == green.max())
    for hot, n, side, pixels in ((ys, i, height, tall), (xs, j, width, wide)):
        first, last = n * step / side * pixels, min((n + 1) * step, side) / side * pixels
        assert first - 1 < hot.min(), (first, last, hot)
        assert hot.max() < last, (first, last, hot)
