"""Logits of a bundle and of the unquantized model at the same places of the same texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from medusa_export.common.errors import VerificationError
from medusa_export.common.progress import Task
from medusa_export.compat.transformers import CACHE, cache_argument
from medusa_export.evaluation.figures import Counts
from medusa_export.training.conversations import Sample
from medusa_export.training.features import padded
from medusa_export.verification.steps import with_outputs
from medusa_runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from medusa_runtime.backends.onnxruntime.session import derived_graph
from medusa_runtime.bundles.bundle import Bundle
from medusa_runtime.tuning import SHARED_CHUNK

# Texts that are stepped through side by side. More rows save no time with 4-bit weights: each takes as long as alone.
_ROWS = 4
_LOGITS = "logits"
# Positions whose logits by the unquantized model are in memory at a time.
_POSITIONS = 64


def compare(
    bundle: Bundle, model: PreTrainedModel, samples: Sequence[Sample], *, threads: int | None, task: Task
) -> Counts:
    """Steps through texts with a bundle, and compares its logits with those of the unquantized model.

    Tokens are given, not chosen: the bundle decodes plainly, a token of each row per step, with the graph that decodes
    several rows. Only tokens of the assistant count.

    Args:
        bundle: The bundle.
        model: The unquantized model, in fp32 on the CPU.
        samples: The texts as tokens.
        threads: Threads of one step; all that this process may use if None.
        task: Counts the finished texts and the tokens.

    Raises:
        BackendError: ONNX Runtime can't run the bundle.
        VerificationError: The bundle's logits are not finite.
    """
    counts, number = Counts(), min(_ROWS, len(samples))
    graph = with_outputs(bundle, derived_graph(bundle, number), [_LOGITS])
    backend = OnnxRuntimeBackend(bundle, rows=number, threads=threads, graph=graph, extra_outputs=[_LOGITS])
    with closing(backend), torch.inference_mode():
        for group in _groups(samples, number):
            _take_in(backend, group, bundle)
            for position, expected in _expected(model, group.ids, group.start):
                logits = _step(backend, group.ids[:, position], bundle)
                counted = group.is_label[:, position + 1]
                counts.add(logits[counted], expected[counted], group.ids[counted, position + 1])
                task.add(int(counted.sum()))
            for _ in range(group.texts):
                task.finish_piece()
    return counts


@dataclass(frozen=True)
class _Group:
    """Texts that are stepped through together, padded on the right.

    Attributes:
        ids: Token ids, [rows, S].
        is_label: [rows, S], True for the assistant's tokens.
        start: The first position whose logits count.
        texts: The number of texts; rows that are left have no labels.
    """

    ids: Tensor
    is_label: Tensor
    start: int
    texts: int


def _groups(samples: Sequence[Sample], rows: int) -> Iterator[_Group]:
    """Divides texts into groups of ``rows``, in which the answers begin at similar places."""
    ordered = sorted(samples, key=lambda sample: (_start(sample), len(sample.input_ids)))
    for first in range(0, len(ordered), rows):
        texts = ordered[first : first + rows]
        filled = texts + texts[:1] * (rows - len(texts))
        ids, _ = padded(filled)
        is_label = torch.zeros_like(ids, dtype=torch.bool)
        for row, text in enumerate(texts):
            is_label[row, : len(text.input_ids)] = torch.tensor(text.is_label)
        yield _Group(ids, is_label, min(map(_start, texts)), len(texts))


def _start(sample: Sample) -> int:
    """The position whose logits predict the assistant's first token."""
    return max(sample.is_label.index(True) - 1, 0)


def _expected(model: PreTrainedModel, ids: Tensor, start: int) -> Iterator[tuple[int, Tensor]]:
    """Yields each position from ``start`` to the last but one, and the model's logits there, [rows, V]."""
    run: Any = model
    cache = run(ids[:, :start], use_cache=True, logits_to_keep=1)[CACHE] if start else None
    argument, end = cache_argument(model), ids.shape[1] - 1
    for first in range(start, end, _POSITIONS):
        output = run(ids[:, first : min(first + _POSITIONS, end)], **{argument: cache}, use_cache=True)
        cache = output[CACHE]
        for place in range(output.logits.shape[1]):
            yield first + place, output.logits[:, place]


def _take_in(backend: OnnxRuntimeBackend, group: _Group, bundle: Bundle) -> None:
    """Empties all rows, and takes in the tokens before the group's start."""
    length, limit = group.ids.shape[1], bundle.model.most_tokens(group.start)
    if length > limit:
        raise VerificationError(f"A text has {length} tokens, but this model takes at most {limit}: shorten the texts.")
    backend.reserve(bundle.slots.capacity(length, SHARED_CHUNK))
    for row in range(backend.rows):
        backend.reset(row)
        backend.set_long(row, bundle.model.is_long(group.start))
    for first in range(0, group.start, SHARED_CHUNK):
        chunks = group.ids[:, first : min(first + SHARED_CHUNK, group.start)]
        backend.step(chunks.shape[1], dict(enumerate(chunks.tolist())))


def _step(backend: OnnxRuntimeBackend, tokens: Tensor, bundle: Bundle) -> Tensor:
    """Takes in a token of each row, and returns the logits after it, [rows, V]."""
    backend.drafts[:, 0] = tokens.numpy()
    if not backend.step(1).count.all():
        raise VerificationError(f"The logits of {bundle.folder} are not finite: check the weights of the model.")
    return torch.from_numpy(backend.extra_output(_LOGITS)[:, 0].astype(np.float32))
