"""The decoding step in PyTorch: attention, acceptance, sampling and the layout of its caches."""
