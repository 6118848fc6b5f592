"""Run heads over held-out positions, and note where their targets stand among their candidates."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from medusa_export.heads import MedusaHeads
from medusa_export.training.features import Features
from medusa_export.training.medusa1 import HeadLoss

_BATCH = 1024


@torch.inference_mode()
def target_places(
    heads: MedusaHeads, embedding: nn.Module, lm_head: nn.Linear, features: Features
) -> NDArray[np.int64]:
    """The rank of each target among its head's candidates, [N, K]; see ``Calibration.count``."""
    loss = HeadLoss(heads, embedding, lm_head).eval()
    found = []
    for first in range(0, len(features), _BATCH):
        rows = slice(first, first + _BATCH)
        output = loss(features.hidden[rows].float(), features.next_tokens[rows], features.targets[rows])
        found.append(output["places"].cpu().numpy())
    places: NDArray[np.int64] = np.concatenate(found)
    return places
