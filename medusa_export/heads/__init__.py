"""Heads: their architectures, their modules, and their files."""
