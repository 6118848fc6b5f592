"""The tokens of one request: its prompt, its completion, and the conditions that end it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Self, Unpack, cast

import numpy as np

from medusa_runtime.backends.base import Ranked
from medusa_runtime.bundles.bundle import Bundle
from medusa_runtime.bundles.contract import MAX_TOP_LOGPROBS
from medusa_runtime.common.numbers import is_integer
from medusa_runtime.constraints.grammar import GrammarWalk
from medusa_runtime.constraints.options import Constraints
from medusa_runtime.constraints.row import RowConstraints
from medusa_runtime.decoding.lookup import TokenLookup
from medusa_runtime.errors import ContextLengthError, RequestError
from medusa_runtime.request import Chunk, GenerationOptions, GenerationResult, Prompt, RankedToken, Stats
from medusa_runtime.sampling import GREEDY, Draws, SamplingParams
from medusa_runtime.text.limits import bounded, shown
from medusa_runtime.text.prompts import encode_prompt
from medusa_runtime.text.stop_strings import check_stop
from medusa_runtime.text.stream import TextStream
from medusa_runtime.text.tokenizer import Tokenizer


class TokenSequence:
    """A prompt and the tokens that follow it.

    Args:
        prompt_ids: Token ids of the prompt.
        max_new_tokens: The most tokens to generate.
        stop_token_ids: Token ids that end the completion.
        text: Decodes the completion and finds stop strings; None without a tokenizer.
        draws: The numbers that the row draws tokens with; None if it is greedy and needs no log probabilities.
        logprobs: If True, log probabilities are kept.
        top_logprobs: Number of most likely tokens that are kept for the place of each token.
        lookup: Finds lookup hits in prompt and completion; None if the request does without.
        is_long: True if the request takes the rotary frequencies of long ones.

    Attributes:
        prefilled: Tokens of the prompt that the cache holds.
        token_ids: Token ids of the completion so far, including a stop token.
        finish_reason: ``stop`` or ``length`` once the completion has ended, None before.
        draws: The numbers that the row draws tokens with; None if it draws none.
        stats: Figures of the request.
        is_long: True if the request takes the rotary frequencies of long ones.
    """

    def __init__(
        self,
        prompt_ids: Sequence[int],
        max_new_tokens: int,
        stop_token_ids: frozenset[int],
        text: TextStream | None,
        draws: Draws | None = None,
        logprobs: bool = False,
        lookup: TokenLookup | None = None,
        *,
        top_logprobs: int = 0,
        is_long: bool = False,
    ) -> None:
        self.prompt_ids = prompt_ids
        self.is_long = is_long
        self.max_new_tokens = max_new_tokens
        self.prefilled = 0
        self.token_ids: list[int] = []
        self.finish_reason: str | None = None
        self.stats = Stats(prompt_tokens=len(prompt_ids))
        self.draws = draws
        self._logprobs: list[float] | None = [] if logprobs else None
        self._top = top_logprobs
        self._top_logprobs: list[tuple[RankedToken, ...]] = []
        self._stop_token_ids = stop_token_ids
        self._text = text
        self._lookup = lookup

    @classmethod
    def of(
        cls, bundle: Bundle, tokenizer: Tokenizer | None, prompt: Prompt, **options: Unpack[GenerationOptions]
    ) -> Self:
        """Checks a request and makes its sequence.

        Args:
            bundle: The bundle that answers it.
            tokenizer: The bundle's tokenizer, or None if it has none.
            prompt: The prompt, of any kind.
            options: Options of the request. Their defaults are here.

        Raises:
            RequestError: The bundle can't serve the request; the message says why.
        """
        stops = check_stop(options.get("stop", ()))
        ignore_eos = check_flag("ignore_eos", options.get("ignore_eos", False))
        stop_ids = _stop_ids(bundle, options.get("stop_token_ids", ()), ignore_eos=ignore_eos)
        prompt_ids = encode_prompt(bundle, tokenizer, prompt)
        max_new_tokens = check_integer("max_new_tokens", options.get("max_new_tokens", 128), at_least=1)
        if stops and tokenizer is None:
            raise RequestError("Stop strings need a tokenizer, and this bundle has none: use stop_token_ids.")
        _check_length(bundle, len(prompt_ids), max_new_tokens)
        logprobs = check_flag("logprobs", options.get("logprobs", False))
        sampling = _check_sampling(bundle, options.get("sampling"), logprobs)
        shown_tokens = _token_ids(bundle, "shown_token_ids", options.get("shown_token_ids", ()))
        text = TextStream(tokenizer, stops, prompt_ids=prompt_ids, shown_ids=shown_tokens) if tokenizer else None
        constraints = _constraints(bundle, tokenizer, options.get("constraints"), prompt_ids, stop_ids)
        is_best = sampling.greedy and constraints is None
        top_logprobs = _check_top_logprobs(bundle, options.get("top_logprobs", 0), logprobs, is_best=is_best)
        drawn = not sampling.greedy or logprobs or constraints is not None
        draws = None
        if drawn:
            ranks = top_logprobs > 0 and bundle.top_logprobs
            draws = Draws(sampling, len(prompt_ids), bundle.model.vocab_size, constraints, ranks=ranks)
        lookup = check_flag("lookup", options.get("lookup", True))
        # Typical acceptance accepts tokens that are merely likely, so that lookup would make the text repeat itself.
        index = TokenLookup(prompt_ids) if lookup and not sampling.typical and bundle.tree.size > 1 else None
        is_long = bundle.model.is_long(len(prompt_ids))
        return cls(
            prompt_ids,
            max_new_tokens,
            stop_ids,
            text,
            draws,
            logprobs,
            index,
            top_logprobs=top_logprobs,
            is_long=is_long,
        )

    @property
    def is_constrained(self) -> bool:
        """True if the request demands something of its tokens, so that a step needs the text up to its root."""
        return self.draws is not None and self.draws.constraints is not None

    def limit_edits(self, most: int) -> None:
        """Sets the most tokens whose logits the request's constraints may change, as ``RowConstraints`` does."""
        if self.draws is not None and self.draws.constraints is not None:
            self.draws.constraints.limit_edits(most)

    @property
    def is_prefilling(self) -> bool:
        """True while some of the prompt is not in the cache yet."""
        return self.prefilled < len(self.prompt_ids)

    @property
    def is_typical(self) -> bool:
        """True if the acceptance rule is typical acceptance, so that the tree size may change the answer."""
        return self.draws is not None and self.draws.params.typical

    @property
    def most_tokens(self) -> int:
        """The most tokens of prompt and answer."""
        return len(self.prompt_ids) + self.max_new_tokens

    @property
    def tokens_left(self) -> int:
        """Tokens that may still be generated."""
        return self.max_new_tokens - len(self.token_ids)

    def next_chunk(self, limit: int) -> Sequence[int]:
        """The next tokens of the prompt, ``limit`` at most."""
        return self.prompt_ids[self.prefilled : self.prefilled + limit]

    @property
    def looks_up(self) -> bool:
        """True if the request uses lookup."""
        return self._lookup is not None

    def look_up(self, count: int) -> list[int]:
        """The next ``count`` tokens by lookup; an empty list if there is no hit."""
        return self._lookup.find(count) if self._lookup is not None and count > 0 else []

    def accept(
        self, emitted: Sequence[int], logprobs: Sequence[float] | None = None, ranked: Ranked | None = None
    ) -> Chunk:
        """Appends the tokens that a step emitted, up to the end of the completion.

        Args:
            emitted: The tokens.
            logprobs: Their log probabilities; None if there are none.
            ranked: The most likely tokens in their places; None if there are none.

        Returns:
            The part of them that belongs to the completion. ``finish_reason`` says whether that was the last part.
        """
        tokens, reason = self._until_stop(list(emitted))
        text = ""
        if self._text is not None:
            before = self._text.consumed
            text = self._text.push(tokens)
            if reason is not None and self._text.stopped_by is None:
                text += self._text.finish()  # which may complete a stop string, too
            if self._text.stopped_by is not None:
                tokens = tokens[: self._text.consumed - before]
                reason = "stop"
        self.finish_reason = reason
        self.token_ids += tokens
        if self.draws is not None and self.draws.constraints is not None:
            self.draws.constraints.extend(tokens)
        if self._lookup is not None:
            self._lookup.extend(tokens)
        self.stats.completion_tokens = len(self.token_ids)
        if self._logprobs is None or logprobs is None:
            return Chunk(text, tuple(tokens))
        self._logprobs += logprobs[: len(tokens)]
        logprobs = tuple(logprobs[: len(tokens)])
        if not self._top:
            return Chunk(text, tuple(tokens), logprobs)
        if ranked is None:  # an older graph, for tokens that are the most likely ones themselves
            ranked = Ranked(np.array([tokens]).T, np.array([logprobs]).T)
        top = _most_likely(ranked, len(tokens), self._top)
        self._top_logprobs += top
        return Chunk(text, tuple(tokens), logprobs, top)

    def _until_stop(self, tokens: list[int]) -> tuple[list[int], str | None]:
        """Cuts a step's tokens behind a stop token or at ``max_new_tokens``; also gives the finish reason, if any."""
        left = self.tokens_left
        for place, token in enumerate(tokens[:left]):
            if token in self._stop_token_ids:
                return tokens[: place + 1], "stop"
        return tokens[:left], "length" if len(tokens) >= left else None

    def result(self) -> GenerationResult:
        """The complete answer, once the completion has ended."""
        assert self.finish_reason is not None
        text = self._text.text if self._text is not None else ""
        logprobs = None if self._logprobs is None else tuple(self._logprobs)
        top = tuple(self._top_logprobs) if self._top else None
        return GenerationResult(text, tuple(self.token_ids), self.finish_reason, self.stats, logprobs, top)


