"""Stubs of CUDA's libraries: a library that needs CUDA loads and runs on them without a GPU, and computes nothing."""
