"""The affinity operators on a GPU, in Triton's language."""
