"""Centrality: attention is the chain's that the paper says it is."""
