"""Runs heads over held-out text and counts the ranks of the targets among the heads' candidates.

The runtime puts lookup hits before the heads' candidates (``medusa_runtime.decoding.lookup``). So the ranks are also
counted among the candidates with lookup hits before them: they determine how many nodes a step will accept.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from medusa_export.common import defaults
from medusa_export.common.dtypes import Dtype
from medusa_export.common.errors import TrainingError, VerificationError
from medusa_export.common.progress import OnProgress, Progress, ignore_progress
from medusa_export.compat.transformers import default_attention
from medusa_export.heads.base import DraftHeads
from medusa_export.heads.files import load_heads
from medusa_export.models.checkpoints import load_model
from medusa_export.step.reference import load_reference
from medusa_export.training.conversations import Sample
from medusa_export.training.dataset import load_heldout
from medusa_export.training.device import device_of, dtype_of
from medusa_export.training.features import (
    FeatureKey,
    Features,
    batched,
    compute_features,
    digest_of_samples,
    positions_of,
)
from medusa_export.training.medusa1 import TOP, HeadLoss
from medusa_export.training.templates import load_chat_tokenizer
from medusa_export.trees.calibration import Calibration
from medusa_export.verification.plan import check_same
from medusa_export.verification.stored_matrices import use_stored_matrices
from medusa_runtime.bundles.bundle import Bundle
from medusa_runtime.decoding.lookup import TokenLookup
from medusa_runtime.tuning import DEEPEST_LOOKUP

_BATCH = 1024


def calibrate(
    model: str | PathLike[str],
    heads: str | PathLike[str],
    data: Sequence[str | PathLike[str]],
    *,
    max_length: int = defaults.MAX_LENGTH,
    strict: bool = False,
    lookup: bool = True,
    bundle: str | PathLike[str] | None = None,
    dtype: Dtype | None = None,
    device: str | None = None,
    text_only: bool = False,
    on_progress: OnProgress = ignore_progress,
) -> Calibration:
    """Measures how often heads are right, by head and rank, on text that they were not trained on.

    ``search_tree`` finds the best tree for the result, and ``export`` gives the runtime acceptance estimates from it.
    Rows that can't be used are left out with a ``MedusaWarning``.

    Args:
        model: The base model: a folder in Hugging Face's layout, a hub id, or the path of a ``.gguf`` file. It needs a
            chat template.
        heads: The heads: a file, a folder or a hub id, in any published format.
        data: Data sets: folders that ``distill`` wrote, of which the held-out part is used, or files of conversations.
        max_length: Largest number of tokens of a conversation; the rest is cut off.
        strict: Refuse data with rows that can't be used, instead of leaving these rows out.
        lookup: Count the runtime's lookup hits, too.
        bundle: A bundle of this model and these heads whose matrices are stored as integers. They take the place of the
            model's and the heads' own.
        dtype: Type of the model's weights; bf16 on a GPU and fp32 elsewhere if None.
        device: The device to run on, such as ``cuda:1``; the GPU, if there is one, if None.
        text_only: Take the text model out of a larger one, such as one for images and text.
        on_progress: Receives reports.

    Returns:
        The measured hit rates; ``save`` writes them to a file.

    Raises:
        OptionError: The type is unknown.
        BundleError: The bundle can't be read.
        CheckpointError: The model or the heads can't be read, or don't fit each other.
        VerificationError: The bundle was exported from another model, or with other heads.
        DatasetError: The data can't be read, or are too short for the heads.
        SettingsError: A folder of data was not written by ``distill``.
        TrainingError: The heads' logits are not finite.
    """
    source, place = fspath(model), device_of(device)
    kind = dtype_of(dtype, place)
    tokenized = load_heldout([Path(path) for path in data]).tokenized(
        load_chat_tokenizer(source), max_length, strict=strict
    )
    tokenized.warn_of_skipped(stacklevel=2)
    on_progress(Progress(f"loading {source}"))
    if bundle is None:
        base = load_model(source, dtype=getattr(torch, kind), text_only=text_only)
        attached = load_heads(fspath(heads), base)
    else:
        base, attached = load_with_integers(Bundle.load(Path(bundle)), source, fspath(heads), text_only=text_only)
    names = {"model": Path(source).name, "heads": Path(fspath(heads)).name}
    return measured(
        attached.float().to(place),
        base.to(place, getattr(torch, kind)),
        tokenized.samples["heldout"],
        max_length=max_length,
        lookup=lookup,
        names=names,
        on_progress=on_progress,
    )


def load_with_integers(
    bundle: Bundle, model: str, heads: str, *, text_only: bool = False
) -> tuple[PreTrainedModel, DraftHeads]:
    """Loads a model and its heads, with the matrices of integers that a bundle stores. Both compute in fp32.

    Args:
        bundle: The bundle.
        model: The model: a folder, a hub id or a GGUF file.
        heads: The file or folder of the heads.
        text_only: The bundle holds the text model of a larger model.

    Raises:
        CheckpointError: The model or the heads can't be read.
        VerificationError: The bundle was exported from another model, or with other heads.
    """
    step = load_reference(bundle, model, heads, text_only=text_only)
    check_same(bundle, step)
    check = use_stored_matrices(step, bundle)
    if not check.passed:
        raise VerificationError(f"The bundle was exported from another model or other heads: {check.notes[0]}.")
    base: Any = step.model
    base.set_attn_implementation(default_attention(base))
    assert step.heads is not None  # the reference of a bundle without heads refuses a file of heads
    return base, step.heads


def measured(
    heads: DraftHeads,
    model: PreTrainedModel,
    parts: Sequence[Sequence[Sample]],
    *,
    max_length: int,
    lookup: bool,
    names: Mapping[str, str],
    on_progress: OnProgress = ignore_progress,
) -> Calibration:
    """Runs a model and its heads over samples, and counts how often the heads are right.

    Args:
        heads: The heads, in fp32 on the model's device.
        model: The heads' base model.
        parts: Samples of held-out text, by data set.
        max_length: Largest number of tokens of a sample; the rest is cut off.
        lookup: Count the runtime's lookup hits, too.
        names: The names ``model`` and ``heads`` that the calibration keeps.
        on_progress: Receives reports.

    Raises:
        DatasetError: The samples are too short for the heads.
        TrainingError: The heads' logits are not finite.
    """
    depth = depth_of(heads, lookup=lookup)
    computed: list[Features] = []
    texts: list[Sample] = []
    for samples in parts:
        key = FeatureKey.of(model, names["model"], digest_of_samples(samples), depth, max_length)
        computed.append(_computed(model, samples, key, on_progress))
        texts += [sample for batch in batched(samples, max_length) for sample in batch]
    features = Features.join(computed)
    on_progress(Progress(f"running the heads over {len(features):,} positions"))
    return counted(heads, model, features, texts, lookup=lookup, names=names)


def _computed(model: PreTrainedModel, samples: Sequence[Sample], key: FeatureKey, on_progress: OnProgress) -> Features:
    """Computes features in a temporary folder."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "features"
        otherwise = "set TMPDIR to a folder that has more, or give less data"
        return compute_features(
            model, samples, folder, key, name="heldout", otherwise=otherwise, on_progress=on_progress
        )


