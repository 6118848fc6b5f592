"""The constraints of a request, as its caller gives them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from medusa_runtime.common.numbers import is_integer, number_of
from medusa_runtime.constraints.grammar import Grammar
from medusa_runtime.errors import RequestError

MAX_BIASES = 65_536  # tokens with a bias or a ban in one request


@dataclass(frozen=True, kw_only=True)
class Constraints:
    """Biases, bans, penalties and a grammar for the tokens of an answer.

    They change the logits before temperature and cut-offs, in this order: biases and bans, then the penalties on
    repetition, frequency and presence, then the grammar. A draft tree does not change what they do: the answer is that
    of plain decoding with the same constraints. Log probabilities of an answer stay those of the base model. A request
    whose constraints leave no token ends with ``RequestError``.

    Attributes:
        logit_bias: Numbers that are added to the logits of tokens, by token id; from -1000 to 1000.
        banned_token_ids: Tokens that the answer never has.
        min_new_tokens: The answer doesn't end before it has this number of tokens: until then the model's end tokens
            and the request's ``stop_token_ids`` are banned. Stop strings end it nevertheless, and so does a grammar
            that allows no more text.
        repetition_penalty: Above 0. Logits of tokens that prompt or answer hold are divided by it if they are positive,
            and multiplied if not, as in transformers. 1 is off.
        frequency_penalty: Subtracted from a token's logit once for each time that the answer holds it. 0 is off.
        presence_penalty: Subtracted from the logits of all tokens that the answer holds. 0 is off.
        grammar: The whole answer follows it. Its text ends when the grammar does, at one of the model's end tokens.

    Raises:
        RequestError: A value is out of range or of the wrong type.
    """

    logit_bias: Mapping[int, float] = field(default_factory=dict)
    banned_token_ids: Sequence[int] = ()
    min_new_tokens: int = 0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.logit_bias, Mapping) or len(self.logit_bias) > MAX_BIASES:
            raise RequestError(
                f"logit_bias must map at most {MAX_BIASES:,} token ids to numbers, such as {{17: -2.5}}."
            )
        for token, bias in self.logit_bias.items():
            if not is_integer(token) or token < 0 or not -1e3 <= number_of(bias) <= 1e3:
                raise RequestError(
                    f"logit_bias maps {token!r} to {bias!r}: expected a token id and a number from -1000 to 1000."
                )
        banned = self.banned_token_ids
        if not isinstance(banned, Sequence) or len(banned) > MAX_BIASES:
            raise RequestError(f"banned_token_ids must be a list of at most {MAX_BIASES:,} token ids.")
        for token in banned:
            if not is_integer(token) or token < 0:
                raise RequestError(f"One of banned_token_ids is {token!r}: expected a token id.")
        self._check("min_new_tokens", is_integer(self.min_new_tokens) and self.min_new_tokens >= 0, "0 or above")
        self._check(
            "repetition_penalty", 1e-3 <= number_of(self.repetition_penalty) <= 1e3, "a number from 0.001 to 1000"
        )
        for name in ("frequency_penalty", "presence_penalty"):
            self._check(name, -1e3 <= number_of(getattr(self, name)) <= 1e3, "a number from -1000 to 1000")
        if self.grammar is not None and not isinstance(self.grammar, Grammar):
            raise RequestError(f"grammar is a {type(self.grammar).__name__}: expected a Grammar, or None.")

    def _check(self, name: str, ok: bool, expected: str) -> None:
        if not ok:
            raise RequestError(f"{name} is {getattr(self, name)!r}: expected {expected}.")

    @property
    def has_penalties(self) -> bool:
        """True if logits depend on the tokens of the text."""
        return self.repetition_penalty != 1 or self.frequency_penalty != 0 or self.presence_penalty != 0

    @property
    def are_none(self) -> bool:
        """True if nothing is demanded."""
        edits = self.logit_bias or self.banned_token_ids or self.min_new_tokens or self.has_penalties
        return not edits and self.grammar is None
