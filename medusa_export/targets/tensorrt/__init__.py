"""Compiles bundles to TensorRT engines."""
