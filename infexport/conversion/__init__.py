"""A checkpoint → ONNX graphs → a bundle → TensorRT engines."""
