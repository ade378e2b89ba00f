"""The state of Linear-InfSA: its laws, its dtypes, its gradients, and what it refuses."""

from __future__ import annotations

import random

import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import infexport
import infsa_ops
from infsa_ops.linear_state import reference

HEADS, WIDTH = 2, 3
LAW = 1e-12

State = tuple[Tensor, Tensor]


def empty_state(dtype: torch.dtype = torch.float64, batch: int = 1, heads: int = HEADS, width: int = WIDTH) -> State:
    return torch.zeros(batch, heads, dtype=dtype), torch.zeros(batch, heads, width, dtype=dtype)


def weighted_tokens(tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(1, HEADS, tokens, generator=generator, dtype=torch.float64)
    return weights, torch.randn(1, HEADS, tokens, WIDTH, generator=generator, dtype=torch.float64)


def state_of(weights: Tensor, values: Tensor) -> State:
    return infsa_ops.linear_state_update(weights, values, *empty_state())


def add(a: State, b: State) -> State:
    return a[0] + b[0], a[1] + b[1]


@pytest.fixture(scope="module")
def state_error(relative_error):
    """The larger relative error of mass and moment."""
    return lambda actual, truth: max(
        relative_error(actual[0][..., None], truth[0][..., None]), relative_error(actual[1], truth[1])
    )


chunk_sizes = st.lists(st.integers(0, 9), min_size=1, max_size=8)
seeds = st.integers(0, 2**31)


# Laws


@settings(max_examples=50, deadline=None)
@given(sizes=chunk_sizes, seed=seeds)
def test_any_order_and_grouping_of_chunks_gives_the_same_state(sizes, seed, state_error):
    weights, values = weighted_tokens(sum(sizes), seed)
    whole = state_of(weights, values)
    chunks = list(zip(weights.split(sizes, dim=2), values.split(sizes, dim=2), strict=True))
    assert state_error(reference.linear_state_update(weights, values, *empty_state()), whole) <= LAW

    shuffle = random.Random(seed)
    shuffle.shuffle(chunks)
    running = empty_state()
    for chunk in chunks:
        running = infsa_ops.linear_state_update(*chunk, *running)
    assert state_error(running, whole) <= LAW

    partial = [state_of(*chunk) for chunk in chunks]
    while len(partial) > 1:  # a random binary tree of additions
        at = shuffle.randrange(len(partial) - 1)
        partial[at : at + 2] = [add(*partial[at : at + 2])]
    assert state_error(partial[0], whole) <= LAW


@settings(max_examples=25, deadline=None)
@given(tokens=st.integers(0, 40), seed=seeds)
def test_order_of_tokens_does_not_matter(tokens, seed, state_error):
    weights, values = weighted_tokens(tokens, seed)
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(seed))
    assert state_error(state_of(weights[:, :, order], values[:, :, order]), state_of(weights, values)) <= LAW


@settings(max_examples=25, deadline=None)
@given(tokens=st.integers(0, 20), seed=seeds)
def test_identity(tokens, seed):
    state = state_of(*weighted_tokens(tokens, seed))
    for unchanged in (add(state, empty_state()), infsa_ops.linear_state_update(*weighted_tokens(0, seed), *state)):
        assert all(torch.equal(a, b) for a, b in zip(unchanged, state, strict=True))


def test_update_leaves_the_state_it_was_given():
    state = state_of(*weighted_tokens(4, 0))
    before = [tensor.clone() for tensor in state]
    infsa_ops.linear_state_update(*weighted_tokens(4, 1), *state)
    assert all(torch.equal(a, b) for a, b in zip(state, before, strict=True))


# Dtypes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_states_are_float32_for_half_precision_tokens(dtype, state_error):
    tokens = 70_000  # the mass exceeds float16's largest number, 65504, and bfloat16 counts to 256
    weights, values = torch.ones(1, 1, tokens, dtype=dtype), torch.full((1, 1, tokens, 2), 2.0, dtype=dtype)
    state = infsa_ops.linear_state_update(weights, values, *empty_state(torch.float32, heads=1, width=2))
    assert [tensor.dtype for tensor in state] == [torch.float32, torch.float32]
    assert state_error(state, (torch.full((1, 1), 7e4), torch.full((1, 1, 2), 1.4e5))) <= 1e-6


