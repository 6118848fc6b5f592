"""Run heads over held-out positions, and note where their targets stand among their candidates.

The runtime puts guesses from the text in front of the heads' candidates (``medusa_runtime.decoding.lookup``), so it is
noted as well where targets stand then: that is what a tree may expect.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from medusa_export.common.errors import TrainingError
from medusa_export.heads.modules import MedusaHeads
from medusa_export.training.conversations import Sample
from medusa_export.training.features import Features, positions_of
from medusa_export.training.medusa1 import TOP, HeadLoss
from medusa_export.trees.calibration import Calibration
from medusa_runtime.decoding.lookup import DEEPEST_GUESS, TokenLookup

_BATCH = 1024


def depth_of(heads: MedusaHeads, *, lookup: bool) -> int:
    """How many tokens ahead are looked at: guesses from the text go deeper than heads."""
    return max(heads.config.num_heads, DEEPEST_GUESS) if lookup else heads.config.num_heads


def counted(
    heads: MedusaHeads,
    model: PreTrainedModel,
    features: Features,
    texts: Iterable[Sample],
    *,
    lookup: bool,
    names: Mapping[str, str],
) -> Calibration:
    """What the heads of a model come to.

    Args:
        heads: The heads.
        model: Their base model.
        features: Positions on held-out text, with targets to the depth of ``depth_of``.
        texts: The conversations that they are of, in the same order.
        lookup: Count guesses from the text, too.
        names: Of ``model`` and ``heads``, to keep.

    Raises:
        DatasetError: A head has no target at all.
    """
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    num_heads, targets = heads.config.num_heads, features.targets.numpy()
    places = tried = target_places(heads, *layers, replace(features, targets=features.targets[:, :num_heads]))
    guesses = np.full(targets.shape, -1)
    if lookup:
        guesses = text_guesses(texts, targets.shape[1]).numpy()
        guessed = target_places(heads, *layers, replace(features, targets=torch.tensor(guesses[:, :num_heads])))
        tried = with_guesses(below_heads(places, targets), below_heads(guessed, guesses), guesses, targets)
    starts = step_starts(tried, features.left.numpy())
    return Calibration.count(places, TOP[-1], steps=tried[starts], guessed=guesses[starts, 0] >= 0, **names)


@torch.inference_mode()
def target_places(
    heads: MedusaHeads, embedding: nn.Module, lm_head: nn.Linear, features: Features
) -> NDArray[np.int64]:
    """The rank of each target among its head's candidates, [N, K]; see ``Calibration.count``."""
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
                "The heads' logits are not finite numbers, so that their ranks mean nothing. Check the weights of the "
                "heads and of the model, or take --dtype fp32."
            )
        found.append(output["places"].cpu().numpy())
    places: NDArray[np.int64] = np.concatenate(found)
    return places


def text_guesses(samples: Iterable[Sample], num_heads: int) -> Tensor:
    """What the runtime would guess from the text at each position of these samples, [N, K]; -1 where it would not."""
    rows: list[list[int]] = []
    for sample in samples:
        lookup, known = TokenLookup(), 0
        for position in positions_of(sample, num_heads)[0]:
            # The base model has chosen the next token by then.
            lookup.extend(sample.input_ids[known : position + 2])
            known = position + 2
            rows.append(lookup.guess(num_heads) or [-1] * num_heads)
    return torch.tensor(rows, dtype=torch.int32).reshape(-1, num_heads)


def below_heads(places: NDArray[np.int64], targets: NDArray[np.int64]) -> NDArray[np.int64]:
    """Places [N, K] of targets [N, D], D > K, where no head has a candidate for those further down: [N, D]."""
    deeper = targets[:, places.shape[1] :]
    return np.concatenate([places, np.where(deeper >= 0, TOP[-1], -1)], axis=1)


def with_guesses(
    places: NDArray[np.int64], guessed: NDArray[np.int64], guesses: NDArray[np.int64], targets: NDArray[np.int64]
) -> NDArray[np.int64]:
    """The rank of each target among candidates with guesses from the text in front of the heads', [N, K].

    Args:
        places: [N, K], its rank among the heads' alone.
        guessed: [N, K], the rank of each guess among these.
        guesses: [N, K], as ``text_guesses`` gives them.
        targets: [N, K].
    """
    there = (guesses >= 0) & (places >= 0)
    # A guess that a head has ranked behind the target, or not at all, moves it up one place.
    merged = np.where(there & (guesses == targets), 0, places + (there & (guessed > places)))
    # Guesses stand one below the other: the second is in the tree below the first only.
    on_spine = np.cumprod(np.column_stack([np.ones(len(places), np.int64), merged[:, :-1] == 0]), axis=1) > 0
    return np.where(on_spine, merged, places)


def step_starts(places: NDArray[np.int64], left: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where steps begin that verify the best candidates: where many tokens are right, there are few steps.

    Args:
        places: [N, K], the rank of each target.
        left: [N], how many of the rows that follow are the next positions of the same turn.
    """
    right = np.cumprod(places == 0, axis=1).sum(1)
    jumps = 1 + np.minimum(right, left)
    starts, place = [], 0
    while place < len(places):
        starts.append(place)
        place += int(jumps[place])
    return np.array(starts, np.int64)
