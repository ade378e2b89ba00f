"""Derivatives of every operator: of first and second order, in every mode and dtype, those of the float64 reference."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import infsa_ops
from infsa_ops.affinity_product import reference as product
from infsa_ops.affinity_squared_norm import reference as squared_norm
from infsa_ops.linear_state import reference as linear
from infsa_ops.neumann_kernel import reference as pure

Outputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Operator:
    """An operator, its reference, and the shapes of its arguments for (B, N).

    Attributes:
        call, truth: the same function.
        shapes: (B, N) → shapes; an empty shape is ρ.
        states: how many of the last arguments stay float32 in half precision.
    """

    call: Callable[..., Any]
    truth: Callable[..., Any]
    shapes: Callable[[int, int], list[tuple[int, ...]]]
    states: int = 0

    def arguments(self, batch: int = 1, tokens: int = 4, dtype: torch.dtype = torch.float64, seed: int = 0) -> Outputs:
        generator = torch.Generator().manual_seed(seed)
        shapes = self.shapes(batch, tokens)
        made = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
        made = [torch.tensor(0.7, dtype=torch.float64) if x.dim() == 0 else x for x in made]
        wide = torch.promote_types(dtype, torch.float32)
        return tuple(x.to(wide if i >= len(made) - self.states else dtype) for i, x in enumerate(made))


def attention(batch: int, tokens: int) -> list[tuple[int, ...]]:
    return [(batch, 2, tokens, 2)] * 2 + [(batch, 2, tokens, 3), ()]


def block(batch: int, tokens: int) -> list[tuple[int, ...]]:
    return [(batch, 2, tokens, 2), (batch, 2, tokens + 1, 2), (batch, 2, tokens + 1, 3)]


def state(batch: int, tokens: int) -> list[tuple[int, ...]]:
    return [(batch, 4, tokens), (batch, 2, tokens, 2), (batch, 4), (batch, 4, 2)]


OPERATORS = {
    "linear_attention": Operator(infsa_ops.linear_attention, linear.linear_attention, attention, states=1),
    "linear_state": Operator(infsa_ops.linear_state_update, linear.linear_state_update, state, states=2),
    "neumann_1": Operator(infsa_ops.neumann_kernel, pure.neumann_kernel, attention, states=1),
    "neumann_3": Operator(
        lambda *a: infsa_ops.neumann_kernel(*a, terms=3), lambda *a: pure.neumann_kernel(*a, terms=3), attention, 1
    ),
    "product": Operator(infsa_ops.affinity_product, product.affinity_product, block),
    "squared_norm": Operator(
        infsa_ops.affinity_squared_norm, squared_norm.affinity_squared_norm, lambda b, n: block(b, n)[:2]
    ),
}

pytestmark = pytest.mark.parametrize("name", OPERATORS)


def outputs_of(function: Callable[..., Any], *arguments: Tensor) -> Outputs:
    found = function(*arguments)
    return found if isinstance(found, tuple) else (found,)


def loss(function: Callable[..., Any], *arguments: Tensor) -> Tensor:
    """Return a scalar whose derivatives of all orders depend on all arguments."""
    return sum((out.square().sum() + out.sum() for out in outputs_of(function, *arguments)), torch.zeros(()))


def gradients(function: Callable[..., Any], arguments: Outputs, needed: set[int] | None = None) -> list[Tensor]:
    leaves = [x.detach().requires_grad_(needed is None or i in needed) for i, x in enumerate(arguments)]
    return list(
        torch.autograd.grad(loss(function, *leaves), [x for x in leaves if x.requires_grad], materialize_grads=True)
    )


def assert_equal(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


# Orders and modes


def test_first_derivatives_in_both_modes(name: str) -> None:
    arguments = [x.requires_grad_() for x in OPERATORS[name].arguments(tokens=3)]
    modes = dict.fromkeys(("check_forward_ad", "check_batched_grad", "check_batched_forward_grad"), True)
    assert torch.autograd.gradcheck(OPERATORS[name].call, arguments, **modes)


def test_second_derivatives_in_both_modes(name: str) -> None:
    arguments = [x.requires_grad_() for x in OPERATORS[name].arguments(tokens=3)]
    assert torch.autograd.gradgradcheck(OPERATORS[name].call, arguments, check_fwd_over_rev=True)


def test_double_backward_is_the_references(name: str) -> None:
    found = []
    for function in (OPERATORS[name].call, OPERATORS[name].truth):
        leaves = [x.requires_grad_() for x in OPERATORS[name].arguments()]
        first = torch.autograd.grad(loss(function, *leaves), leaves, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))
        assert any(g.abs().max() > 0.1 for g in found[-1])
    assert_equal(*found)


@pytest.mark.parametrize("transform", ["grad", "jacrev", "jacfwd", "hessian", "grad of vmap", "vmap of grad"])
def test_transforms_of_torch_func(name: str, transform: str) -> None:
    arguments = OPERATORS[name].arguments(tokens=3)
    several = tuple(torch.stack([x, x * 0.5]) for x in arguments)
    places = tuple(range(len(arguments)))

    def transformed(function: Callable[..., Any]) -> Any:
        scalar = lambda *a: loss(function, *a)  # noqa: E731
        if transform == "grad of vmap":
            return torch.func.grad(lambda *a: torch.func.vmap(scalar)(*a).sum(), places)(*several)
        if transform == "vmap of grad":
            return torch.func.vmap(torch.func.grad(scalar, places))(*several)
        of = scalar if transform in ("grad", "hessian") else function
        return getattr(torch.func, transform)(of, argnums=places)(*arguments)

    assert_equal(transformed(OPERATORS[name].call), transformed(OPERATORS[name].truth))


def test_tangents_of_forward_mode(name: str) -> None:
    """A tangent for each argument in turn, also with a gradient required at the same time."""
    arguments = OPERATORS[name].arguments()
    for place in range(len(arguments)):
        found = []
        for function in (OPERATORS[name].call, OPERATORS[name].truth):
            with forward_ad.dual_level():
                duals = [x.clone().requires_grad_() for x in arguments]
                duals[place] = forward_ad.make_dual(duals[place], torch.ones_like(arguments[place]))
                tangents = [forward_ad.unpack_dual(out).tangent for out in outputs_of(function, *duals)]
            found.append([torch.zeros(()) if tangent is None else tangent.detach() for tangent in tangents])
        for tangent, expected in zip(*found, strict=True):
            assert_equal(tangent.expand_as(expected), expected)


def test_compiled_whole(name: str) -> None:
    """`fullgraph=True` refuses whatever is not traced; the back end does not matter to that."""
    call, arguments = OPERATORS[name].call, OPERATORS[name].arguments()
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert_equal(outputs_of(compiled, *arguments), outputs_of(call, *arguments))
    assert_equal(gradients(compiled, arguments), gradients(call, arguments))


def test_each_argument_alone(name: str) -> None:
    arguments = OPERATORS[name].arguments()
    together = gradients(OPERATORS[name].truth, arguments)
    for place, expected in enumerate(together):
        assert_equal(gradients(OPERATORS[name].call, arguments, {place}), [expected])


# Tokens


@pytest.mark.parametrize(
    "case", ["no images", "no tokens", "one token", "negative affinities", "zero tokens", "strided", "expanded"]
)
def test_odd_tokens(name: str, case: str) -> None:
    batch, tokens = {"no images": (0, 4), "no tokens": (2, 0), "one token": (2, 1)}.get(case, (2, 4))
    arguments = list(OPERATORS[name].arguments(batch, tokens))
    if case == "negative affinities":
        arguments[:2] = [arguments[0].abs(), -arguments[1].abs()]
    elif case == "zero tokens":
        arguments[:2] = [x * 0 for x in arguments[:2]]
    elif case == "strided":
        arguments = [torch.stack([x, x], -1)[..., 0].mT if x.dim() > 3 else x for x in arguments]
        arguments = [x.contiguous().mT if x.dim() > 3 else x for x in arguments]
    elif case == "expanded":
        arguments = [x[:1].expand(x.shape) if x.dim() else x for x in arguments]
    found, expected = (outputs_of(f, *arguments) for f in (OPERATORS[name].call, OPERATORS[name].truth))
    assert_equal(found, expected)
    found, expected = (gradients(f, tuple(arguments)) for f in (OPERATORS[name].call, OPERATORS[name].truth))
    assert_equal(found, expected)
    assert all(torch.isfinite(gradient).all() for gradient in found)


# Dtypes

SMALLEST = {torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133}
TOKENS = 40
FLOAT32 = 2 * (TOKENS + 3) * torch.finfo(torch.float32).eps / 2
"""Sums over all tokens and over a width, forward and backward; one of n addends is off by at most n·ε/2."""


def within(found: Tensor, expected: Tensor, relative: float, absolute: float = 0.0) -> bool:
    """Compare in the Frobenius norm."""
    error = torch.linalg.vector_norm(found.double() - expected)
    return bool(error <= relative * torch.linalg.vector_norm(expected) + absolute * expected.numel() ** 0.5)


@pytest.mark.parametrize("scale", [1.0, 200.0])
@pytest.mark.parametrize("dtype", SMALLEST, ids=str)
def test_gradients_of_half_precision_tokens(name: str, dtype: torch.dtype, scale: float) -> None:
    """Rounded once, from float32. At the larger scale ‖A‖_F is beyond float16's 65,504."""
    operator = OPERATORS[name]
    arguments = list(operator.arguments(1, TOKENS, dtype))
    arguments[:2] = [x * scale for x in arguments[:2]]
    leaves = [x.detach().requires_grad_() for x in arguments]
    exact = [x.detach().double().requires_grad_() for x in arguments]
    if name in ("linear_attention", "neumann_1", "neumann_3") and scale > 1:
        affinity = product.affinity_product(*(x.double() for x in (*arguments[:2], arguments[2])))[1]
        assert (affinity.sqrt() > 65504).all()
    truths = outputs_of(operator.truth, *exact)
    largest = max(g.abs().max() for g in torch.autograd.grad(truths, exact, list(map(torch.ones_like, truths)), True))
    size = 2.0 ** min(10, 14 - math.ceil(math.log2(largest)))  # gradients large, and within float16
    expected = torch.autograd.grad(truths, exact, [torch.full_like(out, size) for out in truths])
    outputs = outputs_of(operator.call, *leaves)
    found = torch.autograd.grad(outputs, leaves, [torch.full_like(out, size) for out in outputs])
    for place, (gradient, truth) in enumerate(zip(found, expected, strict=True)):
        kind = arguments[place].dtype
        half = kind in SMALLEST
        rounding = torch.finfo(kind).eps / 2 if half else 0.0
        assert gradient.dtype == kind
        assert torch.isfinite(gradient).all()
        assert within(gradient, truth, rounding + FLOAT32, SMALLEST[kind] / 2 if half else 0.0), place


def test_autocast_lowers_nothing(name: str) -> None:
    operator = OPERATORS[name]
    arguments = operator.arguments(1, TOKENS, torch.float32)
    exact = tuple(x.double() for x in arguments)
    leaves = [x.detach().requires_grad_() for x in arguments]
    with torch.autocast("cpu", torch.bfloat16):
        outputs = outputs_of(operator.call, *leaves)
    found = torch.autograd.grad(loss(lambda: outputs), leaves)
    for out, truth in zip(outputs, outputs_of(operator.truth, *exact), strict=True):
        assert out.dtype == torch.float32
        assert within(out, truth, FLOAT32)
    for gradient, truth in zip(found, gradients(operator.truth, exact), strict=True):
        assert within(gradient, truth, FLOAT32)
