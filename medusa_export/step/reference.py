"""The PyTorch reference of a bundle: the same weights, heads and tree, computed in fp32."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from medusa_export.common.errors import VerificationError
from medusa_export.common.progress import OnProgress, ignore_progress
from medusa_export.heads.base import DraftHeads
from medusa_export.heads.files import load_heads
from medusa_export.heads.modules import MedusaHeads
from medusa_export.models.checkpoints import load_model, open_model
from medusa_export.models.offload import offload
from medusa_export.step.attention import ATTENTION_NAME
from medusa_export.step.step import MedusaStep
from medusa_runtime.bundles.bundle import Bundle
from medusa_runtime.text.tokenizer import Tokenizer


def load_reference(
    bundle: Bundle,
    model: str,
    heads: str | None,
    *,
    text_only: bool = False,
    offload_folder: Path | None = None,
    on_progress: OnProgress = ignore_progress,
) -> MedusaStep:
    """Loads the step that a bundle was exported from. Weights are rounded to the bundle's dtype; it computes in fp32.

    Args:
        bundle: The bundle.
        model: The base model: a folder, a hub id or a GGUF file.
        text_only: True if the bundle holds the text model of a larger model.
        heads: The file of heads; None if the bundle has none, or untrained ones.
        offload_folder: The folder to keep the model's weights in; None to keep them in memory.
        on_progress: Receives reports.

    Raises:
        CheckpointError: The model or the heads can't be read.
        OutputError: The weights can't be written to the folder.
        ExtensionError: An acceptance rule of the bundle isn't registered.
        VerificationError: The bundle has trained heads and none are given, or heads are given and it has none.
    """
    dtype = getattr(torch, bundle.dtype)
    if offload_folder is None:
        base = load_model(model, dtype=dtype, attn_implementation=ATTENTION_NAME, text_only=text_only)
    else:
        opened = open_model(model, dtype=dtype, attn_implementation=ATTENTION_NAME, text_only=text_only)
        base = offload(opened, offload_folder, on_progress)
    attached: DraftHeads | None = None
    if bundle.heads is None or bundle.tree.max_depth == 0:
        if heads is not None:
            raise VerificationError("This bundle has no heads: drop `heads`.")
    elif heads is not None:
        attached = load_heads(heads, base)
    elif bundle.heads.trained:
        raise VerificationError("This bundle has trained heads: give the file that it was exported with as `heads`.")
    else:
        attached = MedusaHeads.fresh(bundle.heads.num_heads, base.get_output_embeddings())
    if attached is not None:
        assert bundle.heads is not None
        if attached.config.num_heads < bundle.heads.num_heads:
            raise VerificationError(
                f"These are {attached.config.num_heads} heads, but the bundle was exported with "
                f"{bundle.heads.num_heads}: give those."
            )
        attached = attached.truncated(bundle.heads.num_heads).float()
    return MedusaStep(
        base.float(), attached, bundle.tree, rules=bundle.acceptance_rules, kv_cache=bundle.kv_cache
    ).eval()


def prompt_ids(bundle: Bundle, texts: Sequence[str], *, chosen: bool) -> list[list[int]]:
    """Encodes prompts; a bundle without a tokenizer gets random token ids instead.

    Args:
        bundle: The bundle.
        texts: The prompts.
        chosen: True if the user chose the prompts, so that random ones can't replace them.

    Raises:
        VerificationError: The user chose the prompts, but the bundle has no tokenizer.
    """
    tokenizer = Tokenizer.load(bundle.listed)
    if tokenizer is not None:
        return [tokenizer.encode(text) for text in texts]
    if chosen:
        raise VerificationError("This bundle has no tokenizer to read prompts with: drop `prompts`.")
    rng = np.random.default_rng(0)
    return [rng.integers(bundle.model.vocab_size, size=9 + 5 * i).tolist() for i in range(len(texts))]
