"""`AffinityProduct`, a block of Pure InfSA before normalisation."""

from infsa_ops.affinity_product.op import affinity_product

__all__ = ["affinity_product"]