def depth_of(heads: DraftHeads, *, lookup: bool) -> int:
    """The number of tokens ahead to count. Lookup hits reach deeper than heads.

    Args:
        heads: The heads.
        lookup: Count lookup hits, too.
    """
    return max(heads.config.num_heads, DEEPEST_LOOKUP) if lookup else heads.config.num_heads


def counted(
    heads: DraftHeads,
    model: PreTrainedModel,
    features: Features,
    texts: Iterable[Sample],
    *,
    lookup: bool,
    names: Mapping[str, str],
) -> Calibration:
    """The calibration of heads on held-out text.

    Args:
        heads: The heads.
        model: The heads' base model.
        features: Positions of held-out text, with ``depth_of`` targets each.
        texts: The conversations that hold these positions, in the same order.
        lookup: Count lookup hits, too.
        names: The names ``model`` and ``heads`` that the calibration keeps.

    Raises:
        DatasetError: A head has no target.
    """
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    num_heads, targets = heads.config.num_heads, features.targets.numpy()
    places = tried = target_places(heads, *layers, replace(features, targets=features.targets[:, :num_heads]))
    proposed = np.full(targets.shape, -1)
    if lookup:
        proposed = lookup_tokens(texts, targets.shape[1]).numpy()
        ranks = target_places(heads, *layers, replace(features, targets=torch.tensor(proposed[:, :num_heads])))
        tried = with_hits(below_heads(places, targets), below_heads(ranks, proposed), proposed, targets)
    starts = step_starts(tried, features.left.numpy())
    return Calibration.count(places, TOP[-1], steps=tried[starts], hits=proposed[starts, 0] >= 0, **names)


