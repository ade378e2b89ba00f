"""Other systems that run bundles: Ray and Triton Inference Server."""
