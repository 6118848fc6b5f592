"""Compile a Hugging Face causal LM with MEDUSA heads into one standard ONNX graph."""
