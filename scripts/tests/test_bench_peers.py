"""Peers of scripts/benchmarks/bench_peers.py are the networks that it names, and its reports are complete."""

import importlib
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from support import TINY, relative_error

import infsa_ops
from infexport.evaluation.flops import matmul_cost


@pytest.fixture(scope="module")
def peers():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
        importlib.import_module("bench_peers")  # and with it every module of peers
        return importlib.import_module("peers")


def qkv():
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(2, 3, 17, 8, generator=generator, dtype=torch.float64) for _ in range(3))


@pytest.mark.parametrize("rho", [torch.tensor(0.9).double(), torch.tensor([0.5, 0.9, 0.99]).double()], ids=["1", "H"])
def test_the_reference_forms_are_the_operators(rho, peers):
    q, k, v = qkv()
    linear = infsa_ops.linear_attention(q, k, v, rho)
    assert relative_error(peers.networks.linear_attention(q, k, v, rho), linear) <= 1e-12
    assert relative_error(peers.networks.pure_attention(q, k, v, rho), infsa_ops.neumann_kernel(q, k, v, rho)) <= 1e-12


@pytest.fixture
def tiny(peers, monkeypatch):
    monkeypatch.setattr(peers.networks, "CONFIGS", TINY)
    return TINY


@pytest.mark.parametrize("family", ["linear", "pure", "softmax"])
def test_the_peers_are_the_networks(family, peers, tiny):
    pixels = torch.randn(2, 3, 16, 40, dtype=torch.float64)
    peer = peers.networks.peer_of(family).double()
    with torch.no_grad():
        expected = peers.networks.network_of(family).double()(pixels)
        assert relative_error(peer(pixels), expected) <= 1e-12
    forms = {type(layer.attn).__name__ for layer in peer.encoder.layers}
    assert forms == {"Attention" if family == "softmax" else "ReferenceAttention"}


def test_families_share_their_weights_where_they_can(peers, tiny):
    linear, softmax = (peers.networks.network_of(family).state_dict() for family in ("linear", "softmax"))
    assert all(torch.equal(linear[name], value) for name, value in softmax.items())


def test_the_softmax_vit_is_measured_both_ways(peers):
    names = [contender.name for contender in peers.contenders.chosen("linear-fp32,softmax-eager")]
    products = ["gemm-ort-float32", "gemm-ort-int8", "gemm-torch-float32"]
    assert names == [*products, "linear-fp32", "softmax-eager", "softmax-ort"]
    assert len(peers.contenders.chosen(None)) == len(peers.contenders.CONTENDERS)
    with pytest.raises(ValueError, match="no contender: linear"):
        peers.contenders.chosen("linear")


def test_a_wrong_answer_is_not_measured(peers, tmp_path):
    import numpy as np

    entries = [
        peers.ask.Entry(peers.contenders.BY_NAME[name])
        for name in ("linear-eager", "linear-ort", "linear-int8", "pure-fp32")
    ]
    for entry, factor in zip(entries, (1.0, 1.002, 1.04, 7.0), strict=True):
        np.save(tmp_path / f"{entry.contender.name}.logits.npy", factor * np.ones((2, 5), np.float32))
    peers.ask.compare_logits(entries, tmp_path)
    assert [bool(entry.reason) for entry in entries] == [False, True, False, False]
    assert "relative error 2.0e-03" in entries[1].reason


def entries_of(peers, seconds):
    return [
        peers.ask.Entry(contender, times, 0.0, 10**9) if (times := seconds.get(contender.name)) else
        peers.ask.Entry(contender, reason="killed | by SIGKILL")
        for contender in peers.contenders.CONTENDERS
    ]  # fmt: skip


def report_of(peers, *settings):
    rows = [[peers.report.row_of(entry, entries, 1024, 1) for entry in entries] for entries in settings]
    return {
        "machine": {"cpu": "Abacus", "cores": 2, "threads": 2},
        "versions": {"torch": "2"},
        "rounds": 3,
        "settings": [{"side": 1024, "batch": 1, "rows": found} for found in rows],
    }


def test_the_report(peers, tmp_path):
    seconds = {"gemm-ort-float32": [0.2] * 3, "gemm-ort-int8": [0.05] * 3, "gemm-torch-float32": [0.4] * 3}
    seconds |= {"linear-eager": [9.0, 5.0, 6.0], "linear-fp32": [2.0, 2.5, 1.0], "linear-int8": [0.5] * 3}
    # in the second setting torch's product and our models failed
    some = {name: times for name, times in seconds.items() if name in ("gemm-ort-float32", "linear-eager")}
    report = json.loads(json.dumps(report_of(peers, entries_of(peers, seconds), entries_of(peers, some))))
    rows = {row["name"]: row for row in report["settings"][0]["rows"]}
    assert list(rows) == [contender.name for contender in peers.contenders.CONTENDERS]  # failed ones, too
    eager, ours, int8 = rows["linear-eager"], rows["linear-fp32"], rows["linear-int8"]
    assert eager["all"] == [9, 5, 6]
    assert eager["times_ours"] == {"linear-fp32": 3, "linear-int8": 12}
    # 48 E² at torch's own rate, 28 E² at ONNX Runtime's
    product = 4096 * 1024 * 4096
    work = matmul_cost(peers.networks.CONFIGS["linear"], False, 4097).dense
    assert eager["share_of_limit"] == pytest.approx(work * 0.4 / product / 6)
    assert ours["share_of_limit"] == pytest.approx(work * 28 / 48 * 0.2 / product / 2)
    assert int8["limit"] == pytest.approx(ours["limit"] / 4)
    assert rows["gemm-ort-float32"]["giga_operations_per_second"] == pytest.approx(2 * product / 0.2 / 1e9)
    assert rows["pure-ort"]["status"] == "failed"
    assert report["settings"][1]["rows"][3]["times_ours"] == {}

    text = peers.report.table(report)
    assert "- gemm-ort-float32: 172 G operations/s (172 to 172)\n" in text
    assert "| linear: torch, eager | 6.000 | 5.000 to 9.000 | 3.00 | 12.00 |" in text
    assert "| pure: torch.compile | failed: killed / by SIGKILL |" in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in lines} == {9}
    shown = [line.split("|")[1].strip() for line in lines]
    assert shown.index("softmax: torch.onnx.export in ONNX Runtime") == shown.index("softmax: torch, eager") + 1

    peers.report.draw(report, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        image.load()
        assert image.format == "PNG"
        assert min(image.size) > 500
