"""The graph contract: names, shapes and types of the step's inputs and outputs (version 3).

Names of dimensions: B is the batch size, S the number of new tokens, C the cache capacity, T the number of nodes of
the tree, M its depth, L the number of layers, N the number of key/value heads of a layer, d their size (head_dim).
``docs/contract.md`` explains every input and output.

Version 1 had no sampling: it equals version 3 without sampling. Version 2 drew each token with one random number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

CONTRACT_VERSION = 3
MAX_TOP_K = 256  # the most tokens that top-k sampling may keep
RACE_BLOCK = 256  # tokens per block of the vocabulary: a draw chooses a block first, then a token of that block


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of the graph.

    Attributes:
        name: The tensor's name.
        dtype: The type of its elements.
        shape: Its dimensions: a size, or a name where the size is free.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]


def fixed_shape(spec: TensorSpec, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """A tensor's shape as numbers.

    Args:
        spec: The tensor.
        sizes: Sizes of named dimensions by name. A dimension that is not named here becomes -1.
    """
    return tuple(size if isinstance(size, int) else sizes.get(size, -1) for size in spec.shape)


def cache_name(role: str, index: int) -> str:
    """The name of a cache tensor, such as ``past_key_3`` for role ``past`` and cache 6.

    Args:
        role: ``past`` for an input, ``present`` for an output.
        index: Number of the cache, from 0 to 2L - 1. Cache 2i holds the keys of layer i, cache 2i + 1 its values.
    """
    return f"{role}_{'value' if index % 2 else 'key'}_{index // 2}"


def num_blocks(vocab_size: int) -> int:
    """Number of blocks of ``RACE_BLOCK`` tokens in a vocabulary; the last block may be padded."""
    return -(-vocab_size // RACE_BLOCK)


def numbers_per_draw(vocab_size: int) -> int:
    """Random numbers that one draw takes: one for each block, and one for each token of a block."""
    return num_blocks(vocab_size) + RACE_BLOCK


# The inputs that hold a row's sampling parameters.
POLICY_INPUTS = (
    TensorSpec("temperature", "float32", ("batch",)),
    TensorSpec("top_k", "int64", ("batch",)),
    TensorSpec("top_p", "float32", ("batch",)),
    TensorSpec("min_p", "float32", ("batch",)),
    TensorSpec("typical_epsilon", "float32", ("batch",)),
    TensorSpec("typical_alpha", "float32", ("batch",)),
)


def sampling_inputs(vocab_size: int) -> tuple[TensorSpec, ...]:
    """The inputs that a graph with sampling has in addition."""
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
    """The inputs of a step graph, in order.

    Args:
        num_layers: L.
        num_key_value_heads: N.
        head_dim: d.
        tree_depth: M.
        vocab_size: Size of the vocabulary.
        dtype: Type of weights and caches.
        sampling: Whether the graph can sample. Otherwise it is greedy.
    """
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
    """The outputs of a step graph, in order. The arguments are those of ``step_inputs``; ``tree_size`` is T."""
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
