"""The rewrites of the standard graph. Their results are standard ONNX."""

from __future__ import annotations

from medusa_export.graph.rewrites.block_weights import QuantizeWeights
from medusa_export.graph.rewrites.float8_weights import StoreFloat8Weights
from medusa_export.graph.rewrites.half_weights import StoreHalfWeights
from medusa_export.graph.rewrites.integer_products import QuantizeProducts
from medusa_export.graph.rewrites.linears import LayOutLinears, MergeLinears
from medusa_export.graph.rewrites.pipeline import Pipeline
from medusa_export.graph.rewrites.rms_norm import FuseRmsNorm
from medusa_export.graph.rewrites.rotary_embedding import FuseRotaryEmbedding
from medusa_export.graph.rewrites.row_index import GatherRows
from medusa_export.graph.rewrites.turned_linears import TurnLinears
from medusa_runtime.bundles.bundle import GRAPH

STANDARD = Pipeline(
    GRAPH,
    FuseRmsNorm,
    FuseRotaryEmbedding,
    GatherRows,
    TurnLinears,
    MergeLinears,
    QuantizeProducts,
    QuantizeWeights,
    StoreFloat8Weights,
    LayOutLinears,
    StoreHalfWeights,
)
