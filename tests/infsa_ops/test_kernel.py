"""The Triton kernel of Pure InfSA: correct in Triton's interpreter, compiled for A100 and H100, run if there is a GPU.

Interpreted kernels run in their own process (`helpers/interpreted.py`), on the CPU. Compiled kernels are those that the
operators would launch on such a card, down to the cubin; this needs no card.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import interpreted
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import infsa_ops
from infsa_ops.affinity_product import reference as block
from infsa_ops.neumann_kernel import reference
from infsa_ops.triton import affinity_launch

pytestmark = pytest.mark.slow

triton = pytest.importorskip("triton")

QUERIES, KEYS = 32, 16
"""Blocks in the interpreter: small, and not the same."""

FLOAT32, FLOAT16, BFLOAT16 = DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TOLERANCE = {FLOAT32: 1e-6, FLOAT16: 2.0**-10, BFLOAT16: 2.0**-8}
"""Relative, against float64 of the same inputs: a rounding of A, and of v after the first term, in 16 bits."""

GOLDEN = sorted((Path(__file__).parents[1] / "golden").glob("attention_*.safetensors"))


@pytest.fixture(scope="module")
def interpreter():
    """(function of `interpreted`, its arguments) → what it gives."""
    with ProcessPoolExecutor(1, get_context("spawn"), interpreted.start, (QUERIES, KEYS)) as pool:
        yield lambda function, *arguments: pool.submit(function, *arguments).result()


@pytest.fixture(scope="module")
def by_kernel(interpreter):
    """(operator, its arguments) → its result, by so many launches as said."""

    def run(name: str, *arguments: Any, launches: int = 1) -> Any:
        result, launched = interpreter(interpreted.call, name, *arguments)
        assert launched == launches
        return result

    return run


def tokens_of(n, m, width, value_width, dtype, batch=2, heads=2, seed=0):
    """q, k and v as a network has them: views of `[B, N, H·d]`."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((n, width), (m, width), (m, value_width))
    wide = [torch.randn(batch, rows, heads * columns, generator=generator).to(dtype) for rows, columns in shapes]
    return [x.unflatten(2, (heads, -1)).transpose(1, 2) for x in wide]


def assert_a_block_is_right(result, q, k, v, relative_error):
    (product, squares), (expected, expected_squares) = (
        result,
        block.affinity_product(q.double(), k.double(), v.double()),
    )
    assert product.dtype == squares.dtype == torch.float32
    assert relative_error(product, expected) <= TOLERANCE[q.dtype]
    torch.testing.assert_close(squares.double(), expected_squares, rtol=5e-6, atol=0)  # one pair may cancel


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (3, 50), (QUERIES, KEYS), (QUERIES + 1, 2 * KEYS + 1)])
def test_any_number_of_tokens(queries, keys, dtype, by_kernel, relative_error):
    q, k, v = tokens_of(queries, keys, 24, 12, dtype)
    assert_a_block_is_right(by_kernel("affinity_product", q, k, v), q, k, v, relative_error)
    squares = by_kernel("affinity_squared_norm", q, k)
    torch.testing.assert_close(squares, by_kernel("affinity_product", q, k, v)[1], rtol=0, atol=0)


@pytest.mark.parametrize("width", [8, 16, 32, 64, 80, 96, 128])
def test_any_width(width, by_kernel, relative_error):
    for dtype in (FLOAT32, FLOAT16):
        q, k, v = tokens_of(9, 20, width, 136 - width, dtype, 1)
        assert_a_block_is_right(by_kernel("affinity_product", q, k, v), q, k, v, relative_error)


def test_any_strides(by_kernel, relative_error):
    q, k, v = (torch.randn(2, 3, width, 40) for width in (16, 16, 24))
    q, k, v = q.mT, k.mT[:, :, ::3], v.mT[:, :, 1:28:2]
    assert_a_block_is_right(by_kernel("affinity_product", q, k, v), q, k, v, relative_error)
    shared = k[:, :1].expand(-1, 3, -1, -1)
    assert_a_block_is_right(by_kernel("affinity_product", q, shared, v), q, shared, v, relative_error)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("terms", [1, 3])
