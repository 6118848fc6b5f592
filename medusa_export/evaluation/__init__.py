"""Compares quantized bundles with the unquantized model: logits, and acceptance of heads."""
