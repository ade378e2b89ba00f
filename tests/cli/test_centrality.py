"""`validate centrality`: its measurements, its verdict, and that it can fail."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import ZOO

from infexport.evaluation.centrality import check


@pytest.fixture(scope="module")
def digits(zoo_bundle, tmp_path_factory):
    """Folder with the converted digits models of both variants."""
    folder = tmp_path_factory.mktemp("digits")
    for variant in ("linear", "pure"):
        (folder / variant).symlink_to(zoo_bundle(f"digits-{variant}"))
    return folder


@pytest.mark.parametrize("variant", ["linear", "pure"])
def test_holds_on_the_zoo(variant, infexport, digits):
    report = json.loads(infexport("validate", "centrality", digits / variant, "--json").stdout)
    assert report["passed"] is True
    assert report["paper_cosine"] == 0.985
    (image,) = report["images"]
    assert (image["name"], image["tokens"]) == ("32x32", 17)
    heads = image["heads"]
    assert [(head["layer"], head["head"]) for head in heads] == [(i, j) for i in range(4) for j in range(4)]
    for head in heads:
        assert head["residual"] <= report["residual_tolerance"]
        assert head["walk"]["errors"] <= report["allowance"]
        assert 0 < head["eigenvalue"] <= 1
        assert (head["chain"] == "literal") == (head["row_sum"] < 1)
        assert 0 <= head["cosine_right"] <= head["cosine_left"] <= 1
    # the linear variant was trained with these scores, which rank tokens as its eigenvector does; pure was not
    assert report["mean_cosine_left"] >= {"linear": 0.9, "pure": 0.75}[variant]
    assert report["mean_cosine_right"] <= 0.6
    assert report["mean_katz_cosine_left"] >= 0.95
    assert sum(report["chains"].values()) == 16


def test_what_a_person_reads(infexport, digits):
    arguments = ("validate", "centrality", digits / "pure", "--sizes", "16,24x40", "--layers", "3,1")
    shown = infexport(*arguments, "--walkers", "20000").stdout
    lines = shown.splitlines()
    assert lines[0] == "16x16, 5 tokens"
    assert [line.split()[:2] for line in lines[2:10]] == [[layer, head] for layer in "13" for head in "0123"]
    assert lines[10] == "24x40, 16 tokens"
    assert shown.count(" ok\n") == 16
    assert "that the linear variant would have" in shown
    assert "the paper reports 0.985" in shown
    assert "this model computes T = 1" in shown
    assert "20,000 walkers" in shown
    assert lines[-1] == "centrality holds"


def test_a_head_is_the_same_whatever_else_is_looked_at(infexport, digits):
    arguments = ("validate", "centrality", digits / "linear", "--walkers", "2000", "--json")
    everything, one, again, reseeded = (
        json.loads(infexport(*arguments, *more).stdout)["images"][0]["heads"]
        for more in ((), ("--layers", "2"), ("--layers", "2"), ("--layers", "2", "--seed", "1"))
    )
    assert everything[8:12] == one == again
    assert reseeded[0]["cosine_left"] == one[0]["cosine_left"]
    assert reseeded[0]["walk"]["visits"] != one[0]["walk"]["visits"]


def test_images_and_one_that_cannot_be_read(infexport, digits, tmp_path):
    shutil.copy(ZOO / "digits-held-out" / "3-a.png", tmp_path / "3.png")
    (tmp_path / "4.png").write_text("no image")
    arguments = ("validate", "centrality", digits / "linear", "--images", tmp_path, "--walkers", "1000", "--json")
    report = json.loads(infexport(*arguments, exit_code=1).stdout)
    assert [image["name"] for image in report["images"]] == [str(tmp_path / "3.png")]
    assert [failure["file"] for failure in report["failed"]] == [str(tmp_path / "4.png")]
    assert report["passed"] is False


def test_a_walk_of_another_chain_is_no(infexport, digits, monkeypatch):
    simulate = check.simulate
    monkeypatch.setattr(check, "simulate", lambda q, k, rho, *rest: simulate(q, k, 0.97 * rho, *rest))
    result = infexport("validate", "centrality", digits / "linear", "--layers", "3", exit_code=1)
    assert "FAILED: the walk" in result.stdout
    assert result.stdout.endswith("centrality FAILED\n")


def test_an_eigenvector_that_was_not_found_is_no(infexport, digits, monkeypatch):
    monkeypatch.setattr(check, "MAX_STEPS", 3)
    arguments = ("validate", "centrality", digits / "linear", "--layers", "0", "--walkers", "1000")
    assert "FAILED: residual" in infexport(*arguments, exit_code=1).stdout


def test_heads_without_affinities(infexport, digits, tmp_path):
    """Without queries there is no affinity: no ranking and no walk, which is not a failure."""
    state = load_file(ZOO / "digits-pure" / "model.safetensors")
    for name in state:
        if ".q_proj." in name:
            state[name] = torch.zeros_like(state[name])
    save_file(state, tmp_path / "zero.safetensors")
    arguments = ("validate", "centrality", digits / "pure", "--checkpoint", tmp_path / "zero.safetensors")
    report = json.loads(infexport(*arguments, "--json").stdout)
    heads = report["images"][0]["heads"]
    assert all(head["eigenvalue"] == 0 and head["cosine_left"] is None for head in heads)
    assert all(head["chain"] == "literal" and head["walk"]["visits"] == 0 for head in heads)
    assert report["mean_cosine_left"] is None
    assert " - " in infexport(*arguments).stdout


def test_a_long_run_is_told_of(infexport, digits, monkeypatch):
    monkeypatch.setattr(check, "PAIRS_PER_SECOND", 1.0)
    arguments = ("validate", "centrality", digits / "linear", "--layers", "0", "--walkers", "1000")
    assert "4 heads of 17 tokens take about 19 minutes" in infexport(*arguments).stderr


def test_wrong_usage(infexport, digits):
    arguments = ("validate", "centrality", digits / "linear")
    assert "there is no layer 4" in infexport(*arguments, "--layers", "4", exit_code=2).stderr
    assert "for example --sizes 32x40" in infexport(*arguments, "--sizes", "33x40", exit_code=2).stderr
