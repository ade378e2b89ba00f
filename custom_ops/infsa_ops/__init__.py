"""Operators of Infinite Self-Attention (arXiv 2603.00175): torch ops, exported to ONNX as nodes of domain `infsa`."""

from infsa_ops.affinity_product import affinity_product
from infsa_ops.affinity_squared_norm import affinity_squared_norm
from infsa_ops.common import DOMAIN, EPSILON, VERSION
from infsa_ops.linear_state import linear_attention, linear_state_update
from infsa_ops.neumann_kernel import neumann_kernel

ALL = ("linear_state", "neumann_kernel", "affinity_squared_norm", "affinity_product")
"""Names of the operators; each has a folder. To add one, add a folder with the same file names and its name here."""

__all__ = [
    "ALL",
    "DOMAIN",
    "EPSILON",
    "VERSION",
    "affinity_product",
    "affinity_squared_norm",
    "linear_attention",
    "linear_state_update",
    "neumann_kernel",
]