@pytest.mark.parametrize("scale", [1.0, 1e3, 1e-4])
def test_terms_and_magnitudes(scale, terms, dtype, by_kernel, relative_error):
    """Products q·k overflow float16 at 1e3 and are far below its smallest number at 1e-4, where ε decides."""
    q, k, v = tokens_of(50, 50, 16, 12, dtype)
    q, k = q * scale, k * scale
    rho = torch.tensor([0.5, 0.95])
    mixed = by_kernel("neumann_kernel", q, k, v, rho, terms, launches=terms)
    assert mixed.dtype == dtype
    assert mixed.stride() == torch.empty_like(v).stride()
    expected = reference.neumann_kernel(q.double(), k.double(), v.double(), rho.double(), terms)
    assert relative_error(mixed, expected) <= terms * TOLERANCE[dtype]
    v = v * scale
    assert_a_block_is_right(by_kernel("affinity_product", q, k, v), q, k, v, relative_error)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_massive_channels_and_tokens_that_dominate(dtype, by_kernel, relative_error):
    q, k, v = tokens_of(50, 50, 16, 16, dtype)
    q[..., 3] *= 200
    k[..., 3] *= 200
    v[..., 5] *= 1000
    q[:, :, 17] *= 50
    k[:, :, 9] *= 50
    product, squares = by_kernel("affinity_product", q, k, v)
    assert_a_block_is_right((product, squares), q, k, v, relative_error)
    # every row for itself, not only those of the tokens that dominate
    expected, _ = block.affinity_product(q.double(), k.double(), v.double())
    rows = torch.linalg.vector_norm(product - expected, dim=-1) / torch.linalg.vector_norm(expected, dim=-1)
    assert rows.max() <= 4 * TOLERANCE[dtype]


