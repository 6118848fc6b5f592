"""Rewrites for TensorRT alone, applied in memory when an engine is built.

Their results are standard ONNX and compute the same. TensorRT's parser makes fewer layers of them. ONNX Runtime never
sees them.
"""
