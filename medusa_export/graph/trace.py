"""Trace a ``MedusaStep`` to an ONNX graph, with one decoder layer of each kind.

The other layers are marks. ``medusa_export.graph.layers`` replaces them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from medusa_export.common.errors import ExportError, ModelNotSupportedError, first_line
from medusa_export.compat.onnxscript import fold_constants, unread_sources
from medusa_export.compat.torch import export_program, quiet_tracing, tracing_once
from medusa_export.graph.layer_reuse import AnotherKindError, decoder_layers, kinds_of, reusing_layers
from medusa_export.graph.translations import OPSET_VERSION, translations
from medusa_export.step.sampling import SamplingInputs
from medusa_export.step.step import MedusaStep, StepInputs, StepOutput
from medusa_runtime.bundles.contract import constraint_inputs, fixed_shape, sampling_inputs
from medusa_runtime.bundles.states import groups_of


def _named(out: StepOutput) -> dict[str, Tensor]:
    """Results of a traced step besides the caches, by their names in the graph."""
    named = {
        "tokens": out.tokens,
        "count": out.count,
        "next_input_ids": out.next_input_ids,
        "next_cache_lengths": out.next_cache_lengths,
        "logits": out.logits,
        "accepted_path": out.accepted_path,
        "chosen": out.chosen,
        "finite": out.finite,
        "head_logits": out.head_logits,
        "logprobs": out.logprobs,
        "top_tokens": out.top_tokens,
        "top_logprobs": out.top_logprobs,
    }
    if out.sampled is not None:
        named |= {f"sampled/{name}": value for name, value in vars(out.sampled).items() if name != "chosen"}
    named |= {f"next_pending_{group}": pending for group, pending in enumerate(out.next_pending)}
    return {name: value for name, value in named.items() if value is not None}


class _TracedStep(nn.Module):
    """A step with one cache and one pending block per group of states, which represent those of all its states.

    Args:
        step: The step.
        note: Called with the names of a run's results, without the caches.
    """

    def __init__(self, step: MedusaStep, note: Callable[[Sequence[str]], None]) -> None:
        super().__init__()
        self.step = step
        entries = list(dict.fromkeys(state.entry for state in step.states))
        self._group_of = [entries.index(state.entry) for state in step.states]
        self._note = note

    def forward(
        self,
        input_ids: Tensor,
        num_tokens: Tensor,
        is_prefill: Tensor,
        cache_lengths: Tensor,
        is_long: Tensor | None,
        sampling: dict[str, Tensor] | None,
        ranked_places: Tensor | None,
        past: list[Tensor],
        pending: list[Tensor],
    ) -> tuple[Tensor, ...]:
        out = self.step(
            StepInputs(
                input_ids=input_ids,
                num_tokens=num_tokens,
                is_prefill=is_prefill,
                cache_lengths=cache_lengths,
                is_long=is_long,
                past=[past[group] for group in self._group_of],
                pending=[pending[group] for group in self._group_of] if pending else [],
                sampling=None if sampling is None else SamplingInputs.of(list(sampling.values())),
                ranked_places=ranked_places,
            )
        )
        named = _named(out)
        self._note(list(named))
        return (*named.values(), *out.present)


def _example(step: MedusaStep) -> tuple[dict[str, Any], dict[str, Any]]:
    """Example inputs of ``_TracedStep`` by name, and the free dimensions of each."""
    groups, margin = groups_of(step.states), step.tree.max_depth
    entries = [(*group.shape, getattr(torch, group.dtype) if group.dtype else step.model.dtype) for group in groups]
    taken = {step.tree.size, *(size for group in groups for size in group.shape)}
    # Each free dimension has a size of its own: the tracer takes equal sizes for the same dimension.
    batch, capacity = 3, 251
    unused = (size for size in range(37, 251, 2) if size not in taken)
    tokens, draws, edits, masks, ranked = itertools.islice(unused, 5)
    sizes = {"batch": batch, "draws": draws, "edits": edits, "masks": masks}
    sampling = example_sampling(sizes, step.vocab_size) if step.sampling else None
    example: dict[str, Any] = {
        "input_ids": torch.zeros(batch, tokens, dtype=torch.int64),
        "num_tokens": torch.ones(batch, dtype=torch.int64),
        "is_prefill": torch.zeros(batch, dtype=torch.bool),
        "cache_lengths": torch.ones(batch, dtype=torch.int64),
        "is_long": None if step.short_positions is None else torch.zeros(batch, dtype=torch.bool),
        "sampling": sampling,
        "ranked_places": torch.zeros(batch, ranked, dtype=torch.int64) if step.sampling else None,
        "past": [torch.zeros(batch, heads, capacity, size, dtype=dtype) for heads, size, dtype in entries],
        "pending": [torch.zeros(batch, heads, margin, size, dtype=dtype) for heads, size, dtype in entries if margin],
    }
    dynamic = torch.export.Dim.DYNAMIC
    free: dict[str, Any] = {name: None if value is None else {0: dynamic} for name, value in example.items()}
    free["input_ids"] = {0: dynamic, 1: dynamic}
    free["ranked_places"] = {0: dynamic, 1: dynamic} if step.sampling else None
    free["sampling"] = None if sampling is None else free_sizes(step.vocab_size)
    free["past"] = [{0: dynamic, 2: dynamic} for _ in example["past"]]
    free["pending"] = [{0: dynamic} for _ in example["pending"]]
    return example, free


def trace(step: MedusaStep) -> ir.Model:
    """Traces a step.

    Returns:
        A graph with the inputs and outputs of ``_TracedStep``. Its outputs have names, the caches excepted. The first
        layer of each kind is enclosed by ``LayerBoundary`` nodes. Each other layer is one ``DecoderLayer`` node.

    Raises:
        ModelNotSupportedError: The model does something that a step can't honour.
        ExportError: The model's code can't be traced.
    """
    example, free = _example(step)
    names: list[str] = []

    def note(given: Sequence[str]) -> None:
        names[:] = given

    traced = _TracedStep(step, note)
    layers = decoder_layers(step.model)
    like = kinds_of(layers, getattr(step.model.config.get_text_config(), "layer_types", None))
    with torch.no_grad(), quiet_tracing():
        while True:
            try:
                with reusing_layers(layers, like):
                    program = export_program(traced, (), example, free)
                break
            except AnotherKindError as error:
                like[error.layer] = error.layer
            except ModelNotSupportedError:
                raise
            except Exception as error:
                raise ExportError(f"Tracing the model failed: {first_line(error)}") from error
        model = translate(program)
    for name, value in zip(names, model.graph.outputs, strict=False):
        value.name = name
    return model


def translate(program: torch.export.ExportedProgram) -> ir.Model:
    """Translates an exported program to ONNX, with marks of our own domain.

    Raises:
        ExportError: An operator can't be translated.
    """
    try:
        with tracing_once(), unread_sources():
            exported = torch.onnx.export(
                program,
                dynamo=True,
                optimize=False,
                verbose=False,
                opset_version=OPSET_VERSION,
                custom_translation_table=translations(),
            )
    except Exception as error:
        raise ExportError(f"Translating the traced model to ONNX failed: {first_line(error)}") from error
    if exported is None:
        raise ExportError("Translating the traced model to ONNX gave no graph.")
    model: ir.Model = exported.model
    return model


def simplify(model: ir.Model) -> None:
    """Folds constants, but no weights: copies of a layer need weights of their own, and weights may become integers."""
    fold_constants(model, spared=("step.model.", "step.heads."))


def example_sampling(sizes: Mapping[str, int], vocab_size: int) -> dict[str, Tensor]:
    """Example inputs for sampling and constraints, by name, in the order of the contract.

    Args:
        sizes: The sizes of the free dimensions by their names in the contract.
        vocab_size: Size of the vocabulary.
    """
    return {
        spec.name: torch.ones(fixed_shape(spec, sizes), dtype=getattr(torch, spec.dtype))
        for spec in (*sampling_inputs(vocab_size), *constraint_inputs(vocab_size))
    }


def free_sizes(vocab_size: int) -> dict[str, dict[int, Any]]:
    """The free dimensions of the inputs for sampling and constraints, by name, as ``torch.export`` takes them."""
    return {
        spec.name: {axis: torch.export.Dim.DYNAMIC for axis, size in enumerate(spec.shape) if isinstance(size, str)}
        for spec in (*sampling_inputs(vocab_size), *constraint_inputs(vocab_size))
    }