def test_onnx_body_keeps_float32_states_for_half_precision_tokens(state_error):
    class Update(nn.Module):
        def forward(self, *arguments: Tensor) -> State:
            return infsa_ops.linear_state_update(*arguments)

    tokens = torch.full((1, 1, 1000), 100.0), torch.full((1, 1, 1000, 2), 2.0)  # the sums exceed 65504
    arguments = (*(tensor.half() for tensor in tokens), *empty_state(torch.float32, heads=1, width=2))
    model = infexport.export(Update(), arguments)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = {entry.name: tensor.numpy() for entry, tensor in zip(session.get_inputs(), arguments, strict=True)}
    state = tuple(torch.from_numpy(array) for array in session.run(None, feeds))
    assert [tensor.dtype for tensor in state] == [torch.float32, torch.float32]
    assert state_error(state, (torch.full((1, 1), 1e5), torch.full((1, 1, 2), 2e5))) <= 1e-6


def test_float32_states_of_many_tokens(random_tokens, state_error):
    tokens = 331_777  # of an image of 9216²
    weights = torch.rand(1, 1, tokens, generator=torch.Generator().manual_seed(0))
    values = random_tokens(1, 1, tokens, 16, torch.float32)[0]
    single = infsa_ops.linear_state_update(weights, values, *empty_state(torch.float32, heads=1, width=16))
    double = reference.linear_state_update(weights, values, *empty_state(heads=1, width=16))
    assert state_error(single, double) <= 5e-6


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_attention_keeps_the_dtype_of_its_tokens(dtype, tolerance, random_tokens, relative_error):
    q, k, v = random_tokens(2, 2, 785, 16, torch.float32).to(dtype)
    out = infsa_ops.linear_attention(q, k, v, 0.95)
    assert out.dtype == dtype
    assert relative_error(out, reference.linear_attention(q.double(), k.double(), v.double(), 0.95)) <= tolerance


