"""Constants of graphs and files that trade one cost for another. None of them changes what a graph computes."""

from __future__ import annotations

# Bytes of the largest tensor that is stored in the graph's file. Larger ones are in the file of weights.
EXTERNAL_THRESHOLD = 2048

# Elements of the largest constant that is folded while a graph is simplified.
LARGEST_FOLDED = 4096

# Elements of the largest constant whose values a rewrite looks at.
LARGEST_INSPECTED = 16

# Rows of rotary tables beyond the longest sequence: padding and drafts at the end of a sequence have such positions.
TABLE_SLACK = 1024

# Bytes of the largest rotary table that a derived graph keeps. Cosines of longer ones are computed in each step.
LARGEST_TABLE = 2**28

# The least number of blocks in which the best logit is searched by block. Fewer save nothing.
FEWEST_BLOCKS = 8

# The most inputs of the nodes that gather the blocks of all layers. ONNX Runtime captures no Concat of more as part of
# a CUDA graph, and copies the list of its inputs to the GPU in each step.
MOST_CONCATENATED = 32
