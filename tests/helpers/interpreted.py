"""The operators on the CPU through their Triton kernel, in Triton's interpreter. For a process of its own.

Triton decides when it is imported whether it interprets, and other tests compile: `start` goes first.

The interpreter multiplies in float32 where tf32x3 is asked for, multiplies the bits of bfloat16 as integers, and
truncates to bfloat16. `_dot` and `_cast` do what tensor cores do, except that sums inside these round towards zero.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

import infsa_ops
from infsa_ops.triton import affinity_launch


def start(queries: int, keys: int) -> None:
    """Interpret, in blocks of so many queries and keys; and send CPU tensors where CUDA's would go."""
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.runtime import interpreter

    interpreter.InterpreterBuilder.create_dot = _dot
    interpreter.InterpreterBuilder.cast_impl = _cast(interpreter.InterpreterBuilder.cast_impl)
    affinity_launch.capability = lambda device: (8, 0)
    affinity_launch.blocks_for = lambda device, dtype, width: affinity_launch.Blocks(queries, keys, 1, 1)
    for name in ("neumann_kernel", "affinity_product", "affinity_squared_norm"):
        module = importlib.import_module(f"infsa_ops.{name}.op")
        operator = getattr(module, "_neumann_kernel" if name == "neumann_kernel" else name)
        operator.register_kernel("cpu", module._on_gpu)
    torch.set_num_threads(1)


def call(name: str, *arguments: Any) -> Any:
    """The operator `name`; it must have gone through the kernel."""
    launches = []
    launch = affinity_launch._launch
    affinity_launch._launch = lambda *given: launches.append(given) or launch(*given)
    try:
        return getattr(infsa_ops, name)(*arguments), len(launches)
    finally:
        affinity_launch._launch = launch


def gradients(q: Tensor, k: Tensor, v: Tensor, rho: float, terms: int) -> tuple[Tensor, ...]:
    """Of the sum of squares of the Neumann kernel."""
    leaves = [tensor.detach().requires_grad_() for tensor in (q, k, v)]
    return torch.autograd.grad(infsa_ops.neumann_kernel(*leaves, rho, terms).square().sum(), leaves)


def opcheck(name: str, *arguments: Any) -> None:
    torch.library.opcheck(getattr(torch.ops.infsa, name).default, arguments)


def _tf32(x: np.ndarray) -> np.ndarray:
    """Rounded to 10 bits after the point, ties away from zero, as `cvt.rna.tf32.f32` does."""
    return _cut(x.view(np.uint32) + np.uint32(1 << 12))


def _cut(bits: np.ndarray) -> np.ndarray:
    """What a tensor core reads of a float32 number."""
    return (bits & np.uint32(0xFFFFE000)).view(np.float32)


def _dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
    from triton import language as tl

    if a.dtype.scalar == tl.float32:
        assert "TF32x3" in str(input_precision)
        big_a, big_b = _tf32(a.data), _tf32(b.data)
        small_a, small_b = (_cut(rest.view(np.uint32)) for rest in (a.data - big_a, b.data - big_b))
        product = small_a @ big_b + big_a @ small_b + big_a @ big_b
    elif a.dtype.scalar == tl.bfloat16:
        wide_a, wide_b = ((x.data.astype(np.uint32) << 16).view(np.float32) for x in (a, b))
        product = wide_a @ wide_b
    else:
        product = a.data.astype(np.float32) @ b.data.astype(np.float32)
    return type(d)(product + d.data, d.dtype.scalar)


def _cast(cast_impl: Callable[..., Any]) -> Callable[..., Any]:
    from triton import language as tl

    def cast(self: Any, source: Any, target: Any) -> Any:
        if (source.dtype.scalar, target.scalar) != (tl.float32, tl.bfloat16):
            return cast_impl(self, source, target)
        bits = np.ascontiguousarray(source.data).view(np.uint32)
        odd = (bits >> 16) & 1  # ties to even
        return type(source)(((bits + 0x7FFF + odd) >> 16).astype(np.uint16), tl.bfloat16)

    return cast