@pytest.mark.parametrize("which", ["mass", "moment"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_states_are_refused(which, dtype):
    mass, moment = empty_state(torch.float32)
    state = (mass.to(dtype), moment) if which == "mass" else (mass, moment.to(dtype))
    with pytest.raises(RuntimeError, match=f"{which} is {dtype}, expected a float32 or float64 state"):
        infsa_ops.linear_state_update(torch.ones(1, HEADS, 4), torch.ones(1, HEADS, 4, WIDTH), *state)


# Shapes


@pytest.mark.parametrize(
    ("name", "received", "message"),
    [
        ("weights", (1, 2, 5), r"values has shape \[1, 2, 4, 3\], expected \[1, G, 5, d\] with G a divisor of 2"),
        ("weights", (1, 2), r"weights has 2 dimensions, expected \[B, H, N\]"),
        ("values", (2, 4, 3), r"values has 3 dimensions, expected \[B, G, N, d\]"),
        ("mass", (1, 3), r"mass has shape \[1, 3\], expected \[1, 2\] to match weights and values"),
        ("moment", (1, 2, 9), r"moment has shape \[1, 2, 9\], expected \[1, 2, 3\] to match weights and values"),
        ("moment", (1, 2), r"moment has shape \[1, 2\], expected \[1, 2, 3\]"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_wrong_shapes_are_refused(name, received, message, device):
    shapes = {"weights": (1, 2, 4), "values": (1, 2, 4, 3), "mass": (1, 2), "moment": (1, 2, 3)} | {name: received}
    with pytest.raises(RuntimeError, match=message):
        infsa_ops.linear_state_update(**{key: torch.zeros(shape, device=device) for key, shape in shapes.items()})


@pytest.mark.parametrize("rho", [torch.ones(3), torch.ones(1, 2)])
def test_rho_of_another_shape_is_refused(rho, random_tokens):
    with pytest.raises(ValueError, match=r"rho has shape .* expected a scalar or one value per head, \[2\]"):
        infsa_ops.linear_attention(*random_tokens(1, 2, 4, 3, torch.float32), rho)


@pytest.mark.parametrize("which", ["k", "v"])
def test_tokens_of_another_number_are_refused(which, random_tokens):
    tokens = dict(zip("qkv", random_tokens(1, 2, 4, 3, torch.float32), strict=True))
    tokens[which] = tokens[which][:, :, :3]
    with pytest.raises(RuntimeError, match=r"has shape .* expected"):
        infsa_ops.linear_attention(**tokens, rho=0.5)


# Attention


@pytest.mark.parametrize("rho", [0.9, torch.tensor([0.9]), torch.tensor([0.9, 0.2])], ids=["float", "[1]", "[H]"])
def test_attention_is_the_reference(rho, random_tokens, relative_error):
    q, k, v = random_tokens(2, 2, 31, 8, torch.float64)
    out = infsa_ops.linear_attention(q, k, v, rho)
    assert relative_error(out, reference.linear_attention(q, k, v, rho)) <= 1e-13
    assert torch.equal(out, out[:, :, :1].expand_as(out))  # the same for every token


# Gradients and registration


@pytest.mark.parametrize("heads", [None, HEADS], ids=["scalar rho", "rho per head"])
def test_gradients_of_attention(heads, random_tokens):
    inputs = [tensor.requires_grad_() for tensor in random_tokens(1, HEADS, 5, WIDTH, torch.float64)]
    rho = torch.full(() if heads is None else (heads,), 0.7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(infsa_ops.linear_attention, (*inputs, rho))


def state_arguments(requires_grad: bool) -> list[Tensor]:
    arguments = [*weighted_tokens(5, 0), *state_of(*weighted_tokens(2, 1))]
    return [tensor.requires_grad_(requires_grad) for tensor in arguments]


def test_gradients_of_the_update():
    assert torch.autograd.gradcheck(infsa_ops.linear_state_update, state_arguments(True))


@pytest.mark.parametrize("requires_grad", [False, True])
def test_registration(requires_grad):
    torch.library.opcheck(torch.ops.infsa.linear_state_update.default, state_arguments(requires_grad))


def test_keys_that_would_broadcast_are_refused(random_tokens):
    q, k, v = random_tokens(1, 2, 4, 3, torch.float32)
    with pytest.raises(RuntimeError, match=r"k has shape \[1, 1, 4, 3\], expected \[1, 2, 4, 3\]"):
        infsa_ops.linear_attention(q, k[:, :1], v, 0.5)
    with pytest.raises(RuntimeError, match=r"v is torch\.float64, expected q's dtype, torch\.float32"):
        infsa_ops.linear_attention(q, k, v.double(), 0.5)


def test_a_state_of_two_dtypes_is_refused():
    weights, values = torch.ones(1, 1, 2), torch.ones(1, 1, 2, 3)
    mass, moment = torch.zeros(1, 1), torch.zeros(1, 1, 3, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"moment is torch.float64, expected the dtype of mass, torch.float32"):
        infsa_ops.linear_state_update(weights, values, mass, moment)


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_heads_may_share_values(groups):
    """Grouped values are values repeated for the heads of each group; the ONNX body does the same."""
    generator = torch.Generator().manual_seed(groups)
    weights = torch.rand(2, 6, 50, generator=generator, dtype=torch.float64)
    values = torch.randn(2, groups, 50, 4, generator=generator, dtype=torch.float64)
    state = torch.randn(2, 6, generator=generator).double(), torch.randn(2, 6, 4, generator=generator).double()
    repeated = values.repeat_interleave(6 // groups, dim=1)
    for update in (infsa_ops.linear_state_update, reference.linear_state_update):
        for got, expected in zip(update(weights, values, *state), update(weights, repeated, *state), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)

    class Update(torch.nn.Module):
        def forward(self, *arguments):
            return infsa_ops.linear_state_update(*arguments)

    arguments = tuple(tensor.float() for tensor in (weights, values, *state))
    tokens = torch.export.Dim("tokens")
    model = infexport.export(Update(), arguments, dynamic_shapes=(({2: tokens}, {2: tokens}, {}, {}),))
    session = onnxruntime.InferenceSession(model.SerializeToString())
    names = [i.name for i in session.get_inputs()]
    none = (arguments[0][:, :, :0], arguments[1][:, :, :0], *arguments[2:])
    feeds = dict(zip(names, map(Tensor.numpy, none), strict=True))
    for got, expected in zip(session.run(None, feeds), state, strict=True):
        torch.testing.assert_close(torch.from_numpy(got).double(), expected, rtol=1e-6, atol=1e-6)
    feeds = {name: a.numpy() for name, a in zip(names, arguments, strict=True)}
    for got, expected in zip(session.run(None, feeds), Update()(weights, values, *state), strict=True):
        torch.testing.assert_close(torch.from_numpy(got).double(), expected, rtol=1e-5, atol=1e-5)

    inputs = [
        tensor.clone().requires_grad_() for tensor in (weights[:1, :, :3], values[:1, :, :3], *(s[:1] for s in state))
    ]
    assert torch.autograd.gradcheck(infsa_ops.linear_state_update, inputs)


def test_groups_that_do_not_divide_the_heads_are_refused():
    with pytest.raises(RuntimeError, match="G a divisor of 6"):
        infsa_ops.linear_state_update(
            torch.ones(1, 6, 3), torch.ones(1, 4, 3, 2), torch.zeros(1, 6), torch.zeros(1, 6, 2)
        )
