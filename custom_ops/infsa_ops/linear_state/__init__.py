"""`LinearInfSAStateUpdate`, the state of Linear-InfSA, and the attention built from it."""

from infsa_ops.linear_state.attention import linear_attention
from infsa_ops.linear_state.op import linear_state_update

__all__ = ["linear_attention", "linear_state_update"]
