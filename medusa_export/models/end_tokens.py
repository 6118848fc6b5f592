"""Find the tokens that end a model's answer, from all files that name them.

A chat model answers in the format of its chat template, so the token that the template puts behind an answer ends it,
whatever the configuration says. Sources often disagree: a fine-tuned model keeps the configuration of its base.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from medusa_export.common.errors import ExportError
from medusa_runtime.bundles.facts import EndToken

GENERATION_CONFIG, CONFIG, TOKENIZER, TEMPLATE = "generation config", "config", "tokenizer", "chat template"
# Words of a trial conversation. They have no special characters, so that no template changes them.
_SYSTEM, _USER, _ANSWER, _NEXT = "trialsystem", "trialquestion", "trialanswer", "trialfollowup"

Render = Callable[[Sequence[Mapping[str, str]], bool], str]


class EndTokens:
    """The tokens that end a model's answer.

    Args:
        model: The model, with its configurations.
        tokenizer: Its tokenizer; None without one.

    Attributes:
        found: The tokens, each with its sources.
        warnings: Sentences about sources that disagree, and about entries that are left out.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self.warnings: list[str] = []
        config = model.config.get_text_config()
        self._vocab_size = model.get_output_embeddings().weight.shape[0]
        generation = model.generation_config
        named: dict[str, list[int]] = {
            GENERATION_CONFIG: self._checked(GENERATION_CONFIG, getattr(generation, "eos_token_id", None)),
            CONFIG: self._checked(CONFIG, getattr(config, "eos_token_id", None)),
            TOKENIZER: self._checked(TOKENIZER, None if tokenizer is None else tokenizer.eos_token_id),
        }
        if tokenizer is not None and tokenizer.chat_template:
            known = {token for ids in named.values() for token in ids}
            token = template_end(_renderer(tokenizer), _added_tokens(tokenizer), known)
            named[TEMPLATE] = self._checked(TEMPLATE, token)
        sources: dict[int, list[str]] = {}
        for source, ids in named.items():
            for token in ids:
                sources.setdefault(token, []).append(source)
        names = (
            {} if tokenizer is None else dict(zip(sources, tokenizer.convert_ids_to_tokens(list(sources)), strict=True))
        )
        self.found = tuple(EndToken(token, names.get(token), tuple(of)) for token, of in sources.items())
        self._compare({source: set(ids) for source, ids in named.items() if ids})

    @property
    def ids(self) -> tuple[int, ...]:
        """The tokens' ids."""
        return tuple(token.id for token in self.found)

    def _checked(self, source: str, value: object) -> list[int]:
        """The token ids that a source names.

        Raises:
            ExportError: An entry is no token id.
        """
        entries: Sequence[Any] = value if isinstance(value, (list, tuple)) else [value]
        ids = []
        for entry in entries:
            if entry is None:
                continue
            whole = isinstance(entry, int) or (isinstance(entry, float) and entry.is_integer())
            if isinstance(entry, bool) or not whole:
                raise ExportError(
                    f"The {source}'s eos_token_id holds {entry!r:.80}, which is no token id: correct it in the model's "
                    "files."
                )
            token = int(entry)
            if 0 <= token < self._vocab_size:
                ids.append(token)
            else:
                self.warnings.append(
                    f"The {source} names the end token {token}, which the model can't emit: it has "
                    f"{self._vocab_size:,} tokens. It is left out."
                )
        return list(dict.fromkeys(ids))

    def _compare(self, named: Mapping[str, set[int]]) -> None:
        """Warns of end tokens that the model's configuration lacks. Other software generates on after them."""
        own = named.get(GENERATION_CONFIG) or named.get(CONFIG)
        for token in self.found:
            if own is not None and token.id not in own:
                self.warnings.append(
                    f"{token} ends an answer by the {' and the '.join(token.sources)}, but not by the model's "
                    f"{GENERATION_CONFIG if GENERATION_CONFIG in named else CONFIG}. The bundle ends there, too; "
                    "transformers' generate goes on."
                )


