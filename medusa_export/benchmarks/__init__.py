"""Decoding speed: measured and reported."""