def _most_likely(ranked: Ranked, places: int, count: int) -> tuple[tuple[RankedToken, ...], ...]:
    """The ``count`` most likely tokens at each of the first places."""
    both = zip(ranked.tokens[:places, :count].tolist(), ranked.logprobs[:places, :count].tolist(), strict=True)
    return tuple(tuple(map(RankedToken, tokens, logprobs)) for tokens, logprobs in both)


def _stop_ids(bundle: Bundle, asked_for: object, *, ignore_eos: bool) -> frozenset[int]:
    """The token ids that end a request: the model's own unless they are ignored, and those of the request."""
    own = () if ignore_eos else bundle.model.eos_token_ids
    return _token_ids(bundle, "stop_token_ids", asked_for).union(own)


def _token_ids(bundle: Bundle, name: str, asked_for: object) -> frozenset[int]:
    """The token ids of an option, which may be one id or several; raises ``RequestError`` if one is out of range."""
    vocab_size = bundle.model.vocab_size
    one = not isinstance(asked_for, Iterable) or isinstance(asked_for, str)
    given = cast("Iterable[object]", (asked_for,) if one else asked_for)
    tokens: list[Any] = bounded(name, given, vocab_size)
    for token in tokens:
        check_integer(f"One of {name}", token, at_least=0)
        if token >= vocab_size:
            raise RequestError(f"One of {name} is {shown(token)}: token ids go up to {vocab_size - 1}.")
    return frozenset(map(int, tokens))


