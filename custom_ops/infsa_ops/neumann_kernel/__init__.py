"""`NeumannKernel`, the attention of Pure InfSA."""

from infsa_ops.neumann_kernel.op import neumann_kernel

__all__ = ["neumann_kernel"]
