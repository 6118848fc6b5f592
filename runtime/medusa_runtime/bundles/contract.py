"""The graph contract: names, shapes and types of the step's inputs and outputs (version 3).

B is the batch, S the new tokens, C the cache capacity, T the nodes of the tree, M its depth, L the
layers, N the key/value heads of a layer and d their size. ``docs/contract.md`` says what each means.

Version 1 had no sampling; it is what version 3 is without. Version 2 drew tokens with one number each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

CONTRACT_VERSION = 3
MAX_TOP_K = 256  # the most that top-k sampling may leave
RACE_BLOCK = 256  # tokens that are drawn from together: first a block of the vocabulary is drawn, then one of it


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of the graph; free dimensions have names."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


def fixed_shape(spec: TensorSpec, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """A tensor's shape with named dimensions by their sizes; -1 for those that have none."""
    return tuple(size if isinstance(size, int) else sizes.get(size, -1) for size in spec.shape)


def cache_name(role: str, index: int) -> str:
    """``past_key_3`` for role ``past`` and cache 6: keys and values of the layers alternate."""
    return f"{role}_{'value' if index % 2 else 'key'}_{index // 2}"


def num_blocks(vocab_size: int) -> int:
    """Blocks of ``RACE_BLOCK`` tokens that a vocabulary has, the last of which may be filled up."""
    return -(-vocab_size // RACE_BLOCK)


def numbers_per_draw(vocab_size: int) -> int:
    """How many numbers a token is drawn with: one for each block, and one for each token of a block."""
    return num_blocks(vocab_size) + RACE_BLOCK


# How a row samples.
POLICY_INPUTS = (
    TensorSpec("temperature", "float32", ("batch",)),
    TensorSpec("top_k", "int64", ("batch",)),
    TensorSpec("top_p", "float32", ("batch",)),
    TensorSpec("min_p", "float32", ("batch",)),
    TensorSpec("typical_epsilon", "float32", ("batch",)),
    TensorSpec("typical_alpha", "float32", ("batch",)),
)


def sampling_inputs(vocab_size: int) -> tuple[TensorSpec, ...]:
    """The inputs that a graph has for sampling."""
    exponentials = TensorSpec("exponentials", "float32", ("batch", "draws", numbers_per_draw(vocab_size)))
    return (exponentials, *POLICY_INPUTS)


def step_inputs(
    *,
    num_layers: int,
    num_key_value_heads: int,
    head_dim: int,
    tree_depth: int,
    vocab_size: int,
    dtype: str,
    sampling: bool,
) -> tuple[TensorSpec, ...]:
    """The inputs of a step graph. ``dtype`` is that of weights and cache; without ``sampling`` it is greedy only."""
    caches = 2 * num_layers
    specs = [
        TensorSpec("input_ids", "int64", ("batch", "sequence")),
        TensorSpec("num_tokens", "int64", ("batch",)),
        TensorSpec("is_prefill", "bool", ("batch",)),
        TensorSpec("cache_lengths", "int64", ("batch",)),
        *(sampling_inputs(vocab_size) if sampling else ()),
    ]
    if tree_depth:
        specs.append(TensorSpec("pending_kv", dtype, ("batch", caches * num_key_value_heads, tree_depth, head_dim)))
    cache_shape = ("batch", num_key_value_heads, "capacity", head_dim)
    specs += [TensorSpec(cache_name("past", i), dtype, cache_shape) for i in range(caches)]
    return tuple(specs)


def step_outputs(
    *,
    num_layers: int,
    num_key_value_heads: int,
    head_dim: int,
    tree_depth: int,
    tree_size: int,
    dtype: str,
    sampling: bool,
) -> tuple[TensorSpec, ...]:
    """The outputs of a step graph, in order."""
    caches = 2 * num_layers
    specs = [
        TensorSpec("tokens", "int64", ("batch", tree_depth + 1)),
        TensorSpec("count", "int64", ("batch",)),
        TensorSpec("next_input_ids", "int64", ("batch", tree_size)),
        TensorSpec("next_cache_lengths", "int64", ("batch",)),
    ]
    if sampling:
        specs.append(TensorSpec("logprobs", "float32", ("batch", tree_depth + 1)))
    if tree_depth:
        shape = ("batch", caches * num_key_value_heads, tree_depth, head_dim)
        specs.append(TensorSpec("next_pending_kv", dtype, shape))
    cache_shape = ("batch", num_key_value_heads, "capacity", head_dim)
    specs += [TensorSpec(cache_name("present", i), dtype, cache_shape) for i in range(caches)]
    return tuple(specs)
