"""A bundle and images → predictions; needs neither torch nor onnx."""
