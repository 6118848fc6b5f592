"""ONNX Runtime backends."""
