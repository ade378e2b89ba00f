"""`AffinitySquaredNorm`, the divisor of Pure InfSA."""

from infsa_ops.affinity_squared_norm.op import affinity_squared_norm

__all__ = ["affinity_squared_norm"]
