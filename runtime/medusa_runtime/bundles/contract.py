"""The graph contract: names, shapes and types of the step's inputs and outputs (version 7).

Names of dimensions: B is the batch size, S the number of new tokens, C the cache capacity, T the number of nodes of
the tree, M its depth, N the number of heads of a state, d their size. ``docs/contract.md`` explains every input and
output.

Version 1 had no sampling: it equals version 3 without sampling. Version 2 drew each token with one random number.
Version 3 had caches of one shape, and one tensor of pending entries for all of them. Version 4 had no constraints. In
version 5 all states had the bundle's type. Version 6 had no most likely tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from medusa_runtime.bundles.states import State, groups_of

CONTRACT_VERSION = 7
MAX_TOP_K = 256  # the most tokens that top-k sampling may keep
MAX_EDITS = 8192  # the most edited tokens per row of a compiled engine
MAX_TOP_LOGPROBS = 20  # the most likely tokens that a step gives for a place
MASK_BITS = 8  # tokens per byte of a mask of allowed tokens
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


# The inputs that hold a row's penalties.
PENALTY_INPUTS = (
    TensorSpec("repetition_penalty", "float32", ("batch", 1, 1)),
    TensorSpec("frequency_penalty", "float32", ("batch", 1, 1)),
    TensorSpec("presence_penalty", "float32", ("batch", 1, 1)),
)


def mask_bytes(vocab_size: int) -> int:
    """Bytes of a mask of allowed tokens, which has a bit for each token of the vocabulary, the lowest first."""
    return -(-vocab_size // MASK_BITS)


def sampling_inputs(vocab_size: int) -> tuple[TensorSpec, ...]:
    """The inputs that a graph with sampling has in addition."""
    exponentials = TensorSpec("exponentials", "float32", ("batch", "draws", numbers_per_draw(vocab_size)))
    return (exponentials, *POLICY_INPUTS)


def constraint_inputs(vocab_size: int) -> tuple[TensorSpec, ...]:
    """The inputs that a graph with constraints has in addition."""
    return (
        TensorSpec("edit_tokens", "int64", ("batch", 1, "edits")),
        TensorSpec("edit_bias", "float32", ("batch", 1, "edits")),
        TensorSpec("edit_count", "float32", ("batch", 1, "edits")),
        TensorSpec("edit_seen", "float32", ("batch", 1, "edits")),
        *PENALTY_INPUTS,
        TensorSpec("allowed_tokens", "uint8", ("batch", "masks", mask_bytes(vocab_size))),
    )


# The places of the emitted path that a step gives the most likely tokens for.
RANKED_PLACES = TensorSpec("ranked_places", "int64", ("batch", "ranked"))


def ranking_outputs(vocab_size: int) -> tuple[TensorSpec, ...]:
    """The outputs that a graph which ranks tokens has in addition."""
    shape = ("batch", "ranked", min(MAX_TOP_LOGPROBS, vocab_size))
    return (TensorSpec("top_tokens", "int64", shape), TensorSpec("top_logprobs", "float32", shape))


# The input that chooses a row's rotary frequencies, of a model with others for long requests.
IS_LONG = TensorSpec("is_long", "bool", ("batch",))


def step_inputs(
    states: Sequence[State],
    *,
    vocab_size: int,
    dtype: str,
    sampling: bool,
    constraints: bool,
    top_logprobs: bool,
    takes_long: bool = False,
) -> tuple[TensorSpec, ...]:
    """The inputs of a step graph, in order.

    Args:
        states: The model's states.
        vocab_size: Size of the vocabulary.
        dtype: The bundle's type, which states have that name no type of their own.
        sampling: True if the graph can sample. Otherwise it is greedy.
        constraints: True if the graph takes biases, penalties and masks of allowed tokens.
        top_logprobs: True if the graph gives the most likely tokens.
        takes_long: True if rows of long requests have rotary frequencies of their own.
    """
    return (
        TensorSpec("input_ids", "int64", ("batch", "sequence")),
        TensorSpec("num_tokens", "int64", ("batch",)),
        TensorSpec("is_prefill", "bool", ("batch",)),
        TensorSpec("cache_lengths", "int64", ("batch",)),
        *((IS_LONG,) if takes_long else ()),
        *(sampling_inputs(vocab_size) if sampling else ()),
        *(constraint_inputs(vocab_size) if constraints else ()),
        *((RANKED_PLACES,) if top_logprobs else ()),
        *pending_specs(states, dtype),
        *(TensorSpec(state.past, state.dtype or dtype, cache_shape(state)) for state in states),
    )


def step_outputs(
    states: Sequence[State],
    *,
    tree_depth: int,
    tree_size: int,
    vocab_size: int,
    dtype: str,
    sampling: bool,
    top_logprobs: bool,
) -> tuple[TensorSpec, ...]:
    """The outputs of a step graph, in order.

    Args:
        states: The model's states.
        tree_depth: M.
        tree_size: T.
        vocab_size: Size of the vocabulary.
        dtype: The bundle's type, which states have that name no type of their own.
        sampling: True if the graph can sample. Otherwise it is greedy.
        top_logprobs: True if the graph gives the most likely tokens.
    """
    logprobs = TensorSpec("logprobs", "float32", ("batch", tree_depth + 1))
    return (
        TensorSpec("tokens", "int64", ("batch", tree_depth + 1)),
        TensorSpec("count", "int64", ("batch",)),
        TensorSpec("next_input_ids", "int64", ("batch", tree_size)),
        TensorSpec("next_cache_lengths", "int64", ("batch",)),
        *((logprobs,) if sampling else ()),
        *(ranking_outputs(vocab_size) if top_logprobs else ()),
        *(TensorSpec(f"next_{spec.name}", spec.dtype, spec.shape) for spec in pending_specs(states, dtype)),
        *(TensorSpec(state.present, state.dtype or dtype, cache_shape(state)) for state in states),
    )


def cache_shape(state: State) -> tuple[int | str, ...]:
    """The shape of a state in the graph, [B, N, C, d]."""
    heads, size = state.shape
    return ("batch", heads, "capacity", size)


def pending_specs(states: Sequence[State], dtype: str) -> tuple[TensorSpec, ...]:
    """The inputs with pending entries: one for all states of a shape and type, [B, n·N, M, d] for n states."""
    return tuple(
        TensorSpec(
            group.pending,
            group.dtype or dtype,
            ("batch", len(group.states) * group.shape[0], group.states[0].margin, group.shape[1]),
        )
        for group in groups_of(states)
        if group.pending is not None
    )
