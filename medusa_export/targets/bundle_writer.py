"""Writes a bundle: graphs, weights, tokenizer, generation config, and the description of all files."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import onnx_ir as ir
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from medusa_export.common.errors import ExportError
from medusa_export.common.files import atomic_folder, check_target
from medusa_export.common.progress import BYTES, OnProgress, Progress, Task, ignore_progress
from medusa_export.common.tuning import EXTERNAL_THRESHOLD
from medusa_export.graph.export import StepGraph
from medusa_export.models.checkpoints import save_tokenizer
from medusa_export.models.end_tokens import EndTokens
from medusa_export.models.generation_settings import kept_settings
from medusa_export.models.supported import max_positions, short_positions
from medusa_export.step.step import MedusaStep
from medusa_export.targets.onnxruntime.derive import derive_graphs
from medusa_runtime.bundles.bundle import DESCRIPTION, GRAPH, WEIGHTS, Bundle
from medusa_runtime.bundles.facts import Acceptance, GraphFacts, HeadFacts
from medusa_runtime.bundles.listed_folder import FileFacts
from medusa_runtime.bundles.model_facts import ModelFacts
from medusa_runtime.errors import BundleError
from medusa_runtime.text.tokenizer import Tokenizer

# Weights are mapped into memory: each begins at a multiple of this many bytes, a page.
_PAGE = 4096


def model_facts(model: PreTrainedModel, name: str, eos_token_ids: tuple[int, ...]) -> ModelFacts:
    """Returns the facts about a model that the runtime needs.

    Args:
        model: The model.
        name: Its name.
        eos_token_ids: Ids of the tokens that end an answer.

    Raises:
        ExportError: The model's config does not give its number of positions.
    """
    config = model.config.get_text_config()
    return ModelFacts(
        name=name,
        model_type=config.model_type,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        vocab_size=model.get_output_embeddings().weight.shape[0],
        max_positions=max_positions(model),
        eos_token_ids=eos_token_ids,
        short_positions=short_positions(model),
    )


def write_bundle(
    graph: StepGraph,
    step: MedusaStep,
    tokenizer: PreTrainedTokenizerBase | None,
    target: Path,
    *,
    name: str,
    tree_name: str,
    acceptance: Acceptance,
    trained: bool,
    replace_existing: bool = False,
    end_tokens: EndTokens | None = None,
    on_progress: OnProgress = ignore_progress,
) -> Bundle:
    """Writes a bundle; it appears whole or not at all.

    Args:
        graph: The step's graph, from ``build_graph``.
        step: The step that it was traced from.
        tokenizer: The model's tokenizer; None for a bundle without one.
        target: The folder to write.
        name: The model's name.
        tree_name: The tree's name.
        acceptance: Acceptance estimates of the tree's nodes.
        trained: True if the heads are trained, not fresh.
        replace_existing: Replace a bundle that is there.
        end_tokens: The tokens that end an answer; found in the model and the tokenizer if None.
        on_progress: Receives reports.

    Returns:
        The bundle.

    Raises:
        ExportError: The folder can't be written, the runtime can't read the tokenizer, or the model's files name an
            end token that is none.
    """
    heads = step.heads
    ends = end_tokens or EndTokens(step.model, tokenizer)
    bundle = Bundle(
        folder=target,
        model=model_facts(step.model, name, ends.ids),
        states=step.states,
        dtype=str(step.model.dtype).removeprefix("torch."),
        tree=step.tree,
        acceptance=acceptance,
        heads=HeadFacts(heads.config.num_heads, heads.variant, trained) if heads is not None else None,
        sampling=step.sampling,
        constraints=step.sampling,
        top_logprobs=step.sampling,
        acceptance_rules=tuple(rule.name for rule in step.rules),
        tree_name=tree_name,
        end_tokens=ends.found,
        generation=kept_settings(step.model.generation_config),
        weights=graph.step.weights.facts,
        matrices=graph.matrices,
        fused_attention=graph.step.fused_attention,
        producer={package: version(package) for package in ("medusa-export", "torch", "transformers", "onnxscript")},
    )
    try:
        check_target(target, replace_existing=replace_existing)
        with atomic_folder(target, replace_existing=replace_existing) as folder:
            _write_standard_graph(graph, folder, on_progress)
            with ThreadPoolExecutor(1) as beside:  # the digest of the weights takes as long as the derived graphs
                begun = {path: beside.submit(FileFacts.of, path) for path in folder.glob(WEIGHTS)}
                on_progress(Progress("writing graphs"))
                graphs = {GRAPH: GraphFacts(graph.rewrites), **derive_graphs(folder, graph.step)}
                _write_texts(step.model, tokenizer, folder, target)
                files = {
                    str(path.relative_to(folder)): begun[path].result() if path in begun else FileFacts.of(path)
                    for path in sorted(folder.rglob("*"))
                    if path.is_file()
                }
            bundle = replace(bundle, files=files, graphs=graphs)
            (folder / DESCRIPTION).write_text(bundle.to_json(), encoding="utf-8")
    except OSError as error:
        raise ExportError(f"The bundle can't be written to {target}: {error}.") from error
    return bundle


def _write_standard_graph(graph: StepGraph, folder: Path, on_progress: OnProgress) -> None:
    """Writes the standard graph and the weights."""
    values = graph.model.graph.initializers.values()
    sizes = [value.const_value.nbytes for value in values if value.const_value is not None]
    task = Task("writing weights", sum(size for size in sizes if size > EXTERNAL_THRESHOLD), on_progress, unit=BYTES)
    written = 0

    def count(tensor: ir.TensorProtocol, _: object) -> None:
        nonlocal written
        task.reach(written)  # called before a tensor is written
        written += tensor.nbytes

    # Reads, converts and writes one weight after the other.
    ir.save(
        graph.model,
        folder / GRAPH,
        external_data=WEIGHTS,
        size_threshold_bytes=EXTERNAL_THRESHOLD,
        callback=count,
        alignment=_PAGE,
        align_threshold=0,
    )
    task.reach(written)


def _write_texts(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path, target: Path) -> None:
    """Writes the tokenizer, and the generation config."""
    if tokenizer is not None:
        save_tokenizer(tokenizer, folder)
        _check_tokenizer(folder, target)
    if model.generation_config is not None:
        # save_pretrained refuses settings that contradict each other, which many published configs hold.
        text = model.generation_config.to_json_string()
        (folder / "generation_config.json").write_text(text, encoding="utf-8")


def _check_tokenizer(folder: Path, target: Path) -> None:
    """Refuses a tokenizer that the runtime can't read, such as one whose chat template can't be compiled."""
    try:
        Tokenizer.load(folder)
    except BundleError as error:
        reason = str(error).replace(str(folder), str(target))
        raise ExportError(
            f"The runtime can't read this tokenizer. {reason} Correct the model's files, or export with "
            "`with_tokenizer=False`."
        ) from error
