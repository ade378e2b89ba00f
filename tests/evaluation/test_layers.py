"""Budgets of few numbers: right heads of 1, 2, 3 and 5 classes keep them, and planted faults do not."""

import copy
import math

import numpy as np
import pytest
import torch
from support import TINY
from torch import nn

import infsa_ops
from infexport.conversion.image_model import ImageModel
from infexport.evaluation.parity.layers import MULTIPLE, Arithmetic, Error, judge, sum_variance, summand_size
from infexport.evaluation.parity.metrics import compare, tolerance_for
from infexport.evaluation.parity.tracing import Trace
from infvit.network import InfViT

pytestmark = pytest.mark.slow

IMAGES = 200
U = 2.0**-24


def network_of(classes, family="linear"):
    torch.manual_seed(classes)
    network = InfViT(TINY[family]).eval()
    network.head = nn.Linear(network.config.embed_dim, classes)
    return network.requires_grad_(False)


def as_torch(weight, bias, x):
    return nn.functional.linear(x, weight, bias)


def one_by_one(weight, bias, x):
    """Every product and every partial sum rounded to float32, in order."""
    products = np.asarray(weight)[None] * np.asarray(x)[:, None]
    terms = np.concatenate([products, np.broadcast_to(np.asarray(bias)[:, None], (*products.shape[:2], 1))], axis=-1)
    return torch.from_numpy(np.add.accumulate(terms, axis=-1, dtype=np.float32)[..., -1])


def bias_first(weight, bias, x):
    products = np.asarray(weight)[None] * np.asarray(x)[:, None]
    terms = np.concatenate([np.broadcast_to(np.asarray(bias)[:, None], (*products.shape[:2], 1)), products], axis=-1)
    return torch.from_numpy(np.add.accumulate(terms, axis=-1, dtype=np.float32)[..., -1])


def perturbed(weight, bias, x):
    random = torch.Generator().manual_seed(1)
    return as_torch(weight * (1 + 0.01 * torch.randn(weight.shape, generator=random)), bias, x)


def transposed(weight, bias, x):
    return as_torch(weight.T.reshape(weight.shape).flip(-1), bias, x)


def products_in_bf16(weight, bias, x):
    return as_torch(weight.bfloat16().float(), bias, x.bfloat16().float())


RIGHT = [as_torch, one_by_one, bias_first]
WRONG = [perturbed, transposed, products_in_bf16]


def judged(network, head, features):
    """Tell for every image whether the head keeps its budget, and whether its logits are within tolerance."""
    truth = copy.deepcopy(network).double()
    truth.encoder.layers = nn.ModuleList()  # so that nothing but the embedding and the head is judged
    pixels = torch.zeros(1, 3, 24, 24, dtype=torch.float64)
    tokens, tolerance = [truth.embed(pixels)], tolerance_for("fp32", 2)
    logits = head(network.head.weight, network.head.bias, features)
    found = []
    for x, y in zip(features[:, None], logits[:, None], strict=True):
        exact = truth.head(x.double())
        trace, theirs = Trace(tokens, [], x, y), Trace(tokens, [], x.double(), exact)
        part = judge(truth, Arithmetic("fp32", folded=False), trace, theirs, theirs, pixels)[-1]
        assert part.name == "head"
        compared = compare(y.numpy(), exact.numpy(), tolerance, summand_size(truth.head, x.double()).numpy())
        found.append((bool(part), bool(compared)))
    return np.array(found)


def features_of(network, count=IMAGES):
    random = torch.Generator().manual_seed(0)
    return torch.randn(count, network.config.embed_dim, generator=random)


@pytest.mark.parametrize("head", RIGHT)
@pytest.mark.parametrize("classes", [1, 2, 3, 5])
def test_no_right_head_is_rejected(classes, head):
    network = network_of(classes)
    assert judged(network, head, features_of(network)).all()


@pytest.mark.parametrize("head", WRONG)
@pytest.mark.parametrize("classes", [1, 2, 3, 5])
def test_every_wrong_head_is_found(classes, head):
    network = network_of(classes)
    assert not judged(network, head, features_of(network)).any()


@pytest.mark.parametrize(("head", "right"), [(head, True) for head in RIGHT] + [(head, False) for head in WRONG])
def test_a_logit_near_zero_is_judged_by_what_cancels(head, right):
    """The bias takes away all that features of one direction give."""
    network = network_of(1)
    features = features_of(network)
    weight = network.head.weight
    features += (1 - features @ weight.T) @ weight / weight.square().sum()
    network.head.bias.fill_(-1)
    exact = network.head.double()(features.double()).abs()
    network.float()
    assert exact.max() < 1e-6
    found = judged(network, head, features)
    assert found.all() if right else not found.any()


@pytest.mark.parametrize("size", [0.0, 1.0, 5.0])
@pytest.mark.parametrize("terms", [2, 33, 257])
def test_the_variance_is_enough_for_every_order(terms, size):
    """Simulated in float64: every product and every partial sum of 20,000 orders is rounded by at most u, uniformly."""
    random = np.random.default_rng(0)
    summands = random.standard_normal(terms)
    summands += (size * np.linalg.norm(summands) - summands.sum()) / terms
    squares, total = (torch.tensor(x, dtype=torch.float64) for x in ((summands**2).sum(), summands.sum()))
    deviation = float(sum_variance(squares, total, terms).sqrt())
    orders = random.permuted(np.tile(summands, (20_000, 1)), axis=1)
    error = (U * orders * random.uniform(-1, 1, orders.shape)).sum(1)
    error += (U * np.cumsum(orders, axis=1) * random.uniform(-1, 1, orders.shape)).sum(1)
    assert np.abs(error).max() < MULTIPLE * deviation
    assert deviation < 3 * error.std()


