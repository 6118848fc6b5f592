"""Grammars: which tokens an answer may go on with, along every path of a draft tree.

llguidance follows the grammar. It takes tokens back, so one matcher walks a whole tree.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from medusa_runtime.bundles.contract import mask_bytes
from medusa_runtime.errors import RequestError

MAX_GRAMMAR_BYTES = 2**20
NOTHING_LEFT = (
    "The constraints leave no token to go on with: banned_token_ids, min_new_tokens and the grammar together exclude "
    "all. Ban fewer tokens."
)
_ANY_OBJECT = {"type": "object"}
# A key of llguidance in a schema: white space as Python's ``json.dumps`` writes it. Where white space is free, a small
# model may add it without end.
ONE_LINE = {"x-guidance": {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}}
_VOCABULARIES, _GRAMMARS = 4, 64  # numbers that are kept for further requests


@dataclass(frozen=True)
class Grammar:
    """A grammar in llguidance's notation. The class methods make one from other notations.

    Attributes:
        source: The grammar: Lark as llguidance reads it, or its JSON.
    """

    source: str

    def __post_init__(self) -> None:
        if not isinstance(self.source, str) or len(self.source.encode(errors="replace")) > MAX_GRAMMAR_BYTES:
            raise RequestError(f"A grammar must be a text of at most {MAX_GRAMMAR_BYTES:,} bytes.")

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | str, *, one_line: bool = False) -> Self:
        """Any JSON that a schema allows.

        Args:
            schema: The JSON schema, as an object or as its text.
            one_line: If True, the only white space between values is one space behind each comma and colon.

        Raises:
            RequestError: The schema is no JSON object.
        """
        try:
            known = json.loads(schema) if isinstance(schema, str) else dict(schema)
            text = json.dumps(known)
        except (TypeError, ValueError, RecursionError) as error:
            raise RequestError(f"The JSON schema can't be read: {error}. Give an object, or its text.") from error
        if not isinstance(known, dict):
            raise RequestError(f"The JSON schema is a {type(known).__name__}: expected an object.")
        if one_line:
            text = json.dumps(ONE_LINE | known)
        return cls(_matcher_class().grammar_from_json_schema(text))

    @classmethod
    def json_object(cls, *, one_line: bool = False) -> Self:
        """Any JSON object. ``one_line`` is as in ``json_schema``."""
        return cls.json_schema(_ANY_OBJECT, one_line=one_line)

    @classmethod
    def regex(cls, pattern: str) -> Self:
        """Text that a regular expression matches as a whole, in the syntax of Rust's ``regex``."""
        return cls(_matcher_class().grammar_from_regex(pattern))

    @classmethod
    def lark(cls, text: str) -> Self:
        """Text of a grammar in Lark's notation, whose first rule is ``start``."""
        return cls(_matcher_class().grammar_from_lark(text))

    @classmethod
    def gbnf(cls, text: str) -> Self:
        """Text of a grammar in llama.cpp's notation, whose first rule is ``root``.

        Raises:
            RequestError: The text can't be read.
        """
        from llguidance import gbnf_to_lark

        try:
            return cls.lark(gbnf_to_lark.any_to_lark(text))
        except Exception as error:
            raise RequestError(f"The GBNF grammar can't be read: {error}") from error

    @property
    def expression(self) -> str:
        """The grammar as a part of a rule of another grammar, in Lark's notation.

        Raises:
            RequestError: The grammar consists of several grammars.
        """
        if not self.source.lstrip().startswith("{"):
            return f"%lark {{\n{self.source}\n}}"
        parts = json.loads(self.source)["grammars"]
        if len(parts) > 1:
            raise RequestError("A grammar of several parts can't be combined with tools: give one in Lark's notation.")
        schema = parts[0].get("json_schema")
        return f"%json {json.dumps(schema)}" if schema is not None else Grammar(parts[0]["lark_grammar"]).expression


