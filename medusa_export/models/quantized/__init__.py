"""Packed weights in files of Hugging Face's layout: one file for each method of quantization."""