def traced(network, images, dtype):
    model = ImageModel(copy.deepcopy(network).to(dtype), (0.5,) * 3, (0.5,) * 3).eval()
    with torch.no_grad(), model.observing():
        logits, features, *tokens = model(images)
    return model, Trace(tokens, [{} for _ in tokens], features, logits)


@pytest.mark.parametrize("family", list(TINY))
@pytest.mark.parametrize("classes", [1, 2])
def test_every_part_of_a_network_of_few_classes(classes, family):
    network, harmed = network_of(classes, family), network_of(classes, family)
    harmed.encoder.layers[1].ff[3].weight.copy_(harmed.encoder.layers[1].ff[3].weight * 1.01)
    for seed in range(3):
        images = torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (1, 24, 24, 3), np.uint8))
        model, truth = traced(network, images, torch.float64)
        for bundle, wrong in ((network, []), (harmed, ["layers.1"])):
            _, found = traced(bundle, images, torch.float32)
            arithmetic = Arithmetic("fp32", folded=False)
            parts = judge(model.network, arithmetic, found, found, truth, model.normalise(images))
            assert [part.name for part in parts] == ["embed", "layers.0", "layers.1", "head"]
            assert [part.name for part in parts if not part] == wrong


@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e-12, 1e-20, 0.0])
@pytest.mark.parametrize("wrong", [1.0, 1 + 1e-3])
def test_a_sum_that_float32_has_no_numbers_for_may_be_zero(scale, wrong):
    network = network_of(5, "pure")
    for layer in network.encoder.layers:
        for projection in (layer.attn.q_proj, layer.attn.k_proj):
            for parameter in projection.parameters():
                parameter.mul_(scale)
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 24, 24, 3), np.uint8))
    model, truth = traced(network, images, torch.float64)
    _, found = traced(network, images, torch.float32)
    for layer, tokens, states in zip(network.encoder.layers, found.tokens, found.states, strict=True):
        q, k, _ = layer.attn.project(layer.norm1(tokens))
        states["squared_norm"] = wrong * infsa_ops.affinity_squared_norm(q, k)
    parts = judge(model.network, Arithmetic("fp32", folded=False), found, found, truth, model.normalise(images))
    right = wrong == 1.0 or scale < 1e-9
    assert [bool(part) for part in parts] == [True, right, right, True]


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e-12])
@pytest.mark.parametrize("wrong", [1.0, 1.1])
def test_factors_that_float16_has_no_numbers_for_may_be_zero(scale, wrong):
    network = network_of(5, "pure")
    for layer in network.encoder.layers:
        layer.attn.q_proj.weight.mul_(scale)
        layer.attn.q_proj.bias.zero_()
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 24, 24, 3), np.uint8))
    model, truth = traced(network, images, torch.float64)
    for layer in network.encoder.layers:
        for projection in (layer.attn.q_proj, layer.attn.k_proj, layer.attn.v_proj):
            projection.weight.copy_(projection.weight.half().float())
    _, found = traced(network, images, torch.float32)
    for layer, tokens, states in zip(network.encoder.layers, found.tokens, found.states, strict=True):
        q, k, v = layer.attn.project(layer.norm1(tokens))
        states["mixed"] = wrong * infsa_ops.neumann_kernel(q, k, v, layer.attn.rho)
    parts = judge(model.network, Arithmetic("fp16", folded=False), found, found, truth, model.normalise(images))
    right = wrong == 1.0 or scale < 1
    assert [bool(part) for part in parts[1:3]] == [right, right]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["tokens", "features", "logits", "checkpoint"])
def test_what_is_not_finite_is_out_of_every_budget(where, bad):
    network = network_of(2)
    images = torch.zeros(1, 24, 24, 3, dtype=torch.uint8)
    if where == "checkpoint":
        network.encoder.layers[0].ff[0].weight[0, 0] = bad
    model, truth = traced(network, images, torch.float64)
    _, found = traced(network, images, torch.float32)
    if where == "tokens":
        found.tokens[1][0, 3, 5] = bad
    elif where != "checkpoint":
        getattr(found, where)[0, 0] = bad
    parts = judge(model.network, Arithmetic("fp32", folded=False), found, found, truth, model.normalise(images))
    wrong = {"tokens": ["layers.0", "layers.1"], "features": ["layers.1", "head"], "logits": ["head"]}
    expected = wrong.get(where, ["layers.0", "layers.1", "head"])
    assert [part.name for part in parts if not part] == expected


def test_errors_and_budgets_that_are_no_numbers():
    assert Error(1, 2)
    assert Error(0, 0)
    for adds, budget in ((math.nan, 1), (1, math.nan), (math.inf, math.inf), (0, math.inf), (math.inf, 1)):
        assert not Error(adds, budget)
        assert Error(adds, budget).share == math.inf
