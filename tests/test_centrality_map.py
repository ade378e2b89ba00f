"""Centrality as a map: shares, cells, and what the average patch is."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infexport import centrality as module
from infexport.centrality import Centrality, of_tokens, step_of, summed


def test_shares_are_of_everything_and_zero_where_there_is_nothing():
    tokens = np.array([[[1, 2, 3, 4, 0, 0, 6], [0] * 7]], np.float32)
    found = of_tokens(tokens, (2, 3))
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
    monkeypatch.setattr(module, "MOST_NUMBERS", 1000)
    assert step_of((10, 10), 10) == 1
    assert step_of((10, 11), 10) == 2
    assert step_of((4096, 4096), 1) == 133
    assert -((-4096 // 133) ** 2) <= 1000 < (-(-4096 // 132)) ** 2
