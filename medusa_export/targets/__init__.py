"""Exports to bundles, and graphs for ONNX Runtime and TensorRT."""
