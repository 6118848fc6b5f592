"""Optimization profiles: the ranges of shapes that an engine is optimized for."""

from __future__ import annotations

from medusa_runtime.bundles.bundle import Bundle
from medusa_runtime.bundles.compiled import EngineLimits, Profile
from medusa_runtime.bundles.contract import MAX_EDITS
from medusa_runtime.sampling import draws_ahead

# Nodes of the tree that kernels for decoding are chosen for.
USUAL_TREE = 16


def profiles_for(bundle: Bundle, limits: EngineLimits) -> tuple[Profile, Profile]:
    """Returns the ranges of sizes that the engine is optimized for: a profile for decoding, and one for prefill.

    The optimum has no draws, no constraints and no ranked places, as most steps have none. With an optimum of any draws
    TensorRT-RTX 1.7.1 did not finish within 25 minutes. With 10 of the 26 halvings of the search for the end of a
    nucleus it takes seconds.
    """
    batch = (1, 1, limits.max_batch)
    tree = bundle.tree.size
    chosen = {"draws": (0, 0, draws_ahead(bundle.tree))}
    if bundle.constraints:
        chosen |= {"edits": (0, 0, MAX_EDITS), "masks": (0, 0, tree)}
    if bundle.top_logprobs:
        chosen |= {"ranked": (0, 0, bundle.slots.most_committed)}
    return (
        Profile("decode", batch, (1, min(tree, USUAL_TREE), tree), **chosen),
        Profile("prefill", batch, (1, max(limits.max_prefill // 2, 1), limits.max_prefill), **chosen),
    )