def template_end(render: Render, tokens: Mapping[str, int], known: set[int]) -> int | None:
    """The special token that a chat template puts behind an answer; None if it puts none.

    The answer is rendered twice: at the end of a conversation, and with a question behind it. At the end it is followed
    by the token that ends a turn, and sometimes by one that ends the text. In the middle it is followed by the token
    that ends a turn, and the header of the next one. So the token is one that follows in both places. A template that
    ends the last turn differently, such as that of gpt-oss, has it at the end only.

    Args:
        render: Renders a conversation, with or without the opening of an answer. It may raise any error.
        tokens: The ids of special and added tokens, by their text.
        known: Ids of tokens that other sources name. If one of them follows the answer, it is taken.
    """
    user, answer = {"role": "user", "content": _USER}, {"role": "assistant", "content": _ANSWER}
    whole = _attempt(render, [user, answer])
    last = _behind(whole, None)
    middle = _behind(_attempt(render, [user, answer, {"role": "user", "content": _NEXT}]), _NEXT)
    at_end, between = list(_special(last, tokens)), list(_special(middle, tokens))
    candidates = [token for token in at_end if token in between] or at_end
    if not candidates:
        candidates = [token for token in between[:1] if not _is_header(render, middle)]
    openings = _openings(render, tokens) | _right_before(whole, tokens)
    candidates = [token for token in candidates if token in known or token not in openings]
    return next((token for token in candidates if token in known), next(iter(candidates), None))


def _openings(render: Render, tokens: Mapping[str, int]) -> set[int]:
    """The special tokens that open an answer, or the first turn of a conversation."""
    question = [{"role": "user", "content": _USER}]
    asked, unasked = _attempt(render, question, opened=True), _attempt(render, question)
    opening = asked[len(unasked) :] if asked.startswith(unasked) else ""
    first = _attempt(render, [{"role": "system", "content": _SYSTEM}, *question])
    header = first.partition(_SYSTEM)[0] if _SYSTEM in first else unasked.partition(_USER)[0]
    return {*_special(opening, tokens), *_special(header, tokens)}


def _right_before(text: str, tokens: Mapping[str, int]) -> set[int]:
    """The special token directly before the answer, whitespace aside. It opens the answer."""
    before = text.rpartition(_ANSWER)[0].rstrip()
    name = max((name for name in tokens if name and before.endswith(name)), key=len, default=None)
    return set() if name is None else {tokens[name]}


def _is_header(render: Render, text: str) -> bool:
    """True if a text between an answer and a question is only the header of the question."""
    header = _attempt(render, [{"role": "user", "content": _USER}]).partition(_USER)[0]
    return header.strip().endswith(text.strip())


def _behind(text: str, until: str | None) -> str:
    """The text behind the answer, up to the word ``until``."""
    behind = text.rpartition(_ANSWER)[2] if _ANSWER in text else ""
    return behind if until is None else behind.partition(until)[0] if until in behind else ""


def _special(text: str, tokens: Mapping[str, int]) -> Iterator[int]:
    """The special tokens in a text, in order. Of several that match in one place, the longest."""
    names = sorted(filter(None, tokens), key=len, reverse=True)
    for found in re.finditer("|".join(map(re.escape, names)), text) if names else ():
        yield tokens[found.group()]


def _attempt(render: Render, messages: Sequence[Mapping[str, str]], *, opened: bool = False) -> str:
    """A conversation as text; empty if the template refuses it."""
    try:
        return render(messages, opened)
    except Exception:  # noqa: BLE001  # a template is a program, and may refuse with any error
        return ""


def _renderer(tokenizer: PreTrainedTokenizerBase) -> Render:
    def render(messages: Sequence[Mapping[str, str]], opened: bool) -> str:
        return str(
            tokenizer.apply_chat_template([dict(message) for message in messages], tokenize=False,
                                          add_generation_prompt=opened)
        )  # fmt: skip

    return render


def _added_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The ids of special and added tokens, by their text."""
    added: Mapping[int, Any] = getattr(tokenizer, "added_tokens_decoder", {})
    found = {str(token): index for index, token in added.items()}
    return found | dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
