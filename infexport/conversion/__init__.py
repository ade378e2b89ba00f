"""Convert a checkpoint to ONNX graphs, a bundle and TensorRT engines."""
