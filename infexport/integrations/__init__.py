"""Bundles in other systems: Ray and Triton Inference Server."""
