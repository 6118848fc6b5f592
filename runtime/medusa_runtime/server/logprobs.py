"""Log probabilities of tokens in the forms of both kinds of completions.

The chosen token of a place need not be among its most likely ones: sampling and constraints choose others.
"""

from __future__ import annotations

from medusa_runtime.server.generation import Delta
from medusa_runtime.server.schema.answers import ChatLogprobs, CompletionLogprobs, TokenLogprob, TopLogprob
from medusa_runtime.text.tokenizer import Tokenizer


def token_text(tokenizer: Tokenizer | None, token_id: int) -> tuple[str, bytes]:
    """The text and the bytes of a token. An unfinished character is U+FFFD in the text.

    Args:
        tokenizer: The model's tokenizer; None if it has none, whose tokens have their ids as text.
        token_id: The token.
    """
    if tokenizer is None:
        return f"token_id:{token_id}", b""
    if tokenizer.decoder_steps == ("ByteLevel",):
        data = tokenizer.token_bytes(token_id)
        return data.decode(errors="replace"), data
    text = tokenizer.decode([token_id], skip_special_tokens=False, clean_up=False)
    return text, text.encode()


def token_logprobs(tokenizer: Tokenizer | None, delta: Delta) -> list[TokenLogprob]:
    """The log probabilities of tokens, with the most likely tokens in their places; empty if they were not asked for.

    Args:
        tokenizer: The model's tokenizer.
        delta: The tokens.
    """
    found: list[TokenLogprob] = []
    for place, (token_id, logprob) in enumerate(zip(delta.token_ids, delta.logprobs or (), strict=False)):
        top = delta.top_logprobs[place] if delta.top_logprobs is not None else ()
        found.append(
            {**_facts(tokenizer, token_id, logprob), "top_logprobs": [_facts(tokenizer, *ranked) for ranked in top]}
        )
    return found


def _facts(tokenizer: Tokenizer | None, token_id: int, logprob: float) -> TopLogprob:
    text, data = token_text(tokenizer, token_id)
    return {"token": text, "logprob": logprob, "bytes": list(data)}


def chat_logprobs(tokenizer: Tokenizer | None, delta: Delta) -> ChatLogprobs | None:
    """The log probabilities of a chat's tokens; None if they were not asked for."""
    return None if delta.logprobs is None else {"content": token_logprobs(tokenizer, delta), "refusal": None}


def completion_logprobs(tokenizer: Tokenizer | None, delta: Delta, offset: int) -> CompletionLogprobs | None:
    """The log probabilities of a completion's tokens; None if they were not asked for.

    As in OpenAI's API, a place has the chosen token besides its most likely ones. Of tokens with the same text, such as
    unfinished characters, the most likely one counts.

    Args:
        tokenizer: The model's tokenizer.
        delta: The tokens.
        offset: Characters of the text before them.
    """
    if delta.logprobs is None:
        return None
    texts = [token_text(tokenizer, token_id)[0] for token_id in delta.token_ids]
    offsets = [offset]
    for text in texts:
        offsets.append(offsets[-1] + len(text))
    return {
        "tokens": texts,
        "token_logprobs": list(delta.logprobs),
        "top_logprobs": None if delta.top_logprobs is None else _by_text(tokenizer, delta),
        "text_offset": offsets[:-1],
    }


def _by_text(tokenizer: Tokenizer | None, delta: Delta) -> list[dict[str, float]]:
    """For each place, the log probabilities of its most likely tokens and of the chosen one, by their texts."""
    places = []
    chosen_ones = zip(delta.token_ids, delta.logprobs or (), strict=True)
    for chosen, ranked in zip(chosen_ones, delta.top_logprobs or (), strict=True):
        values: dict[str, float] = {}
        for token_id, logprob in (*ranked, chosen):
            values.setdefault(token_text(tokenizer, token_id)[0], logprob)
        places.append(values)
    return places