def _check_length(bundle: Bundle, prompt_tokens: int, max_new_tokens: int) -> None:
    limit = bundle.model.most_tokens(prompt_tokens)
    if prompt_tokens + max_new_tokens <= limit:
        return
    if limit < bundle.model.max_positions:
        raise ContextLengthError(
            f"The prompt's {prompt_tokens} tokens and {shown(max_new_tokens)} new ones cross {limit} tokens, where "
            "this model changes its rotary frequencies. Lower max_new_tokens, shorten the prompt, or give one of more "
            f"than {limit} tokens."
        )
    raise ContextLengthError(
        f"The prompt's {prompt_tokens} tokens and {shown(max_new_tokens)} new ones exceed the {limit} tokens that "
        "this model holds. Shorten the prompt or lower max_new_tokens."
    )


def _check_sampling(bundle: Bundle, sampling: object, logprobs: bool) -> SamplingParams:
    if sampling is not None and not isinstance(sampling, SamplingParams):
        raise RequestError(f"sampling is {shown(sampling)}: give SamplingParams(temperature=…, seed=…), or None.")
    chosen = sampling or GREEDY
    if not bundle.sampling and (logprobs or not chosen.greedy):
        what = "give log probabilities" if chosen.greedy else "sample"
        raise RequestError(f"This bundle is greedy only and can't {what}: export it with sampling.")
    return chosen


