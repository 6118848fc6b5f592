"""The backends that run graphs with ONNX Runtime."""
