"""Defaults that a function and its command share. This module imports nothing, so that ``--help`` is instant."""

from __future__ import annotations

from typing import Final

# Draft trees
TREE = "default"
TREE_SIZE = 64  # nodes of a tree that is searched, the root included
TOP_K = 10  # candidates per head

ACCEPTANCE_RULES = ("exact", "typical")  # names

# Types of floating-point numbers
EXPORT_DTYPE: Final = "fp32"  # weights and caches of a bundle
HEADS_DTYPE: Final = "fp16"  # weights in a file of heads

# TensorRT engines
FLAVOR = "auto"
MAX_BATCH = 4  # rows
OPT_LEVEL = 3

# Services
SERVICE_ROWS = 4

# Verification
VERIFIED_TOKENS = 32  # per prompt
PREFILL_CHUNKS = (512, 5)  # tokens

# Benchmarks
BENCH_TOKENS = 96  # per prompt
BENCH_REPEATS = 3
BENCH_TOLERANCE = 0.1  # share by which a ratio may be worse than an earlier one

# Quantization and its quality
QUANTIZED_WEIGHTS: Final = "int4"
QUALITY_TOKENS = 256  # per answer of the model
QUALITY_LENGTH = 512  # tokens of a text

# Heads
HEAD_ARCHITECTURE = "medusa"
HEADS_LAYOUT: Final = "own"

# Training data
MAX_LENGTH = 2048  # tokens of a conversation
ACTIVATION_SAMPLES = 64  # conversations that ranges of activations are measured on

# Matrices of integers: columns per scale. With larger blocks of 4-bit integers, the bits that ONNX Runtime computes for
# a row depend on the number of rows.
BLOCK_SIZE = 32
