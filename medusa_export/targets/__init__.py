"""What a graph is written for: a bundle, ONNX Runtime, TensorRT."""