def test_squares_of_a_blank_image(by_kernel):
    """Equal addends, whose roundings don't cancel: a plain float32 sum over 300 blocks of keys is off by 4e-6."""
    one = torch.full((1, 1, 300 * KEYS, 16), 103 / 128)  # its affinities are exact
    squares = by_kernel("affinity_squared_norm", one[:, :, :1], one)
    expected = 300 * KEYS * one[0, 0, 0, 0].double() ** 4
    torch.testing.assert_close(squares[0, 0].double(), expected, rtol=3e-7, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tokens_that_attend_to_nothing(dtype, by_kernel):
    q = torch.ones(1, 2, 40, 16, dtype=dtype)
    for queries, keys in ((q, -q), (0 * q, q), (q, 0 * q)):
        product, squares = by_kernel("affinity_product", queries, keys, q)
        assert (product == 0).all()
        assert (squares == 0).all()
        assert (by_kernel("neumann_kernel", queries, keys, q, 0.9, 2, launches=2) == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_token_that_is_not_a_number_is_not_hidden(dtype, by_kernel):
    q, k, v = tokens_of(5, 5, 16, 16, dtype)
    q[:, :, 2, 0] = torch.nan
    product, squares = by_kernel("affinity_product", q, k, v)
    assert product[:, :, 2].isnan().all()
    assert squares.isnan().all()
    assert not product[:, :, :2].isnan().any()


@settings(max_examples=8, deadline=None)
@given(query_cut=st.integers(0, 40), key_cut=st.integers(0, 40), seed=st.integers(0, 2**31))
def test_blocks_add(query_cut, key_cut, seed, interpreter):
    q, k, v = tokens_of(40, 40, 16, 16, FLOAT32, 1, 1, seed)
    (whole, total), _ = interpreter(interpreted.call, "affinity_product", q, k, v)
    rows, squares = [], torch.zeros(1, 1, dtype=torch.float64)
    for queries in (q[:, :, :query_cut], q[:, :, query_cut:]):
        parts = []
        for keys in (slice(key_cut), slice(key_cut, None)):
            (product, square), _ = interpreter(
                interpreted.call, "affinity_product", queries, k[:, :, keys], v[:, :, keys]
            )
            parts.append(product)
            squares += square
        rows.append(sum(parts))
    torch.testing.assert_close(torch.cat(rows, 2), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(squares, total.double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden(path, by_kernel, relative_error):
    golden = load_file(path)
    mixed = by_kernel("neumann_kernel", *(golden[name] for name in ("q", "k", "v", "rho")))
    assert relative_error(mixed, golden["pure_infsa.out_f64"]) <= 5e-6


def test_values_of_another_dtype(by_kernel, relative_error):
    for dtype, other in ((FLOAT32, FLOAT16), (FLOAT16, FLOAT32), (BFLOAT16, FLOAT32)):
        q, k, _ = tokens_of(20, 30, 16, 16, dtype)
        v = tokens_of(20, 30, 16, 16, other)[2] * 1000
        product, _ = by_kernel("affinity_product", q, k, v)
        expected, _ = block.affinity_product(q.double(), k.double(), v.double())
        assert relative_error(product, expected) <= 2 * TOLERANCE[dtype]


def test_gradients_are_those_of_the_reference(interpreter):
    q, k, v = (x.contiguous() for x in tokens_of(20, 20, 16, 16, FLOAT32))
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    expected = torch.autograd.grad(reference.neumann_kernel(*leaves, 0.9, 2).square().sum(), leaves)
    for got, truth in zip(interpreter(interpreted.gradients, q, k, v, 0.9, 2), expected, strict=True):
        torch.testing.assert_close(got.double(), truth, rtol=1e-4, atol=1e-6)


def test_torch_knows_its_shapes_and_strides(interpreter):
    q, k, v = tokens_of(20, 20, 16, 8, FLOAT16, 1)
    interpreter(interpreted.opcheck, "affinity_product", q, k, v)
    interpreter(interpreted.opcheck, "affinity_squared_norm", q, k)
    interpreter(interpreted.opcheck, "neumann_kernel", q, k, v, torch.tensor(0.9), 2)


def test_what_the_kernel_does_not_take_is_computed_without_it(by_kernel):
    exact = [x.double() for x in tokens_of(5, 5, 16, 16, FLOAT32)]
    wide = tokens_of(5, 5, 16, 129, FLOAT32)
    none = tokens_of(5, 0, 16, 16, FLOAT32)
    for q, k, v in (exact, wide, none):
        product, squares = by_kernel("affinity_product", q, k, v, launches=0)
        expected, expected_squares = block.affinity_product(q, k, v)
        torch.testing.assert_close(product, expected)
        torch.testing.assert_close(squares, expected_squares)


def test_without_triton_torch_computes_and_says_so_once(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "infsa_ops.triton.affinity_kernel", raising=False)
    monkeypatch.setattr(affinity_launch, "capability", lambda device: (9, 0))
    affinity_launch._kernel.cache_clear()
    q = torch.ones(1, 1, 4, 16)
    with pytest.warns(UserWarning, match="without its kernel.*pip install triton"):
        assert affinity_launch.sweeps_for(q, q) is affinity_launch.TILED
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert affinity_launch.sweeps_for(q, q) is affinity_launch.TILED
    affinity_launch._kernel.cache_clear()


@pytest.mark.parametrize(
    ("module", "operator"),
    [
        ("neumann_kernel", "_neumann_kernel"),
        ("affinity_product", "affinity_product"),
        ("affinity_squared_norm", "affinity_squared_norm"),
    ],
)
def test_torch_is_told_what_runs_on_a_gpu(module, operator):
    """CUDA has its own implementation, visible without a GPU; the tests above run it."""
    assert "cuda" in getattr(importlib.import_module(f"infsa_ops.{module}.op"), operator)._backend_fns


# Compiled for a card that isn't there

SHARED_MEMORY = {80: 99 * 1024, 90: 227 * 1024}
"""Bytes a program may have. An A100 has 163 KiB, but its blocks serve 8.6, 8.9 and 12.0 too, which have 99 (CUDA C++
Programming Guide, technical specifications per compute capability)."""

SPILLED = 0 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9) else 64
"""Bytes of a thread's registers: none by the version that `dev` installs; 3.7 spills 40 of 255 · 4 in one form."""


class Card:
    """Driver properties of a card that Triton reads before it compiles."""

    def __init__(self, capability: int) -> None:
        self.target = triton.backends.compiler.GPUTarget("cuda", capability, 32)

    def get_current_device(self) -> int:
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target


class Compiler:
    """Stands in for the kernel: compiles what would be launched."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def compile_it(*arguments: Any, **options: Any) -> None:
            self.grid = grid
            self.compiled = self.kernel.warmup(*arguments, grid=grid, **options)

        return compile_it


@pytest.fixture
def compile_for(monkeypatch, tmp_path):
    """(capability, form, q, k, v) → the grid and the compiled kernel of that form."""

    def run(capability: int, form: str, q: Any, k: Any, v: Any) -> tuple[tuple[int, ...], Any]:
        from infsa_ops.triton.affinity_kernel import affinity

        compiler = Compiler(affinity)
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
        monkeypatch.setattr(triton.runtime.driver, "_active", Card(capability))
        monkeypatch.setattr(affinity_launch, "_kernel", lambda: compiler)
        monkeypatch.setattr(affinity_launch, "capability", lambda device: divmod(capability, 10))
        operands = (q, k) if form == "squares" else (q, k, v)
        sweeps = affinity_launch.sweeps_for(*operands)
        assert sweeps is affinity_launch.KERNEL
        getattr(sweeps, form)(*operands)
        return compiler.grid, compiler.compiled

    return run


def resources(compiled: Any, folder: Path) -> dict[str, int]:
    """Registers of a thread, and what it spills to its stack, of a cubin."""
    (folder / "kernel.cubin").write_bytes(compiled.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", folder / "kernel.cubin"]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", told)}


def shapes_of(tokens, width, value_width, dtype):
    """q, k and v without data, laid out as a network has them."""
    widths = (width, width, value_width)
    return [torch.empty(2, tokens, 3, w, dtype=dtype, device="meta").transpose(1, 2) for w in widths]


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("form", "width", "value_width"), [
    ("product_and_squares", 64, 64), ("product", 64, 64), ("squares", 64, 64),
    ("product_and_squares", 128, 128), ("squares", 128, 128),
])  # fmt: skip
def test_it_compiles_for_the_card(form, width, value_width, dtype, capability, compile_for, tmp_path):
    grid, compiled = compile_for(capability, form, *shapes_of(4097, width, value_width, dtype))
    ptx = compiled.asm["ptx"]
    widest = width if form == "squares" else max(width, value_width)
    blocks = affinity_launch.BLOCKS[divmod(capability, 10)][torch.finfo(dtype).bits, 64 if widest <= 64 else 128]
    assert grid == (2 * 3 * -(-4097 // blocks.queries),)

    number = {FLOAT32: "tf32", FLOAT16: "f16", BFLOAT16: "bf16"}[dtype]
    instruction = {
        80: rf"mma\.sync\.aligned\.m16n8k\d+\.row\.col\.f32\.{number}",
        90: rf"wgmma\.mma_async.*\.f32\.{number}",
    }
    assert re.search(instruction[capability], ptx)
    assert re.search(r"cp\.async\.cg\.shared\.global.*\b(16|0x10)\b", ptx)  # rows are read 16 bytes at a time

    assert compiled.metadata.shared <= SHARED_MEMORY[capability]
    used = resources(compiled, tmp_path)
    assert used["STACK"] + used["LOCAL"] <= SPILLED, used

    pointers = {"product_and_squares": 5, "product": 4, "squares": 3}[form]
    pointers += dtype == FLOAT16 and form != "squares"  # the longest keys
    strides = 3 * (2 if form == "squares" else 4)  # that of columns is the constant 1
    sizes, scratch = 3, 2  # Triton's own scratch memory: it is always an argument
    parameters = len(re.findall(r"^\s*\.param .*affinity_param_\d+", ptx, re.MULTILINE))
    assert parameters == pointers + strides + sizes + scratch


@pytest.mark.parametrize("capability", [80, 90])
def test_widths_between_powers_of_two_compile(capability, compile_for, tmp_path):
    _, compiled = compile_for(capability, "product_and_squares", *shapes_of(4097, 80, 96, FLOAT32))
    assert compiled.metadata.shared <= SHARED_MEMORY[capability]
    assert resources(compiled, tmp_path)["STACK"] <= SPILLED


def test_a_hundred_thousand_tokens_need_no_other_kernel(compile_for):
    """Sizes are arguments, not constants: nothing is compiled again for an image of another size."""
    _, first = compile_for(90, "squares", *shapes_of(4097, 64, 64, FLOAT16))
    grid, second = compile_for(90, "squares", *shapes_of(331_777, 64, 64, FLOAT16))
    assert second.hash == first.hash
    assert grid[0] == 2 * 3 * -(-331_777 // 128)


# On a card

gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device: the kernel is not run, only compiled"
)
ON_CARD = {FLOAT32: 1e-5, FLOAT16: 5e-3, BFLOAT16: 5e-3}


@gpu
@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("terms", [1, 3])
@pytest.mark.parametrize("width", [64, 128])
def test_on_the_card(width, terms, dtype, relative_error):
    q, k, v = (x.cuda() for x in tokens_of(4097, 4097, width, 64, dtype, 1))
    assert affinity_launch.sweeps_for(q, k, v) is affinity_launch.KERNEL
    expected = reference.neumann_kernel(q.double(), k.double(), v.double(), 0.95, terms)
    assert relative_error(infsa_ops.neumann_kernel(q, k, v, 0.95, terms), expected) <= ON_CARD[dtype]
    product, squares = infsa_ops.affinity_product(q, k, v)
    expected, expected_squares = block.affinity_product(q.double(), k.double(), v.double())
    assert relative_error(product, expected) <= ON_CARD[dtype]
    torch.testing.assert_close(squares.double(), expected_squares, rtol=ON_CARD[FLOAT32], atol=0)
    torch.testing.assert_close(infsa_ops.affinity_squared_norm(q, k), squares, rtol=ON_CARD[FLOAT32], atol=0)


@gpu
@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_the_card_a_blank_image(dtype):
    """All addends of every sum are equal: roundings don't cancel."""
    q = torch.full((1, 1, 20_737, 64), 1.1, dtype=dtype, device="cuda")
    product, squares = infsa_ops.affinity_product(q, q, q)
    one = q[0, 0, 0, 0].double() ** 2
    torch.testing.assert_close(squares[0, 0].double(), one**2 * 20_737**2, rtol=ON_CARD[FLOAT32], atol=0)
    expected = (one * q[0, 0, 0, 0].double() * 20_737).expand_as(product)
    tolerance = 4e-5 if dtype == FLOAT32 else ON_CARD[dtype]  # a plain float32 sum over 1296 blocks of keys
    torch.testing.assert_close(product.double(), expected, rtol=tolerance, atol=0)


@gpu
@needs_gpu
def test_on_the_card_offsets_pass_32_bits(relative_error):
    """102 heads of 331,777 keys: 4.3 GB, 2³¹ numbers and more."""
    k = torch.zeros(1, 102, 331_777, 64, dtype=FLOAT16, device="cuda")
    k[:, -1, ::1000] = 1
    q = torch.ones(1, 102, 16, 64, dtype=FLOAT16, device="cuda")
    product, squares = infsa_ops.affinity_product(q, k, k)
    assert (product[:, :-1] == 0).all()
    assert (squares[:, :-1] == 0).all()
    torch.testing.assert_close(product[:, -1], torch.full_like(product[:, -1], 332.0), rtol=1e-3, atol=0)
    torch.testing.assert_close(squares[:, -1], torch.full_like(squares[:, -1], 16 * 332.0))
