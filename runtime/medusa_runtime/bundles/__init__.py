"""Bundles and compiled engines on disk, and the contract of their graphs."""
