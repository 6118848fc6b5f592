"""Checks bundles, backends and weights against PyTorch."""
