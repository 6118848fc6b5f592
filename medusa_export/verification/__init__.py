"""Parity of bundles, backends and weights with PyTorch."""
