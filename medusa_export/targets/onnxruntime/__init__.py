"""Graphs derived for ONNX Runtime."""
