"""Exports a model with heads to a bundle: ``medusa_export.export``."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from os import PathLike, fspath
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from medusa_export.common import defaults
from medusa_export.common.dtypes import KV_CACHE_TYPES, Dtype, KvCacheType, WeightType, short_name
from medusa_export.common.errors import MedusaWarning, OptionError
from medusa_export.common.files import check_target
from medusa_export.common.progress import OnProgress, Progress, ignore_progress
from medusa_export.graph.export import build_graph
from medusa_export.graph.weights import StepWeights
from medusa_export.heads.base import DraftHeads
from medusa_export.heads.files import open_heads
from medusa_export.heads.loaded import LoadedHeads
from medusa_export.heads.modules import MedusaHeads
from medusa_export.models.activations import ActivationRanges
from medusa_export.models.end_tokens import EndTokens
from medusa_export.models.generation_settings import kept_settings, settings_warnings
from medusa_export.models.packed import dequantized_note
from medusa_export.models.weight_types import WeightTypes
from medusa_export.step.step import MedusaStep
from medusa_export.step.weight_range import WeightRange
from medusa_export.targets.bundle_writer import write_bundle
from medusa_export.targets.source import Source, opened_source
from medusa_export.trees.calibration import Calibration
from medusa_export.trees.named import NamedTree, load_tree
from medusa_export.trees.prior import prior_acceptance
from medusa_runtime.bundles.bundle import Bundle
from medusa_runtime.bundles.facts import Acceptance
from medusa_runtime.bundles.tree import Tree


def export(
    model: str | PathLike[str] | PreTrainedModel,
    output: str | PathLike[str],
    *,
    heads: str | PathLike[str] | DraftHeads | None = None,
    init_heads: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    with_tokenizer: bool = True,
    text_only: bool = False,
    tree: str | PathLike[str] | Tree = defaults.TREE,
    calibration: str | PathLike[str] | Calibration | None = None,
    tree_size: int = defaults.TREE_SIZE,
    top_k: int = defaults.TOP_K,
    sampling: bool = True,
    acceptance_rules: Sequence[str] = defaults.ACCEPTANCE_RULES,
    dtype: Dtype | None = None,
    weights: WeightType | WeightTypes | None = None,
    activations: str | PathLike[str] | ActivationRanges | None = None,
    kv_cache: KvCacheType | None = None,
    fused_attention: bool = False,
    name: str | None = None,
    overwrite: bool = False,
    on_progress: OnProgress = ignore_progress,
) -> Bundle:
    """Compiles a model with MEDUSA heads to a bundle.

    Without ``heads`` and ``init_heads`` the bundle decodes plainly, with a tree of one node. Sentences about the
    model that the user should know, such as sources of end tokens that disagree, are given as ``MedusaWarning``.

    Args:
        model: A folder in Hugging Face's layout, a hub id, the path of a ``.gguf`` file, or a loaded causal language
            model on the CPU. A loaded model is left as it was.
        output: The folder to write. It appears whole or not at all.
        heads: Trained heads: a file, a folder or a hub id in any published format, or loaded heads of this model.
        init_heads: The number of fresh, untrained heads, to try the pipeline; instead of ``heads``.
        tokenizer: The tokenizer of a loaded model; the bundle has none if this is None. A model that is read brings
            its own.
        with_tokenizer: Put the tokenizer of a model that is read into the bundle. Without it the bundle takes and
            gives token ids.
        text_only: Export the text model alone, if the model is a larger one, such as one for images and text.
        tree: The draft tree: ``default``, the name of a reference tree, a JSON file of rank paths, or a tree.
        calibration: Measured hit rates of these heads, by ``calibrate``. The default tree is then the best one for
            these heads, and the runtime gets measured acceptance estimates.
        tree_size: Nodes of the tree that is searched with ``calibration``, the root included.
        top_k: Candidates per head.
        sampling: Let requests sample and ask for log probabilities. Without it the graph is smaller and only greedy.
        acceptance_rules: The names of the acceptance rules of the graph. Rules of your own may change the output.
        dtype: Type that the bundle computes in. If None, that of a loaded model, and fp32 for a
            model that is read.
        weights: How matrices are stored: ``int8`` or ``int4``, in blocks of 32 columns, embeddings as ``int8``;
            ``fp16`` or ``bf16`` for a bundle that computes in fp32; ``fp8`` for engines; or each kind of matrix by
            itself. In ``dtype`` if None.
        activations: Ranges of the inputs of linear layers, by ``activations``. Products with ``int8`` matrices then
            round their inputs to 8 bits in these ranges, which makes large trees cheap on CPUs.
        kv_cache: How keys and values are stored: ``int8``, with a scale per token and head, for bundles that compute in
            fp32. In ``dtype`` if None.
        fused_attention: Use ONNX Runtime's attention operators though weights are integers. On CPUs, steps are faster,
            and answers may differ between tree sizes. Otherwise attention gives each row the same bits in all steps.
        name: The model's name in the bundle. If None, the name of its folder, file or hub id.
        overwrite: Replace a bundle that is at ``output``.
        on_progress: Receives reports.

    Returns:
        The bundle.

    Raises:
        OptionError: Options contradict each other, or don't fit the model or the heads.
        ExtensionError: There is no acceptance rule of a name.
        CheckpointError: The model, the tokenizer or the heads can't be read, or don't fit each other.
        ModelNotSupportedError: The decoding step does not support a feature of the model.
        TreeError: The tree can't be read, or can't be used with these heads.
        DatasetError: The calibration can't be read, or does not cover the tree.
        ExportError: Tracing failed, a weight is out of range, or the bundle can't be written.
    """
    target = Path(output)
    _check_options(heads, init_heads, calibration, tree)
    check_target(target, replace_existing=overwrite)
    measured = Calibration.load(Path(calibration)) if isinstance(calibration, (str, PathLike)) else calibration
    ranges = ActivationRanges.load(Path(activations)) if isinstance(activations, (str, PathLike)) else activations
    asked = weights if isinstance(weights, WeightTypes) else WeightTypes.all(weights)
    asked = asked if ranges is None else replace(asked, activations="int8")
    on_progress(Progress("loading the model"))
    with opened_source(model, tokenizer, dtype, with_tokenizer=with_tokenizer, text_only=text_only) as source:
        _check_kv_cache(kv_cache, source.model)
        types = asked.resolved(short_name(source.model.dtype))
        if fused_attention:
            _check_fused_attention(types, kv_cache, source.model)
        ends = _end_tokens(source)
        attached = _attached(source, heads, init_heads, measured, on_progress)
        chosen = _chosen_tree(tree, attached, measured, size=tree_size, top_k=top_k)
        used = _used_heads(attached, chosen.tree)
        step = MedusaStep(
            source.model,
            used.heads if used else None,
            chosen.tree,
            sampling=sampling,
            rules=acceptance_rules,
            kv_cache=kv_cache,
        ).eval()
        read = _step_weights(step, source, used)
        graph = build_graph(
            step, on_progress, weights=read, types=types, activations=ranges, fused_attention=fused_attention
        )
        bundle = write_bundle(
            graph,
            step,
            source.tokenizer,
            target,
            name=name or source.name,
            tree_name=chosen.name,
            acceptance=_acceptance(chosen.tree, measured, trained=heads is not None),
            trained=heads is not None,
            replace_existing=overwrite,
            end_tokens=ends,
            on_progress=on_progress,
        )
    notes = [dequantized_note(source.name, list(read.dequantized.values())), _wider_note(types, bundle)]
    for words in filter(None, [*bundle.notes, *notes]):
        warnings.warn(words, MedusaWarning, stacklevel=2)
    return bundle


def _check_options(heads: object, init_heads: object, calibration: object, tree: object) -> None:
    if heads is not None and init_heads is not None:
        raise OptionError("Both heads and init_heads are given: drop one of them.")
    if calibration is not None and heads is None:
        raise OptionError("A calibration belongs to trained heads: give these heads too, or drop the calibration.")
    if tree != defaults.TREE and heads is None and init_heads is None:
        raise OptionError("A tree needs heads that draft: give heads, or drop the tree.")


def _check_kv_cache(kv_cache: str | None, model: PreTrainedModel) -> None:
    if kv_cache is None:
        return
    if kv_cache not in KV_CACHE_TYPES:
        raise OptionError(f"There is no K/V cache of type {kv_cache!r}: give one of {', '.join(KV_CACHE_TYPES)}.")
    if model.dtype != torch.float32:
        raise OptionError(
            f"A K/V cache in {kv_cache} needs a bundle that computes in fp32, not in {short_name(model.dtype)}: give "
            "dtype fp32, or leave `kv_cache` out."
        )


def _check_fused_attention(types: WeightTypes, kv_cache: str | None, model: PreTrainedModel) -> None:
    """Refuses fused attention where it is the only one, and where there is none."""
    if kv_cache is not None:
        raise OptionError(
            f"A K/V cache in {kv_cache} has no fused attention: leave `kv_cache` or `fused_attention` out."
        )
    if not types.has_integers or model.dtype != torch.float32:
        raise OptionError(
            "Attention is fused already, unless weights are integers and the bundle computes in fp32: leave "
            "`fused_attention` out."
        )


def _end_tokens(source: Source) -> EndTokens:
    ends = EndTokens(source.model, source.tokenizer)
    for text in (*ends.warnings, *settings_warnings(kept_settings(source.model.generation_config))):
        warnings.warn(text, MedusaWarning, stacklevel=3)
    return ends


def _attached(
    source: Source,
    heads: str | PathLike[str] | DraftHeads | None,
    init_heads: int | None,
    calibration: Calibration | None,
    on_progress: OnProgress,
) -> LoadedHeads | None:
    if init_heads is not None:
        return LoadedHeads(MedusaHeads.fresh(init_heads, source.model.get_output_embeddings()))
    if heads is None:
        return None
    if isinstance(heads, DraftHeads):
        _check_heads(heads, source.model)
        attached = LoadedHeads(heads)
    else:
        on_progress(Progress(f"loading heads from {fspath(heads)}"))
        attached = open_heads(fspath(heads), source.model, source.lm_head_reader)
    count = attached.heads.config.num_heads
    if calibration is not None and len(calibration.accuracies) != count:
        raise OptionError(
            f"The calibration is of {len(calibration.accuracies)} heads, but these are {count}: calibrate these."
        )
    return attached


def _check_heads(heads: DraftHeads, model: PreTrainedModel) -> None:
    """Refuses loaded heads that belong to another model."""
    lm_head: nn.Linear = model.get_output_embeddings()
    if heads.config.hidden_size != lm_head.in_features:
        raise OptionError(
            f"The heads have {heads.config.hidden_size} channels and the model {lm_head.in_features}: give heads of "
            "this model."
        )
    if heads.shares_lm_head and heads.lm_head is not lm_head:
        raise OptionError("The heads use the lm_head of another loaded model: load them with this model.")
    kinds = {parameter.dtype for parameter in heads.parameters()} - {lm_head.weight.dtype}
    if kinds:
        raise OptionError(f"The heads are {kinds.pop()} and the model is {lm_head.weight.dtype}: convert the heads.")


def _chosen_tree(
    tree: str | PathLike[str] | Tree,
    attached: LoadedHeads | None,
    calibration: Calibration | None,
    *,
    size: int,
    top_k: int,
) -> NamedTree:
    if attached is None:
        return NamedTree("single node", Tree())
    config = attached.heads.config
    limits = {"top_k": min(top_k, config.draft_vocab_size)}
    if isinstance(tree, Tree):
        return NamedTree("given", Tree.from_paths(tree.paths, max_depth=config.num_heads, **limits))
    return load_tree(fspath(tree), num_heads=config.num_heads, calibration=calibration, size=size, **limits)


def _used_heads(attached: LoadedHeads | None, tree: Tree) -> LoadedHeads | None:
    """The heads that a tree uses; None if it uses none."""
    if attached is None or not tree.max_depth:
        return None
    return attached.truncated(min(tree.max_depth, attached.heads.config.num_heads))


def _wider_note(types: WeightTypes, bundle: Bundle) -> str | None:
    """A sentence that counts the matrices that stay in 8 bits where 4 are asked for; None if there are none."""
    kept = [facts for facts in bundle.matrices if facts.dtype == "int8" and types.bits(facts.part) == 4]
    if not kept:
        return None
    counts = ", ".join(f"{facts.part} ({facts.count})" for facts in kept)
    words = f"Matrices that the files of {bundle.model.name} hold in 8 bits are stored so, not in int4: {counts}."
    narrowed = " `narrowed={'lm_head'}` rounds the lm_head." if any(facts.part == "lm_head" for facts in kept) else ""
    return words + narrowed


def _step_weights(step: MedusaStep, source: Source, used: LoadedHeads | None) -> StepWeights:
    """The weights of a step, each of which is read and checked when it is written."""
    return StepWeights(
        step,
        source.readers,
        WeightRange(step, source.path).check,
        head_readers=used.readers if used else {},
        blocks=source.blocks,
        packed=source.packed,
    )


def _acceptance(tree: Tree, calibration: Calibration | None, *, trained: bool) -> Acceptance:
    return prior_acceptance(tree, trained=trained) if calibration is None else calibration.acceptance(tree)
