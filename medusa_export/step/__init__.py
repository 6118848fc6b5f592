"""The decoding step in PyTorch: attention, sampling, acceptance and the slots of its caches."""
