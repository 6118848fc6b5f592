"""Compiles a decoding step to one standard ONNX graph."""
