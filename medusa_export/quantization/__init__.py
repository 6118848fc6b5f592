"""Quantizes models with calibration on text, and writes them as checkpoints."""
