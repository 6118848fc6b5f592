"""The tensor operations that decoder layers leave to us, as torch custom ops.

Two are opaque to the tracer. Each becomes one standard ONNX node: ``TensorScatter`` and ``Attention`` of opset 24, see
``graph.trace``. Their eager bodies are the PyTorch reference.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.cache_utils import Cache

from medusa_export.common.errors import ModelNotSupportedError
from medusa_export.step.alibi import Alibi, RoundedAlibi
from medusa_export.step.integer_caches import restored, rounded, scale_name
from medusa_export.step.masks import MaskKind, StepMasks
from medusa_export.step.slots import block_slots

ATTENTION_NAME = "medusa_export"

# Arguments that layers pass to an attention function and that don't change its result.
_HARMLESS = frozenset({
    "dropout", "position_ids", "position_embeddings", "use_cache", "cache_position", "output_attentions",
    "output_hidden_states", "output_router_logits", "return_dict", "is_causal", "layer_idx", "training",
    "deterministic",
})  # fmt: skip


@torch.library.custom_op("medusa_export::cache_scatter", mutates_args=())
def cache_scatter(cache: Tensor, update: Tensor, write_indices: Tensor) -> Tensor:
    """Writes one contiguous block per row into a cache.

    Args:
        cache: [B, num_key_value_heads, C, head_dim].
        update: [B, num_key_value_heads, N, head_dim].
        write_indices: [B], the slot of each row's first entry.
    """
    index = block_slots(write_indices, update.shape[2])[:, None, :, None].expand_as(update)
    return cache.scatter(2, index, update)


@cache_scatter.register_fake
def _(cache: Tensor, update: Tensor, write_indices: Tensor) -> Tensor:
    return torch.empty_like(cache)


@torch.library.custom_op("medusa_export::attention", mutates_args=())
def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, softcap: float) -> Tensor:
    """Computes grouped-query attention under a boolean mask, with the softmax in fp32.

    Args:
        query: [B, num_attention_heads, S, head_dim].
        key: [B, num_key_value_heads, C, head_dim].
        value: [B, num_key_value_heads, C, head_dim].
        mask: [B, 1, S, C], True where a query attends to an entry; or numbers [B, num_attention_heads, S, C] to add to
            the scores.
        scale: The factor of the scores.
        softcap: Scores s become softcap · tanh(s / softcap); 0 leaves them as they are.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = torch.matmul(query, key.transpose(2, 3)) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = _masked(scores, mask)
    return torch.matmul(torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype), value)


@attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, softcap: float) -> Tensor:
    return query.new_empty(*query.shape[:3], value.shape[3])


def _masked(scores: Tensor, mask: Tensor) -> Tensor:
    lowest = torch.finfo(scores.dtype).min
    return scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else (scores + mask).clamp(min=lowest)


def attention_with_sinks(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, sinks: Tensor, scale: float
) -> Tensor:
    """Computes attention in which each head has a sink: a score of its own that takes weight and has no value.

    No standard ONNX operator has sinks, so this is traced as it is.

    Args:
        query: [B, num_attention_heads, S, head_dim].
        key: [B, num_key_value_heads, C, head_dim].
        value: [B, num_key_value_heads, C, head_dim].
        mask: [B, 1, S, C], True where a query attends to an entry.
        sinks: [num_attention_heads], the score of each head's sink.
        scale: The factor of the scores.
    """
    heads, kv_heads, capacity = query.shape[1], key.shape[1], key.shape[2]
    by_group = query.contiguous().reshape(query.shape[0], kv_heads, -1, query.shape[3])
    scores = torch.matmul(by_group, key.transpose(2, 3)).float() * scale
    scores = scores.reshape(query.shape[0], heads, query.shape[2], capacity)
    scores = scores.masked_fill(~mask, torch.finfo(torch.float32).min)
    sink = sinks.float().view(1, heads, 1, 1)
    highest = torch.maximum(scores.amax(-1, keepdim=True), sink)
    weights = torch.exp(scores - highest)
    weights = weights / (weights.sum(-1, keepdim=True) + torch.exp(sink - highest))
    by_group = weights.to(value.dtype).reshape(query.shape[0], kv_heads, -1, capacity)
    return torch.matmul(by_group, value).reshape(query.shape[0], heads, query.shape[2], value.shape[3])


@torch.library.custom_op("medusa_export::concat_blocks", mutates_args=())
def concat_blocks(blocks: list[Tensor], group: int) -> Tensor:
    """Concatenates the blocks of the states of a group, [B, num_heads, N, head_dim] each, along their heads."""
    return torch.cat(blocks, dim=1)


@concat_blocks.register_fake
def _(blocks: list[Tensor], group: int) -> Tensor:
    batch, heads, length, head_dim = blocks[0].shape
    return blocks[0].new_empty(batch, heads * len(blocks), length, head_dim)


@dataclass(frozen=True)
class StepKernels:
    """The functions that compute the two operations of a step that a tracer does not see into.

    Attributes:
        scatter: As ``cache_scatter``. It may write into the cache itself.
        attend: As ``attention``.
    """

    scatter: Callable[[Tensor, Tensor, Tensor], Tensor]
    attend: Callable[[Tensor, Tensor, Tensor, Tensor, float, float], Tensor]


# What is traced, and the reference.
TRACED = StepKernels(cache_scatter, attention)


