"""Verdicts say no wherever a number is none, and of nothing at all."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest

from infexport.evaluation.accuracy.dataset import Classes
from infexport.evaluation.accuracy.evaluate import AccuracyResult, LabelledPrediction
from infexport.evaluation.centrality.check import RESIDUAL, CentralityResult, HeadReport, ImageReport
from infexport.evaluation.parity.metrics import compare, tolerance_for
from infexport.evaluation.parity.result import ParityResult
from infexport.inference.prediction import Prediction
from infvit.absorbing import Deviation

TOLERANCE = tolerance_for("fp32", 4)
BAD = [math.nan, math.inf, -math.inf]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("side", ["bundle", "truth", "both"])
@pytest.mark.parametrize("classes", [1, 2, 5])
def test_parity_with_a_logit_that_is_no_number(classes, side, bad):
    truth = np.tile(np.arange(classes, 0, -1.0), (3, 1))
    logits = truth.copy()
    assert compare(logits, truth, TOLERANCE)
    for array in {"bundle": [logits], "truth": [truth], "both": [logits, truth]}[side]:
        array[1, 0] = bad
    found = compare(logits, truth, TOLERANCE)
    assert not found
    assert found.top1_agreement == pytest.approx(2 / 3)


@pytest.mark.parametrize("bad", BAD[:2])
def test_parity_with_terms_that_are_no_numbers(bad):
    truth = np.ones((1, 2))
    assert not compare(truth, truth * (1 + 1e-3), TOLERANCE, np.array([[1, bad]]))


def test_a_single_logit_near_zero_is_relative_to_its_terms():
    truth, terms = np.array([[1e-9]]), np.array([[2.0]])
    assert compare(truth + 1e-7, truth, TOLERANCE, terms).relative == pytest.approx(5e-8)
    assert compare(truth + 1e-7, truth, TOLERANCE, terms)
    assert not compare(truth + 1e-3, truth, TOLERANCE, terms)
    assert not compare(truth + 1e-7, truth, TOLERANCE)


FINE = Deviation(visits=1.0, expected=1.0, total=1.0, weighed=1.0, distance=1.0, relative=0.1, chance=0.1)


def head(residual=RESIDUAL / 2, walk=FINE):
    return HeadReport(0, 0, 1.0, 1.0, 1.0, 1.0, 5, residual, 0.9, "literal", walk)


def centrality_report(*heads):
    return CentralityResult(Path("b"), Path("c"), "pure_infsa", 1, 9, 0, (ImageReport("x", 10, heads),), ())


@pytest.mark.parametrize("bad", BAD[:2])
@pytest.mark.parametrize("error", ["total", "weighed", "distance", "residual"])
def test_centrality_with_an_error_that_is_no_number(error, bad):
    assert centrality_report(head(), head())
    wrong = head(residual=bad) if error == "residual" else head(walk=dataclasses.replace(FINE, **{error: bad}))
    assert not wrong
    assert not centrality_report(head(), wrong)


@pytest.mark.parametrize("side", ["left", "right"])
def test_an_eigenvector_that_is_none_has_no_residual(side, monkeypatch):
    import torch

    from infexport.evaluation.centrality import check

    principal = check.principal

    def broken(q, k, which, *arguments):
        found = principal(q, k, which, *arguments)
        return found._replace(residual=found.residual * math.nan) if which == side else found

    q, k = torch.rand(2, 12, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    arguments = (0, 0, q, k, 0.9, 1000, np.random.default_rng(0))
    assert check._look_at(*arguments).residual <= RESIDUAL
    monkeypatch.setattr(check, "principal", broken)
    found = check._look_at(*arguments)
    assert math.isnan(found.residual)
    assert not found


def accuracy_report(*logits):
    rows = [Prediction("a.png", (1, 1), 0.0, np.array(row, np.float32), np.zeros(2, np.float32)) for row in logits]
    images = tuple(LabelledPrediction(0, row, row) for row in rows)
    return AccuracyResult(Path("b"), True, Classes(2, None), images, (), "cpu", 1.0, "torch", 1.0, 1.0)


def test_accuracy_with_answers_that_are_no_numbers():
    assert accuracy_report([1, 0], [1, 0])
    report = accuracy_report([1, 0], [math.nan, math.nan])
    assert not report
    assert report.accuracy.top1.count == report.pytorch_accuracy.top1.count == 1
    assert report.agreement.same.count == 1


def test_nothing_at_all_is_no_yes():
    assert not ParityResult(Path("b"), Path("c"), True, "cpu", TOLERANCE, (), ())
    assert not centrality_report()
    assert not dataclasses.replace(accuracy_report(), required=None)