class GrammarWalk:
    """Follows a grammar along the text of one request.

    Args:
        grammar: The grammar.
        tokenizer: The tokenizer, as the text of ``tokenizer.json``.
        vocab_size: The number of logits per token.
        end_token_ids: The tokens that end a text.

    Raises:
        RequestError: The grammar can't be used; the message says why.
    """

    def __init__(self, grammar: Grammar, tokenizer: str, vocab_size: int, end_token_ids: Sequence[int]) -> None:
        self._matcher = _matcher(grammar.source, tokenizer, vocab_size, tuple(end_token_ids)).deep_copy()
        self._bytes = mask_bytes(vocab_size)
        self._end_tokens = frozenset(end_token_ids)
        self._check()

    def extend(self, tokens: Sequence[int]) -> None:
        """Takes in tokens of the text.

        Raises:
            RequestError: The grammar does not allow the tokens, because other constraints exclude all that it allows.
                Or the grammar became too complex, perhaps in ``masks``.
        """
        taken = 0 if self._matcher.is_stopped() else self._matcher.try_consume_tokens(list(map(int, tokens)))
        self._check()
        # Behind the grammar's end come end tokens alone, which a request may ask to ignore.
        left = tokens[taken:]
        if left and not (self._matcher.is_stopped() and self._end_tokens.issuperset(left)):
            raise RequestError(NOTHING_LEFT)

    def masks(self, drafted: NDArray[np.int64], parents: Sequence[int]) -> NDArray[np.uint8]:
        """The tokens that the grammar allows after each node, as ``RowConstraints.masks`` gives them.

        This method raises nothing, since a step may have other rows. After a failure ``extend`` raises the error.

        Args:
            drafted: [S], the token of each node, the root's first. A draft may be replaced.
            parents: The parent of each node.
        """
        size = len(drafted)
        # llguidance writes integers of 32 bits.
        masks = np.full((size, -(-self._bytes // 4) * 4), 255, np.uint8)
        children: list[list[int]] = [[] for _ in range(size)]
        for node in range(1, size):
            children[parents[node]].append(node)
        self._visit(0, children, drafted, masks)
        return masks[:, : self._bytes]

    def _visit(
        self, node: int, children: Sequence[Sequence[int]], drafted: NDArray[np.int64], masks: NDArray[np.uint8]
    ) -> None:
        """Writes the masks of a node and of all below it. The matcher is behind the node before and afterwards."""
        matcher = self._matcher
        matcher.unsafe_compute_mask_ptr(masks[node].ctypes.data, masks[node].nbytes)
        if matcher.is_stopped():  # end tokens alone may follow, which a request may ask to ignore
            below = list(children[node])
            while below:
                last = below.pop()
                masks[last] = masks[node]
                below += children[last]
            return
        if not children[node]:
            return
        forced = matcher.compute_ff_tokens()
        if forced:
            drafted[children[node][0]] = forced[0]
        for child in children[node]:  # two of them may have the same token, and either may be accepted then
            token = int(drafted[child])
            if _is_allowed(masks[node], token) and matcher.try_consume_tokens([token]) == 1:
                self._visit(child, children, drafted, masks)
                matcher.rollback(1)

    def _check(self) -> None:
        if self._matcher.is_error():
            raise RequestError(f"The grammar can't be followed: {self._matcher.get_error()}")


def _is_allowed(mask: NDArray[np.uint8], token: int) -> bool:
    return bool(mask[token // 8] >> token % 8 & 1)


@lru_cache(_VOCABULARIES)
def _vocabulary(tokenizer: str, vocab_size: int, end_token_ids: tuple[int, ...]) -> Any:
    """A tokenizer for llguidance, with the tokens that end a text."""
    from llguidance import LLTokenizer

    return LLTokenizer(tokenizer, n_vocab=vocab_size, eos_token=list(end_token_ids))


@lru_cache(_GRAMMARS)
def _matcher(grammar: str, tokenizer: str, vocab_size: int, end_token_ids: tuple[int, ...]) -> Any:
    """A matcher at the start of a text."""
    from llguidance import LLParserLimits

    limits = LLParserLimits(verbose_errors=False)  # else messages hold the whole grammar and the parser's state
    return _matcher_class()(_vocabulary(tokenizer, vocab_size, end_token_ids), grammar, log_level=0, limits=limits)


def _matcher_class() -> Any:
    """llguidance's ``LLMatcher``."""
    try:
        from llguidance import LLMatcher
    except ImportError as error:
        raise RequestError("Grammars need llguidance: install it with pip install 'medusa-export[grammar]'.") from error
    return LLMatcher