class StepCache(Cache):  # type: ignore[misc]  # transformers has no types here
    """The ``past_key_values`` of one step. It commits each layer's block and returns the whole cache.

    Args:
        names: The names of the model's states, such as ``key_0``.
        past: The caches of these states, each [B, num_heads, C, head_dim].
        pending: The pending entries of each cache, [B, num_heads, M, head_dim]; empty if M is 0.
        write_indices: [B], the slot of each row's first entry to write.
        masks: The attention masks of the step.
        kernels: The functions that write blocks to caches.

    Attributes:
        blocks: The block written to each cache, [B, num_heads, M + S, head_dim], by name of the state.
        present: Each cache with its block, by name of the state.
    """

    def __init__(
        self,
        names: Sequence[str],
        past: Sequence[Tensor],
        pending: Sequence[Tensor],
        write_indices: Tensor,
        masks: StepMasks,
        kernels: StepKernels = TRACED,
    ) -> None:
        self.layers: list[object] = []  # transformers looks for layers of other kinds here; there are none
        self.past = dict(zip(names, past, strict=True))
        self.pending = dict(zip(names, pending, strict=True)) if pending else {}
        self.write_indices = write_indices
        self.masks = masks
        self.kernels = kernels
        self.shows_length = False  # to models that only compute shapes with it
        self.blocks: dict[str, Tensor] = {}
        self.present: dict[str, Tensor] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        layer = operator.index(layer_idx)
        return self._updated(f"key_{layer}", key_states), self._updated(f"value_{layer}", value_states)

    def _updated(self, name: str, new: Tensor) -> Tensor:
        """The cache of a state with its new entries, as layers attend to it."""
        scales = scale_name(name)
        if scales not in self.past:
            return self._commit(name, new)
        integers, new_scales = rounded(new)
        return restored(self._commit(name, integers), self._commit(scales, new_scales))

    def _commit(self, name: str, new: Tensor) -> Tensor:
        if name in self.present:
            raise ModelNotSupportedError("several attention layers that share one KV cache")
        self.blocks[name] = torch.cat([self.pending[name], new], dim=2) if self.pending else new
        self.present[name] = self.kernels.scatter(self.past[name], self.blocks[name], self.write_indices)
        return self.present[name]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        if not self.shows_length:
            raise ModelNotSupportedError("positions taken from the length of the cache instead of position_ids")
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.get_seq_length(layer_idx) + query_length, 0


_active: list[tuple[StepMasks, StepKernels]] = []


@contextmanager
def attending(masks: StepMasks, kernels: StepKernels = TRACED) -> Iterator[None]:
    """Sets the masks and kernels that our attention function uses."""
    _active.append((masks, kernels))
    try:
        yield
    finally:
        _active.pop()


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    bias: Alibi | RoundedAlibi | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """The attention function that Hugging Face layers call through ``AttentionInterface``.

    The mask comes from the step, not from the model. ``attention_mask`` is None in a step, because transformers has no
    mask function for this attention implementation.

    Args:
        module: The attention layer.
        query: [B, num_attention_heads, S, head_dim].
        key: The cached keys, [B, num_key_value_heads, C, head_dim].
        value: The cached values, the same shape.
        attention_mask: Not used.
        scaling: The factor of the scores; 1 / √head_dim if None.
        sliding_window: Tokens that a token attends to, itself included; None for all.
        softcap: The cap of the scores; None without one.
        s_aux: The score of each head's sink, [num_attention_heads]; None without sinks.
        bias: Biases of the scores; None without them.
        kwargs: Further arguments. Those that change the result are refused.
    """
    unknown = sorted(name for name, given in kwargs.items() if given is not None and name not in _HARMLESS)
    if unknown:
        raise ModelNotSupportedError(f"attention with {', '.join(unknown)}")
    if not getattr(module, "is_causal", True) or kwargs.get("is_causal") is False:
        raise ModelNotSupportedError("attention that is not causal")
    scale = float(scaling) if scaling is not None else query.shape[-1] ** -0.5
    masks, kernels = _active[-1]
    kind = MaskKind(sliding_window, _chunk_of(module), bias, query.dtype if bias else None)
    masks.note(module, key, attention_mask, kind)
    scale_of: Callable[[Tensor], Tensor] | None = getattr(module, "query_scale", None)  # see ``step.adapters``
    if scale_of is not None:
        factors = scale_of(masks.positions()[0])
        query = (query * factors.unsqueeze(1).unsqueeze(3)).to(query.dtype)
    mask = masks.of(kind)
    if s_aux is None:
        output = kernels.attend(query, key, value, mask, scale, float(softcap or 0.0))
    elif softcap or bias:
        raise ModelNotSupportedError("attention sinks together with a soft cap or ALiBi")
    else:
        output = attention_with_sinks(query, key, value, mask, s_aux, scale)
    return output.transpose(1, 2).contiguous(), None


def _chunk_of(module: nn.Module) -> int | None:
    """The size of the chunks that a layer's attention keeps to, in tokens; None if it does not."""
    config: Any = getattr(module, "config", None)
    layer, kinds = getattr(module, "layer_idx", None), getattr(config, "layer_types", None)
    if kinds is None or layer is None or kinds[layer] != "chunked_attention":
        return None
    return int(config.attention_chunk_size)


AttentionInterface.register(ATTENTION_NAME, attention_forward)
