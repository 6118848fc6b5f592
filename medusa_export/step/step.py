"""One decoding step: commit, verify, accept, draft.

``MedusaStep`` is the product: its eager run is the PyTorch reference, its trace is the ONNX graph.

A cache of capacity C holds entry i of a row in slot M + i, where M is the depth of the tree: the M
slots in front make room for a block that begins before the sequence does. Each step writes one
contiguous block per cache, at slot ``cache_lengths``: the last M committed entries once more, then
the S new ones. Those last entries are where acceptance has to move something: the root of the
previous tree already lies in its place, the accepted nodes below it do not, and there are at most M
of them. Which entries they are is known at the end of a step, so the step gathers them into
``next_pending_kv`` and the next one writes them (deferred commit). No cache is read or written twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from medusa_export.heads.modules import MedusaHeads, sym_min
from medusa_export.step.attention import StepCache, StepMasks, attending, concat_blocks
from medusa_export.step.cache_shape import CacheShape
from medusa_export.step.indexing import take_entries, take_rows
from medusa_export.step.sampling import Sampled, SamplingInputs, sample
from medusa_runtime.bundles.tree import Tree


@dataclass(frozen=True)
class StepOutput:
    """What a step gives back; names and shapes are those of the graph contract.

    Beyond the contract:

    Attributes:
        logits: [B, R, V], of the verified rows.
        head_logits: [B, active heads, draft_vocab_size], or None without heads.
        accepted_path: [B, M + 1], the accepted nodes from the root on; ``count`` of them hold.
        chosen: [B, R], what the base model has come to after each verified node.
        finite: [B, R] boolean, whether that was chosen from logits that are numbers.
        sampled: How; None in a step that is greedy only.
    """

    tokens: Tensor
    count: Tensor
    next_input_ids: Tensor
    next_cache_lengths: Tensor
    logprobs: Tensor | None
    next_pending_kv: Tensor | None
    present: list[Tensor]
    logits: Tensor
    head_logits: Tensor | None
    accepted_path: Tensor
    chosen: Tensor
    finite: Tensor
    sampled: Sampled | None


class MedusaStep(nn.Module):
    """The base model, its heads and a tree as one function of a batch's state.

    Args:
        model: A Hugging Face causal LM whose attention implementation is ours.
        heads: The heads, or None for plain decoding with a tree of one node.
        tree: The draft tree. Its nodes below the last head are for guesses that the runtime has; until it puts them
            there, they hold that head's candidates.
        sampling: Whether rows may sample and ask for log probabilities; all are greedy otherwise.

    Raises:
        ModelNotSupportedError: The model's caches are not all of one size.
    """

    tree_sees: Tensor
    tree_confirms: Tensor
    tree_depths: Tensor
    tree_lengths: Tensor
    tree_parents: Tensor
    tree_paths: Tensor
    tree_candidates: Tensor

    def __init__(self, model: PreTrainedModel, heads: MedusaHeads | None, tree: Tree, *, sampling: bool = True) -> None:
        super().__init__()
        self.model = model
        self.heads = heads
        self.tree = tree
        self.sampling = sampling
        self.cache_shape = CacheShape.of(model)
        self._last_position = _end_of_table(model)
        self._add_tables(tree)

    @property
    def vocab_size(self) -> int:
        """Of the logits, V."""
        size: int = self.model.get_output_embeddings().weight.shape[0]
        return size

    @property
    def num_heads(self) -> int:
        """Heads that the tree has use for, K."""
        return min(self.heads.config.num_heads, self.tree.max_depth) if self.heads is not None else 0

    def _add_tables(self, tree: Tree) -> None:
        """What a step looks up about its tree."""
        ancestors = torch.from_numpy(tree.ancestor_mask)
        # As the cache sees it, flat: a column in front for committed entries, one behind for no node.
        sees = torch.nn.functional.pad(ancestors, (0, 1))
        sees = torch.cat([torch.ones(tree.size, 1, dtype=torch.bool), sees], dim=1)
        self.register_buffer("tree_sees", sees.flatten())
        # The nodes that a node's acceptance hangs on: itself and those above it, but for the root, which was chosen.
        self.register_buffer("tree_confirms", ancestors & (torch.arange(tree.size) > 0))
        self.register_buffer("tree_depths", torch.from_numpy(tree.depths))
        self.register_buffer("tree_lengths", torch.from_numpy(tree.depths + 1))  # of the path down to each node
        self.register_buffer("tree_parents", torch.from_numpy(tree.parents))
        self.register_buffer("tree_paths", torch.from_numpy(tree.node_paths))
        # Where each drafted node's token stands among the heads' candidates, laid out [K, top_k].
        heads = np.minimum(tree.depths[1:], self.num_heads) - 1
        candidates = heads * tree.top_k + tree.ranks[1:]
        self.register_buffer("tree_candidates", torch.from_numpy(candidates))

    def forward(
        self,
        input_ids: Tensor,
        num_tokens: Tensor,
        is_prefill: Tensor,
        cache_lengths: Tensor,
        sampling: SamplingInputs | None,
        pending_kv: Tensor | None,
        past: Sequence[Tensor],
    ) -> StepOutput:
        """Runs one step.

        Args:
            input_ids: [B, S], a chunk of the prompt, or the first S nodes of the tree.
            num_tokens: [B], how many of a chunk's tokens are valid.
            is_prefill: [B] boolean.
            cache_lengths: [B], committed entries.
            sampling: How each row draws its tokens; None in a step that is greedy only.
            pending_kv: The last M of them, [B, 2L * num_key_value_heads, M, head_dim]; None if M is 0.
            past: 2L caches, keys and values alternating, each [B, num_key_value_heads, C, head_dim].
        """
        pending = [] if pending_kv is None else pending_kv.chunk(len(past), dim=1)
        return self.run(input_ids, num_tokens, is_prefill, cache_lengths, sampling, pending, past)

    def run(
        self,
        input_ids: Tensor,
        num_tokens: Tensor,
        is_prefill: Tensor,
        cache_lengths: Tensor,
        sampling: SamplingInputs | None,
        pending: Sequence[Tensor],
        past: Sequence[Tensor],
    ) -> StepOutput:
        """``forward``, with the pending entries of each cache by themselves."""
        verified = sym_min(input_ids.shape[1], self.tree.size)
        positions, masks = self._positions_and_masks(input_ids, is_prefill, cache_lengths, past[0].shape[2])
        cache = StepCache(past, pending, cache_lengths, masks)
        last = (num_tokens - 1).clamp(min=0)
        rows = torch.where(is_prefill.unsqueeze(1), last.unsqueeze(1), torch.arange(verified))
        logits, hidden = self._verify(input_ids, positions, cache, rows)

        nodes = input_ids.index_select(1, torch.arange(verified))
        sampled = None
        if sampling is not None:
            places = take_rows(positions, rows) + 1
            sampled = sample(logits, nodes, self.tree_parents, places, sampling)
        chosen = logits.argmax(-1) if sampled is None else sampled.chosen
        finite = _is_finite(logits, chosen, sampled)
        best, length = self._accept(nodes, chosen, finite, is_prefill, sampled)
        emits = finite.select(1, 0)
        count = torch.where(emits, length, 0)
        path = self.tree_paths[best]
        on_path = path.clamp(max=verified - 1)
        tokens = take_rows(chosen, on_path)
        logprobs = None
        if sampled is not None:
            # Typical acceptance keeps tokens that the base model allows and has not come to itself.
            below = take_rows(nodes, on_path.index_select(1, torch.arange(1, path.shape[1] + 1) % path.shape[1]))
            tokens = torch.where(torch.arange(path.shape[1]) < count.unsqueeze(1) - 1, below, tokens)
            logprobs = take_entries(logits, on_path, tokens).float() - take_rows(sampled.log_total, on_path)

        # A row that emits nothing keeps its state: its root, its entries and what is pending.
        next_root = torch.where(
            emits.unsqueeze(1), take_rows(chosen, best.unsqueeze(1)), nodes.select(1, 0).unsqueeze(1)
        )
        head_logits, next_input_ids = self._draft(take_rows(hidden, best.unsqueeze(1)).squeeze(1), next_root, verified)

        added = torch.where(emits & is_prefill, num_tokens, count)
        return StepOutput(
            tokens=tokens,
            count=count,
            next_input_ids=next_input_ids,
            next_cache_lengths=cache_lengths + added,
            logprobs=logprobs,
            next_pending_kv=self._carry(cache, path, added, is_prefill),
            present=[cache.present[i] for i in sorted(cache.present)],
            logits=logits,
            head_logits=head_logits,
            accepted_path=path,
            chosen=chosen,
            finite=finite,
            sampled=sampled,
        )

    def _positions_and_masks(
        self, input_ids: Tensor, is_prefill: Tensor, cache_lengths: Tensor, capacity: int
    ) -> tuple[Tensor, StepMasks]:
        """Positions [B, S] of the new tokens, and the entries that each may look at."""
        size, margin = self.tree.size, self.tree.max_depth
        step = torch.arange(input_ids.shape[1])
        node = step.clamp(max=size - 1)
        prefill = is_prefill.unsqueeze(1)
        lengths = cache_lengths.unsqueeze(1)
        positions = lengths + torch.where(prefill, step, self.tree_depths[node])

        entry = torch.arange(capacity) - margin  # the slots in front hold none: < 0
        new = entry - lengths  # [B, C], an entry's index among the new ones; < 0 where committed
        column = (new.clamp(-1, size) + 1).unsqueeze(1)
        sees_tree = self.tree_sees[(node * (size + 2)).unsqueeze(1) + column]
        sees_chunk = new.unsqueeze(1) <= step.unsqueeze(1)
        prefill = prefill.unsqueeze(1)
        full = ((prefill & sees_chunk) | (~prefill & sees_tree)) & (entry >= 0)
        return positions, StepMasks(full.unsqueeze(1), lambda: self._distances(positions, entry, new, is_prefill))

    def _distances(self, positions: Tensor, entry: Tensor, new: Tensor, is_prefill: Tensor) -> Tensor:
        """[B, S, C], how far each new token lies behind each entry of the cache, in positions."""
        size = self.tree.size
        depth = self.tree_depths[new.clamp(0, size - 1)]
        in_tree = (new >= 0) & ~is_prefill.unsqueeze(1)
        entry_positions = entry + torch.where(in_tree, depth - new, 0)
        return positions.unsqueeze(2) - entry_positions.unsqueeze(1)

    def _verify(self, input_ids: Tensor, positions: Tensor, cache: StepCache, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The model's own forward, its ``lm_head`` applied to the verified rows only.

        Returns:
            Logits [B, R, V], with whatever the model does behind its ``lm_head``, and hidden states [B, R, H].
        """
        captured: list[Tensor] = []

        def keep_verified(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            captured.append(take_rows(args[0], rows))
            return (captured[0], *args[1:])

        if self._last_position is not None:  # those beyond belong to nodes and padding that are never kept
            positions = positions.clamp(max=self._last_position)
        hook = self.model.get_output_embeddings().register_forward_pre_hook(keep_verified)
        try:
            with attending(cache.masks):
                output = self.model(input_ids=input_ids, position_ids=positions, past_key_values=cache, use_cache=True)
        finally:
            hook.remove()
        return output.logits, captured[0]

    def _accept(
        self, nodes: Tensor, chosen: Tensor, finite: Tensor, is_prefill: Tensor, sampled: Sampled | None
    ) -> tuple[Tensor, Tensor]:
        """The deepest node that the base model has come to, or that typical acceptance allows, with its ancestors.

        Of several such nodes, which only typical acceptance has, it is the one with the largest Σ log p [2.3.1].

        Args:
            nodes: [B, R], the verified tree.
            chosen: [B, R], what the base model has come to after each node [2.1.2].
            finite: [B, R], whether the logits of each node are numbers. A node is not accepted where they are not:
                its token is emitted as the choice at its parent, as in plain decoding, and is the next root.
            is_prefill: [B].
            sampled: How, if a row may sample.

        Returns:
            The node's index and its depth + 1, the number of tokens that the step emits if the root's logits are
            numbers; [B] each. A row that prefills accepts its one verified row.
        """
        verified = nodes.shape[1]
        confirmed = nodes == chosen.index_select(1, self.tree_parents[:verified])
        if sampled is not None:
            confirmed = confirmed | (sampled.support > -torch.inf)
        wrong = ~(confirmed & finite) | is_prefill.unsqueeze(1)
        confirms = self.tree_confirms[:verified, :verified]
        lengths = self.tree_lengths[:verified]
        lengths = torch.where(wrong.unsqueeze(1) & confirms, 0, lengths.unsqueeze(1)).amin(-1)
        if sampled is None:
            best = lengths.argmax(-1)
        else:
            support = torch.where(sampled.support > -torch.inf, sampled.support, 0.0)
            support = torch.where(confirms, support.unsqueeze(1), 0.0).sum(-1)
            longest = lengths == lengths.amax(-1, keepdim=True)
            best = torch.where(longest, support, -torch.inf).argmax(-1)
        return best, self.tree_lengths[best]

    def _draft(self, hidden: Tensor, next_root: Tensor, verified: int) -> tuple[Tensor | None, Tensor]:
        """The next tree: the base model's choice as its root, the heads' best candidates below.

        Args:
            hidden: [B, H], at the accepted node.
            next_root: [B, 1].
            verified: R; a tree of R nodes is at most R - 1 deep, so no more heads run.
        """
        if self.heads is None:
            return None, next_root
        top_k = self.tree.top_k
        active = sym_min(verified - 1, self.num_heads)
        embedded = self.model.get_input_embeddings()(next_root).squeeze(1) if self.heads.config.conditioned else None
        head_logits = self.heads(hidden, embedded, active)
        candidates = head_logits.topk(top_k, dim=-1).indices
        if self.heads.token_map is not None:
            candidates = self.heads.token_map[candidates]
        flat = candidates.flatten(1)
        # Heads that did not run propose token 0 for nodes that the host can't reach with this R.
        flat = torch.cat([flat, flat.new_zeros(1).expand(flat.shape[0], self.num_heads * top_k)], dim=1)
        return head_logits, torch.cat([next_root, flat.index_select(1, self.tree_candidates)], dim=1)

    def _carry(self, cache: StepCache, path: Tensor, added: Tensor, is_prefill: Tensor) -> Tensor | None:
        """The last M committed entries, from this step's blocks: [B, 2L * num_key_value_heads, M, head_dim]."""
        margin = self.tree.max_depth
        if margin == 0:
            return None
        blocks = concat_blocks([cache.blocks[i] for i in range(len(cache.past))])
        batch, heads, length, head_dim = blocks.shape
        kept = added.unsqueeze(1) + torch.arange(-margin, 0)  # [B, M], among the added ones; < 0 before them
        accepted = torch.where(is_prefill.unsqueeze(1), kept, path.gather(1, kept.clamp(0, margin)))
        source = torch.where(kept < 0, kept, accepted) + margin
        rows = torch.arange(batch * heads).view(batch, heads, 1) * length + source.unsqueeze(1)
        carried: Tensor = blocks.reshape(-1, head_dim)[rows]
        return carried


def _is_finite(logits: Tensor, chosen: Tensor, sampled: Sampled | None) -> Tensor:
    """Whether each node's logits are numbers, [B, R].

    A hidden state that is not finite makes all logits NaN, or the best of them infinite. So the logit of the chosen
    token tells, and where a token was drawn the sum over all logits besides.

    Args:
        logits: [B, R, V].
        chosen: [B, R], the best token of each node, or the drawn one.
        sampled: How it was drawn; None if none was.
    """
    logit = take_entries(logits, torch.arange(logits.shape[1]), chosen).float()
    if sampled is not None:
        logit = logit + sampled.log_total
    return logit.abs() < torch.inf


def _end_of_table(model: PreTrainedModel) -> int | None:
    """The last position of a model that looks positions up in a table; None where they are computed."""
    tokens = model.get_input_embeddings()
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding) and module is not tokens]
    return int(model.config.get_text_config().max_position_embeddings) - 1 if tables else None
