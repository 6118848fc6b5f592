"""Figures that compare a quantized model with the unquantized one."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass
class Counts:
    """Sums over tokens, from which the figures follow.

    Attributes:
        tokens: Number of tokens.
        reference_loss: Sum of -log p of the tokens by the unquantized model.
        loss: The same by the quantized model.
        squared_excess: Sum of the squares of the differences between the two.
        divergence: Sum of the KL divergences of the two distributions, from the unquantized model's.
        same: Number of places where both models' best token is the same.
    """

    tokens: int = 0
    reference_loss: float = 0.0
    loss: float = 0.0
    squared_excess: float = 0.0
    divergence: float = 0.0
    same: int = 0

    def add(self, logits: Tensor, expected: Tensor, tokens: Tensor) -> None:
        """Counts some places.

        Args:
            logits: The quantized model's logits, [N, V].
            expected: The unquantized model's logits at the same places, [N, V].
            tokens: The tokens that follow, [N].
        """
        ours, theirs = logits.double().log_softmax(-1), expected.double().log_softmax(-1)
        loss, reference_loss = (-logs.gather(1, tokens[:, None])[:, 0] for logs in (ours, theirs))
        self.tokens += len(tokens)
        self.loss += float(loss.sum())
        self.reference_loss += float(reference_loss.sum())
        self.squared_excess += float((loss - reference_loss).square().sum())
        self.divergence += float((theirs.exp() * (theirs - ours)).sum())
        self.same += int((logits.argmax(-1) == expected.argmax(-1)).sum())


@dataclass(frozen=True)
class Closeness:
    """Averages over tokens that compare a quantized model with the unquantized one.

    Attributes:
        tokens: Number of tokens.
        perplexity: The quantized model's perplexity.
        reference_perplexity: The unquantized model's perplexity.
        perplexity_error: Standard error of the ratio of the two, from the spread over tokens.
        divergence: Mean KL divergence from the unquantized model's distribution of the next token, in nats.
        same_choice: Share of places where both models' best token is the same.
    """

    tokens: int
    perplexity: float
    reference_perplexity: float
    perplexity_error: float
    divergence: float
    same_choice: float

    @property
    def perplexity_ratio(self) -> float:
        """The quantized model's perplexity, as a multiple of the unquantized model's."""
        return self.perplexity / self.reference_perplexity

    @classmethod
    def of(cls, counts: Counts) -> Closeness:
        """The figures of some counts."""
        number = counts.tokens
        excess = (counts.loss - counts.reference_loss) / number
        spread = math.sqrt(max(counts.squared_excess / number - excess**2, 0.0))
        return cls(
            number,
            math.exp(counts.loss / number),
            math.exp(counts.reference_loss / number),
            math.exp(excess) * spread / math.sqrt(number),
            counts.divergence / number,
            counts.same / number,
        )