def _check_top_logprobs(bundle: Bundle, number: object, logprobs: bool, *, is_best: bool) -> int:
    """The number of most likely tokens that a request asks for in each place.

    Args:
        bundle: The bundle.
        number: The value of the option.
        logprobs: True if the request asks for log probabilities.
        is_best: True if each token of the answer is the most likely one, which the graphs of older bundles give, too.

    Raises:
        RequestError: The value is out of range, or the bundle can't give them.
    """
    top = check_integer("top_logprobs", number, at_least=0)
    if top > MAX_TOP_LOGPROBS:
        raise RequestError(f"top_logprobs is {shown(top)}: expected an integer up to {MAX_TOP_LOGPROBS}.")
    if top and not logprobs:
        raise RequestError("top_logprobs needs log probabilities: set logprobs, too.")
    if top > is_best and not bundle.top_logprobs:
        raise RequestError(
            "The graph of this bundle gives no most likely tokens: export it again. Until then top_logprobs is 0, or 1 "
            "for greedy answers without constraints."
        )
    return top


def _constraints(
    bundle: Bundle,
    tokenizer: Tokenizer | None,
    given: object,
    prompt_ids: Sequence[int],
    stop_ids: frozenset[int],
) -> RowConstraints | None:
    """The constraints of a request; None if it demands nothing."""
    if given is not None and not isinstance(given, Constraints):
        raise RequestError(f"constraints is {shown(given)}: give Constraints(presence_penalty=…), or None.")
    if given is None or given.are_none:
        return None
    if not bundle.constraints:
        raise RequestError("This bundle knows no constraints: export it again, and not as greedy only.")
    vocab_size = bundle.model.vocab_size
    largest = max((*given.logit_bias, *given.banned_token_ids), default=0)
    if largest >= vocab_size:
        raise RequestError(f"The constraints name token {shown(largest)}: token ids go up to {vocab_size - 1}.")
    walk = None
    if given.grammar is not None:
        if tokenizer is None:
            raise RequestError("A grammar needs a tokenizer, and this bundle has none.")
        ends = bundle.model.eos_token_ids or sorted(stop_ids)
        if not ends:
            raise RequestError(
                "A grammar needs a token that ends the text, and the model has none: use stop_token_ids."
            )
        walk = GrammarWalk(given.grammar, tokenizer.description, vocab_size, ends)
    end_ids = stop_ids.union(bundle.model.eos_token_ids)
    return RowConstraints(given, prompt_ids, end_ids, vocab_size, bundle.tree, walk)


def check_tree_size(bundle: Bundle, tree_size: object) -> int:
    """A number of nodes as Python's integer; raises ``RequestError`` if the bundle's tree has fewer nodes."""
    largest = bundle.tree.size
    if not is_integer(tree_size) or not 1 <= tree_size <= largest:
        raise RequestError(f"tree_size is {shown(tree_size)}: this bundle's tree allows 1 to {largest}, or 'auto'.")
    return int(tree_size)


def check_integer(name: str, value: object, *, at_least: int | None = None) -> int:
    """A value as Python's integer, which never overflows; raises ``RequestError`` if it is none, or below a bound."""
    if not is_integer(value) or (at_least is not None and value < at_least):
        least = "" if at_least is None else f" of at least {at_least}"
        raise RequestError(f"{name} is {shown(value)}: expected an integer{least}.")
    return int(value)


def check_flag(name: str, value: object) -> bool:
    """A value as Python's bool; raises ``RequestError`` unless it is one, or NumPy's."""
    if not isinstance(value, bool | np.bool_):
        raise RequestError(f"{name} is {shown(value)}: expected True or False.")
    return bool(value)
