"""A decoding step: commit, verify, accept, draft.

``MedusaStep`` is the product: its eager run is the PyTorch reference, and its trace is the ONNX graph.

Entry i of a row is in slot M + i of each cache; M is the depth of the tree (see ``slots``). Each step writes one
contiguous block to each cache: the last M committed entries again, then the S new ones. Acceptance has to move only
those M: the root of the last tree is already in its place, and the accepted nodes below it are at most M. Which entries
they are is known at the end of a step. So the step gathers them as next pending entries, and the next step writes them
(deferred commit). No cache is read or written twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from medusa_export.common import defaults
from medusa_export.common.dtypes import KvCacheType
from medusa_export.common.errors import ExportError
from medusa_export.compat.transformers import cache_argument, experts_function
from medusa_export.heads.base import Draft, DraftHeads, DraftInputs
from medusa_export.heads.sizes import sym_min
from medusa_export.models.supported import short_positions
from medusa_export.step.acceptance.path import deepest_confirmed
from medusa_export.step.acceptance.registry import rules_named
from medusa_export.step.acceptance.rule import AcceptanceRule, VerifiedNodes, judge
from medusa_export.step.adapters import adapted, only_shapes_from_length
from medusa_export.step.adapters.rotary import reset_frequencies
from medusa_export.step.attention import TRACED, StepCache, StepKernels, attending, concat_blocks
from medusa_export.step.experts import EXPERTS_NAME
from medusa_export.step.indexing import take_entries, take_from_heads, take_rows
from medusa_export.step.masks import StepMasks
from medusa_export.step.sampling import Sampled, SamplingInputs, sample
from medusa_export.step.slots import StepSlots
from medusa_export.step.states import observed_states
from medusa_export.step.tree_tables import TreeTables
from medusa_runtime.bundles.contract import MAX_TOP_LOGPROBS
from medusa_runtime.bundles.states import groups_of
from medusa_runtime.bundles.tree import Tree


@dataclass(frozen=True)
class StepInputs:
    """The inputs of a step. Names and shapes are those of the graph contract, but pending entries are split by state.

    Attributes:
        input_ids: [B, S], a chunk of the prompt, or the first S nodes of the tree.
        num_tokens: [B], the number of valid tokens in a chunk.
        is_prefill: [B] boolean, True in rows that take in a chunk.
        cache_lengths: [B], the number of committed entries.
        past: The cache of each state, [B, num_heads, C, head_dim].
        pending: The last M committed entries of each state, [B, num_heads, M, head_dim]; empty if M is 0.
        sampling: The sampling parameters and numbers of each row; None in a step that is greedy only.
        is_long: [B] boolean, True in rows of long requests; None if the model has one set of rotary frequencies.
        ranked_places: [B, Q], the places of the emitted path that need the most likely tokens; None if there are none.
    """

    input_ids: Tensor
    num_tokens: Tensor
    is_prefill: Tensor
    cache_lengths: Tensor
    past: Sequence[Tensor]
    pending: Sequence[Tensor] = ()
    sampling: SamplingInputs | None = None
    is_long: Tensor | None = None
    ranked_places: Tensor | None = None


@dataclass(frozen=True)
class StepOutput:
    """The outputs of a step. Names and shapes are those of the graph contract.

    The following are named values of the graph, but no outputs:

    Attributes:
        logits: [B, R, V], of the verified rows.
        head_logits: [B, active heads, V'], or None without heads.
        accepted_path: [B, M + 1], the accepted nodes from the root on; the first ``count`` are valid.
        chosen: [B, R], the base model's choice after each verified node.
        finite: [B, R] boolean, True where that choice was made from finite logits.
        sampled: The draws; None in a step that is greedy only.
    """

    tokens: Tensor
    count: Tensor
    next_input_ids: Tensor
    next_cache_lengths: Tensor
    logprobs: Tensor | None
    next_pending: list[Tensor]
    present: list[Tensor]
    top_tokens: Tensor | None
    top_logprobs: Tensor | None
    logits: Tensor
    head_logits: Tensor | None
    accepted_path: Tensor
    chosen: Tensor
    finite: Tensor
    sampled: Sampled | None


@dataclass(frozen=True)
class AcceptedPath:
    """The path that a step accepts in each row.

    Attributes:
        node: [B], the deepest accepted node.
        path: [B, M + 1], the nodes from the root to it, filled up with 0.
        emits: [B] boolean, False in rows whose root has logits that are not finite.
        count: [B], the number of tokens that the step emits: the length of the path, or 0.
    """

    node: Tensor
    path: Tensor
    emits: Tensor
    count: Tensor


class MedusaStep(nn.Module):
    """The base model, its heads and a tree as one function of a batch's state.

    Args:
        model: A Hugging Face causal LM with our attention implementation.
        heads: The heads; None for plain decoding with a tree of one node.
        tree: The draft tree. Nodes below the last head are for lookup hits. Until the host writes one there, they hold
            that head's candidates.
        sampling: True if rows may sample and ask for log probabilities. If not, all rows are greedy.
        rules: The names of the acceptance rules. A node is accepted if one of them confirms it.
        kv_cache: The type that keys and values are stored in; None for the model's.

    Raises:
        ExportError: No acceptance rule is left.
        ExtensionError: There is no acceptance rule of a name.
        ModelNotSupportedError: The model uses its caches in a way that a step can't honour.

    Attributes:
        states: The model's states.
        kv_cache: The type that keys and values are stored in; None for the model's.
        short_positions: The longest prompt with the first of two sets of rotary frequencies; None if the model has one.
        kernels: The functions that write to caches and attend. Only a step that isn't traced may have others.
    """

    kernels: StepKernels = TRACED

    def __init__(
        self,
        model: PreTrainedModel,
        heads: DraftHeads | None,
        tree: Tree,
        *,
        sampling: bool = True,
        rules: Sequence[str] = defaults.ACCEPTANCE_RULES,
        kv_cache: KvCacheType | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.heads = heads
        self.tree = tree
        self.sampling = sampling
        self.kv_cache = kv_cache
        self._rules = rules_named(rules)
        if not self.rules:
            raise ExportError("A step without sampling has no acceptance rule left: give 'exact' too.")
        reset_frequencies(model)
        self.short_positions = short_positions(model)
        self.states = observed_states(model, tree.max_depth, kv_cache)
        self.tables = TreeTables(tree, self.num_heads)
        self._last_position = _end_of_table(model)
        self._cache_argument = cache_argument(model)

    @property
    def vocab_size(self) -> int:
        """V, the number of logits per token."""
        size: int = self.model.get_output_embeddings().weight.shape[0]
        return size

    @property
    def num_heads(self) -> int:
        """K, the number of heads that the tree uses."""
        return min(self.heads.config.num_heads, self.tree.max_depth) if self.heads is not None else 0

    @property
    def rules(self) -> tuple[AcceptanceRule, ...]:
        """The acceptance rules in use; a step that is greedy only leaves out those that need sampling."""
        return tuple(rule for rule in self._rules if self.sampling or not rule.needs_sampling)

    @property
    def is_exact(self) -> bool:
        """True if greedy rows emit the base model's own text: no rule for them changes the output."""
        return not any(rule.changes_output and not rule.needs_sampling for rule in self.rules)

    def forward(self, given: StepInputs) -> StepOutput:
        """Runs one step."""
        slots = StepSlots(self.tables, given.input_ids.shape[1], given.is_prefill, given.cache_lengths)
        capacity = given.past[0].shape[2]
        masks = StepMasks(
            slots.visible(capacity).unsqueeze(1), lambda: (slots.positions, slots.entry_positions(capacity))
        )
        names = [state.name for state in self.states]
        cache = StepCache(names, given.past, given.pending, given.cache_lengths, masks, self.kernels)

        nodes, hidden = self._verify(given, slots, cache)  # each layer commits its block to the cache
        finite = _is_finite(nodes)
        accepted = self._accept(nodes, finite, given.is_prefill)
        tokens, logprobs = self._emit(nodes, accepted)

        # A row that emits nothing keeps its state: its root, its entries and its pending entries.
        best = accepted.node.unsqueeze(1)
        root = nodes.tokens.select(1, 0).unsqueeze(1)
        next_root = torch.where(accepted.emits.unsqueeze(1), take_rows(nodes.chosen, best), root)
        draft = self._draft(take_rows(hidden, best).squeeze(1), next_root, nodes.tokens.shape[1])
        added = torch.where(accepted.emits & given.is_prefill, given.num_tokens, accepted.count)
        next_pending = self._carry(cache, slots.carried(accepted.path, added)) if self.tables.depth else []
        # Computed last, because a rewrite for ONNX Runtime moves acceptance and drafting into a branch before it.
        top_tokens, top_logprobs = self._rank(nodes, accepted.path, given.ranked_places)
        return StepOutput(
            tokens=tokens,
            count=accepted.count,
            next_input_ids=next_root if draft is None else torch.cat([next_root, draft.tokens], dim=1),
            next_cache_lengths=given.cache_lengths + added,
            logprobs=logprobs,
            next_pending=next_pending,
            present=[cache.present[name] for name in names if name in cache.present],
            top_tokens=top_tokens,
            top_logprobs=top_logprobs,
            logits=nodes.logits,
            head_logits=None if draft is None else draft.logits,
            accepted_path=accepted.path,
            chosen=nodes.chosen,
            finite=finite,
            sampled=nodes.sampled,
        )

    def _verify(self, given: StepInputs, slots: StepSlots, cache: StepCache) -> tuple[VerifiedNodes, Tensor]:
        """Runs the base model, its ``lm_head`` on R rows only, and draws tokens.

        The R rows are the first nodes of the tree, or the last token of a chunk.

        Returns:
            The verified nodes, and their hidden states [B, R, H].
        """
        verified = torch.arange(sym_min(given.input_ids.shape[1], self.tree.size))
        last = (given.num_tokens - 1).clamp(min=0)
        rows = torch.where(given.is_prefill.unsqueeze(1), last.unsqueeze(1), verified)
        logits, hidden = self._run_model(given.input_ids, slots.positions, cache, rows, given.is_long)

        tokens, sampled = given.input_ids.index_select(1, verified), None
        if given.sampling is not None:
            places = take_rows(slots.positions, rows) + 1
            sampled = sample(logits, tokens, self.tables.parents, self.tables.ancestors, places, given.sampling)
        chosen = logits.argmax(-1) if sampled is None else sampled.chosen
        return VerifiedNodes(tokens, logits, chosen, self.tables, given.sampling, sampled), hidden

    def _run_model(
        self, input_ids: Tensor, positions: Tensor, cache: StepCache, rows: Tensor, is_long: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Runs the model's own forward.

        Returns:
            The logits [B, R, V] of ``rows``, after all that the model does behind its ``lm_head``, and the hidden
            states [B, R, H].
        """
        captured: list[Tensor] = []

        def keep_rows(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            captured.append(take_rows(args[0], rows))
            return (captured[0], *args[1:])

        if self._last_position is not None:  # later positions belong to nodes and padding that are never kept
            positions = positions.clamp(max=self._last_position)
        hook = self.model.get_output_embeddings().register_forward_pre_hook(keep_rows)
        cache.shows_length = only_shapes_from_length(self.model)
        try:
            with (
                adapted(self.model, is_long),
                attending(cache.masks, self.kernels),
                experts_function(self.model, EXPERTS_NAME),
            ):
                given = {self._cache_argument: cache}
                output = self.model(input_ids=input_ids, position_ids=positions, use_cache=True, **given)
        finally:
            hook.remove()
        return output.logits, captured[0]

    def _accept(self, nodes: VerifiedNodes, finite: Tensor, is_prefill: Tensor) -> AcceptedPath:
        """Accepts the longest path of nodes that a rule confirms.

        A node whose logits are not finite is not accepted. Its token is then emitted as the choice at its parent, as in
        plain decoding, and is the next root. A row that prefills accepts its one verified row.

        Args:
            nodes: The verified nodes.
            finite: [B, R] boolean, True where the logits of a node are finite.
            is_prefill: [B] boolean.
        """
        verdict = judge(self.rules, nodes)
        best = deepest_confirmed(self.tables, verdict, finite, is_prefill)
        emits = finite.select(1, 0)
        return AcceptedPath(
            node=best,
            path=self.tables.paths[best],
            emits=emits,
            count=torch.where(emits, self.tables.path_lengths[best], 0),
        )

    def _emit(self, nodes: VerifiedNodes, accepted: AcceptedPath) -> tuple[Tensor, Tensor | None]:
        """The tokens of the accepted path, then the base model's choice after it, [B, M + 1]; and their log p."""
        path, verified = accepted.path, nodes.tokens.shape[1]
        on_path = path.clamp(max=verified - 1)
        tokens = take_rows(nodes.chosen, on_path)
        if any(rule.changes_output for rule in self.rules):  # an accepted token may differ from the choice
            place = torch.arange(path.shape[1])
            below = take_rows(nodes.tokens, on_path.index_select(1, (place + 1) % path.shape[1]))
            tokens = torch.where(place < accepted.count.unsqueeze(1) - 1, below, tokens)
        if nodes.sampled is None:
            return tokens, None
        logits = take_entries(nodes.logits, on_path, tokens).float()
        return tokens, logits - take_rows(nodes.sampled.log_total, on_path)

    def _rank(
        self, nodes: VerifiedNodes, path: Tensor, places: Tensor | None
    ) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """The base model's most likely tokens at places [B, Q] of a path, [B, Q, 20]; and their log p."""
        if places is None or nodes.sampled is None:
            return None, None
        node = path.gather(1, places)
        best = take_rows(nodes.logits, node).float().topk(min(MAX_TOP_LOGPROBS, self.vocab_size), dim=-1)
        return best.indices, best.values - take_rows(nodes.sampled.log_total, node).unsqueeze(-1)

    def _draft(self, hidden: Tensor, next_root: Tensor, verified: int) -> Draft | None:
        """Drafts the next tree from the hidden state [B, H] of the accepted node; None without heads.

        A tree of R = ``verified`` nodes is at most R - 1 deep, so no more heads run.
        """
        if self.heads is None:
            return None
        given = DraftInputs(hidden, next_root, self.model.get_input_embeddings())
        return self.heads.draft(given, self.tables.drafting, sym_min(verified - 1, self.num_heads))

    def _carry(self, cache: StepCache, source: Tensor) -> list[Tensor]:
        """Gathers the entries ``source`` [B, M] of all blocks, by group of states: [B, n * num_heads, M, head_dim]."""
        return [
            take_from_heads(concat_blocks([cache.blocks[state.name] for state in group.states], index), source)
            for index, group in enumerate(groups_of(self.states))
        ]


def _is_finite(nodes: VerifiedNodes) -> Tensor:
    """Finds the nodes whose logits are finite, [B, R] boolean.

    A hidden state that is not finite makes all logits NaN, or the largest one infinite. So it is enough to look at the
    logit of the chosen token, and at the sum over all logits where a token was drawn.
    """
    logit = take_entries(nodes.logits, torch.arange(nodes.logits.shape[1]), nodes.chosen).float()
    if nodes.sampled is not None:
        logit = logit + nodes.sampled.log_total
    return logit.abs() < torch.inf


def _end_of_table(model: PreTrainedModel) -> int | None:
    """The last position of a model with a table of positions, learned or computed; None without a table."""
    tokens = model.get_input_embeddings()
    has_table = any(
        (isinstance(module, nn.Embedding) and module is not tokens) or hasattr(module, "embed_positions")
        for module in model.modules()
    )
    return int(model.config.get_text_config().max_position_embeddings) - 1 if has_table else None
