"""Constraints inside a step: biases, bans, penalties on the text so far, and the tokens that a grammar allows.

The host lists for each row the tokens whose logits may change, the *edited* tokens: those with a bias, and with
penalties those of the text and of the drafted tree. The effect of a penalty on a token depends on how often the token
occurred. The host counts the text up to the root. The step adds the tokens between the root and each node. So every
node has the logits that plain decoding would have after the same tokens.

A step in which no token is drawn has no nodes to constrain, so nothing here computes anything then.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from medusa_runtime.bundles.contract import MASK_BITS


@dataclass(frozen=True)
class ConstraintInputs:
    """The inputs of the graph for constraints; see ``docs/contract.md``.

    Attributes:
        edit_tokens: [B, 1, P], the edited tokens. A row that has fewer repeats one of its own.
        edit_bias: [B, 1, P], the number that is added to the logit of each of them.
        edit_count: [B, 1, P], the number of times that each is in the answer.
        edit_seen: [B, 1, P], 1 for each that is in the prompt or in the answer, and 0 for others.
        repetition_penalty: [B, 1, 1], logits of tokens in the text are divided by it, or multiplied if negative.
        frequency_penalty: [B, 1, 1], is subtracted once for each time that a token is in the answer.
        presence_penalty: [B, 1, 1], is subtracted once from the logits of tokens in the answer.
        allowed_tokens: [B, A, ⌈V / 8⌉] uint8, a bit per token, of the tokens allowed after each node. A is U, or 1 if
            the same tokens are allowed after all nodes.
    """

    edit_tokens: Tensor
    edit_bias: Tensor
    edit_count: Tensor
    edit_seen: Tensor
    repetition_penalty: Tensor
    frequency_penalty: Tensor
    presence_penalty: Tensor
    allowed_tokens: Tensor

    def tensors(self) -> list[Tensor]:
        """All inputs, in the order of the graph."""
        return list(vars(self).values())


def constrained(logits: Tensor, nodes: Tensor, ancestors: Tensor, given: ConstraintInputs) -> Tensor:
    """The logits [B, U, V] of U nodes with biases and penalties, and -inf for forbidden tokens.

    First comes the bias, then the penalty on repetition, on frequency and on presence, as in vLLM. Transformers has the
    first two, in the same order.

    Args:
        logits: [B, U, V] fp32, of the base model.
        nodes: [B, U], the token of each node.
        ancestors: [1, U, U] fp32, 1 at [0, n, m] where node m is n or between the root and n, and 0 elsewhere.
        given: The constraints.
    """
    node = nodes.unsqueeze(2)
    is_drafted = node == given.edit_tokens  # [B, U, P]
    drafted = ancestors @ is_drafted.float()  # how often each token is between the root and the node
    index = torch.where(is_drafted, node, given.edit_tokens)  # the edited tokens for each node, in one layer
    value = logits.gather(2, index) + given.edit_bias
    repeated = torch.where(value < 0, value * given.repetition_penalty, value / given.repetition_penalty)
    value = torch.where(given.edit_seen + drafted > 0, repeated, value)
    count = given.edit_count + drafted
    value = value - given.frequency_penalty * count - given.presence_penalty * count.clamp(max=1)
    mask: Tensor = refused(given.allowed_tokens, logits.shape[2])
    return logits.scatter(2, index, value) + mask


@torch.library.custom_op("medusa_export::refused", mutates_args=())
def refused(masks: Tensor, vocab_size: int) -> Tensor:
    """Turns masks [B, A, ⌈V / 8⌉] into numbers to add to logits, [B, A, V]: -inf for forbidden tokens, 0 for others.

    A traced ``flatten`` reads sizes at run time, in up to 30 layers of TensorRT. So ``graph.trace`` writes this out.
    """
    return refused_bits(masks.device)[masks.int()].flatten(2)[..., :vocab_size].contiguous()


@refused.register_fake
def _(masks: Tensor, vocab_size: int) -> Tensor:
    return masks.new_empty(*masks.shape[:2], vocab_size, dtype=torch.float32)


def refused_bits(device: torch.device | None = None) -> Tensor:
    """For the 8 bits of each value of a byte, [256, 8]: -inf if the bit is 0, and 0 if it is 1.

    TensorRT has no operators for bits.
    """
    byte = torch.arange(2**MASK_BITS, device=device).unsqueeze(1)
    weight = 2 ** torch.arange(MASK_BITS, device=device)
    return torch.where(byte // weight % 2 > 0, 0.0, -torch.inf)
