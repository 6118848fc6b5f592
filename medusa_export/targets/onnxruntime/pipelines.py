"""The graphs that are derived for ONNX Runtime, and their rewrites.

They refer to the weights of the standard graph and compute the same step with ONNX Runtime's own operators. In those
for a CPU a decoder layer has a third of the nodes; in the place of pending entries they have the output
``accepted_path``. The graph for CUDA has the inputs and outputs of the standard graph.
"""

from __future__ import annotations

from medusa_export.graph.rewrites.pipeline import Pipeline
from medusa_export.graph.rewrites.rewrite import Rewrite
from medusa_export.targets.onnxruntime.best_token import SplitArgMax
from medusa_export.targets.onnxruntime.block_sums import SumBlocks
from medusa_export.targets.onnxruntime.block_weights import FuseBlockWeights
from medusa_export.targets.onnxruntime.cache_writes import WriteNewEntriesOnly
from medusa_export.targets.onnxruntime.constants import CONTRIB
from medusa_export.targets.onnxruntime.float8_weights import SpellOutFloat8Weights
from medusa_export.targets.onnxruntime.greedy_steps import SkipSamplingInGreedySteps
from medusa_export.targets.onnxruntime.group_query_attention import FuseGroupQueryAttention
from medusa_export.targets.onnxruntime.integer_products import FuseIntegerProducts
from medusa_export.targets.onnxruntime.latent_attention import AbsorbLatentExpansion
from medusa_export.targets.onnxruntime.linears import FuseTransposedWeights
from medusa_export.targets.onnxruntime.multi_head_attention import FuseMultiHeadAttention
from medusa_export.targets.onnxruntime.pending_entries import ReplacePendingEntries
from medusa_export.targets.onnxruntime.plain_masks import SkipMasksInPlainSteps
from medusa_export.targets.onnxruntime.plain_trees import SkipTreesInPlainSteps
from medusa_export.targets.onnxruntime.row_exact_attention import MakeAttentionRowExact
from medusa_export.targets.onnxruntime.shared_heads import ReadSharedHeadsOnce
from medusa_export.targets.onnxruntime.sinks import GatherSinks
from medusa_export.targets.onnxruntime.skip_norms import FuseSkipNorms
from medusa_export.targets.onnxruntime.split_heads import SplitHeadsTogether
from medusa_export.targets.onnxruntime.unused_heads import SkipUnusedHeads
from medusa_runtime.bundles.bundle import ONNXRUNTIME_BATCH_GRAPH, ONNXRUNTIME_CUDA_GRAPH, ONNXRUNTIME_GRAPH

_FUSIONS: tuple[type[Rewrite], ...] = (
    ReplacePendingEntries,
    FuseIntegerProducts,
    FuseSkipNorms,
    FuseBlockWeights,
    SkipUnusedHeads,
    SumBlocks,
    SpellOutFloat8Weights,
    FuseTransposedWeights,
)
_BRANCHES: tuple[type[Rewrite], ...] = (SkipSamplingInGreedySteps, SkipTreesInPlainSteps, SplitArgMax)
_DOMAINS = {CONTRIB: 1}

# Of the three rewrites of attention in a pipeline, the first is for weights in integers, the second for latent caches,
# and the third for all others.
ONE_ROW = Pipeline(
    ONNXRUNTIME_GRAPH,
    GatherSinks,
    MakeAttentionRowExact,
    AbsorbLatentExpansion,
    FuseGroupQueryAttention,
    *_FUSIONS,
    SkipMasksInPlainSteps,
    *_BRANCHES,
    domains=_DOMAINS,
)
SEVERAL_ROWS = Pipeline(
    ONNXRUNTIME_BATCH_GRAPH,
    MakeAttentionRowExact,
    AbsorbLatentExpansion,
    FuseMultiHeadAttention,
    WriteNewEntriesOnly,
    *_FUSIONS,
    *_BRANCHES,
    domains=_DOMAINS,
)
CUDA = Pipeline(
    ONNXRUNTIME_CUDA_GRAPH,
    SplitHeadsTogether,
    ReadSharedHeadsOnce,
    FuseSkipNorms,
    FuseBlockWeights,
    SpellOutFloat8Weights,
    domains=_DOMAINS,
)
DERIVED = (ONE_ROW, SEVERAL_ROWS, CUDA)