@torch.inference_mode()
def target_places(heads: DraftHeads, embedding: nn.Module, lm_head: nn.Linear, features: Features) -> NDArray[np.int64]:
    """The rank of each target among its head's candidates, [N, K]; see ``Calibration.count``.

    Args:
        heads: The heads.
        embedding: The base model's embedding of tokens.
        lm_head: The base model's output layer.
        features: N positions with K targets each.

    Raises:
        TrainingError: The heads' logits are not finite.
    """
    loss = HeadLoss(heads, embedding, lm_head.out_features).eval()
    device, dtype = lm_head.weight.device, lm_head.weight.dtype
    found = []
    for first in range(0, len(features), _BATCH):
        rows = slice(first, first + _BATCH)
        given = (features.hidden[rows].float(), features.next_tokens[rows], features.targets[rows])
        with torch.autocast(device.type, dtype, enabled=dtype is not torch.float32):  # heads are in fp32
            output = loss(*(tensor.to(device) for tensor in given))
        if not output["loss"].isfinite():
            raise TrainingError(
                "The heads' logits are not finite, so their candidates can't be ranked. Check the weights of the "
                "heads and of the model, or use `dtype='fp32'`."
            )
        found.append(output["places"].cpu().numpy())
    places: NDArray[np.int64] = np.concatenate(found)
    return places


def lookup_tokens(samples: Iterable[Sample], num_heads: int) -> Tensor:
    """The tokens that the runtime's lookup proposes at each position of these samples, [N, K]; -1 without a hit."""
    rows: list[list[int]] = []
    for sample in samples:
        lookup, known = TokenLookup(), 0
        for position in positions_of(sample, num_heads)[0]:
            # At this position the base model has already chosen the next token.
            lookup.extend(sample.input_ids[known : position + 2])
            known = position + 2
            rows.append(lookup.find(num_heads) or [-1] * num_heads)
    return torch.tensor(rows, dtype=torch.int32).reshape(-1, num_heads)


def below_heads(places: NDArray[np.int64], targets: NDArray[np.int64]) -> NDArray[np.int64]:
    """Extends places [N, K] to all targets [N, D], D > K: no head has a candidate for the deeper targets."""
    deeper = targets[:, places.shape[1] :]
    return np.concatenate([places, np.where(deeper >= 0, TOP[-1], -1)], axis=1)


def with_hits(
    places: NDArray[np.int64], ranks: NDArray[np.int64], proposed: NDArray[np.int64], targets: NDArray[np.int64]
) -> NDArray[np.int64]:
    """The rank of each target when the tokens of lookup hits stand before the heads' candidates, [N, K].

    Args:
        places: [N, K], the rank of each target among the heads' candidates alone.
        ranks: [N, K], the rank of each proposed token among the heads' candidates.
        proposed: [N, K], the tokens that the lookup proposes, as ``lookup_tokens`` returns them.
        targets: [N, K], the targets.
    """
    there = (proposed >= 0) & (places >= 0)
    # A proposed token that a head ranks behind the target, or not at all, moves the target back by one rank.
    merged = np.where(there & (proposed == targets), 0, places + (there & (ranks > places)))
    # Proposed tokens form a chain: in the tree, the second exists only below the first.
    on_best_path = np.cumprod(np.column_stack([np.ones(len(places), np.int64), merged[:, :-1] == 0]), axis=1) > 0
    return np.where(on_best_path, merged, places)


def step_starts(places: NDArray[np.int64], left: NDArray[np.int64]) -> NDArray[np.int64]:
    """Indices of the positions at which steps begin, if steps verify the best candidates.

    Where many candidates are right, steps emit many tokens, so fewer steps begin there.

    Args:
        places: [N, K], the rank of each target.
        left: [N], the number of following positions that belong to the same turn.
    """
    right = np.cumprod(places == 0, axis=1).sum(1)
    jumps = 1 + np.minimum(right, left)
    starts, place = [], 0
    while place < len(places):
        starts.append(place)
        place += int(jumps[place])
    return np.array(starts, np.int64)
