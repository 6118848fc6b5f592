"""Refuse models that would be partly random, and checkpoints of which a part would be left out."""

from __future__ import annotations

import re

from medusa_export.common.errors import CheckpointError
from medusa_export.models.checkpoint import LoadedModel

# Tensors of MEDUSA heads that were merged into a model. ``medusa_export.heads`` reads them.
HEADS = re.compile(r"(^|\.)medusa_heads?\.")
# Ends of the names that quantizers give to their tensors.
_PACKED = re.compile(
    r"(qweight|qzeros|g_idx|scales?|scale_inv|weight_scale_2|input_scale|zero_point|weight_packed|weight_shape|absmax|"
    r"quant_map|quant_state\..*|SCB|W_q|meta|codebooks?|codes)$"
)


def check_complete(source: str, loaded: LoadedModel) -> None:
    """Checks that each weight of a model comes from its files, and each tensor of the files is a weight of the model.

    Raises:
        CheckpointError: The message names a tensor that is missing, is left over or has another shape.
    """
    for name, found, expected in sorted(loaded.mismatched):
        raise CheckpointError(
            f"The weight {name} of {source} has the shape {list(found)}, but its config.json asks for "
            f"{list(expected)}: the two belong to different models."
        )
    unread = sorted(name for name in loaded.unread if not HEADS.search(name))
    if unread:
        raise CheckpointError(_unread_weights(source, unread))
    missing = sorted(loaded.missing)
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(
            f"The checkpoint {source} lacks the weight {missing[0]}{more}, which would be random: get a complete one."
        )


def _unread_weights(source: str, names: list[str]) -> str:
    """A sentence about tensors that the model has no place for."""
    few = ", ".join(names[:3])
    words = f"{len(names)} tensors of {source}" if len(names) > 1 else f"A tensor of {source}"
    words += f" would be left out, since its configuration has no place for {'them' if len(names) > 1 else 'it'}: {few}"
    words += f" and {len(names) - 3} more. " if len(names) > 3 else ". "
    if any(".lora_" in name or name.startswith("base_model.model.") for name in names):
        return (
            words
            + "Such names belong to a LoRA adapter within the weights: merge it into them (peft: merge_and_unload)."
        )
    if any(_PACKED.search(name) for name in names):
        return words + "Such names belong to packed weights: give the model with weights in fp32, fp16 or bf16."
    if all(name.endswith(".bias") for name in names):
        return words + "They are biases: correct the settings in its config.json that say which layers have one."
    return words + "Correct its config.json, or get the checkpoint that belongs to it."
