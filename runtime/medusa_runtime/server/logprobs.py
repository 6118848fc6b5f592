"""Log probabilities of tokens in the forms of both kinds of completions.

The graph gives the log probability of each chosen token. In a greedy answer it is the most likely token.
"""

from __future__ import annotations

from collections.abc import Sequence

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


def chat_logprobs(tokenizer: Tokenizer | None, delta: Delta, top: int | None) -> ChatLogprobs | None:
    """The log probabilities of a chat's tokens; None if they were not asked for.

    Args:
        tokenizer: The model's tokenizer.
        delta: The tokens.
        top: Number of most likely tokens to give for each place: 0 or 1.
    """
    if delta.logprobs is None:
        return None
    content: list[TokenLogprob] = []
    for token_id, logprob in zip(delta.token_ids, delta.logprobs, strict=True):
        text, data = token_text(tokenizer, token_id)
        facts: TopLogprob = {"token": text, "logprob": logprob, "bytes": list(data)}
        content.append({**facts, "top_logprobs": [facts] if top else []})
    return {"content": content, "refusal": None}


def completion_logprobs(
    tokenizer: Tokenizer | None, token_ids: Sequence[int], logprobs: Sequence[float] | None, top: int, offset: int
) -> CompletionLogprobs | None:
    """The log probabilities of a completion's tokens; None if they were not asked for.

    Args:
        tokenizer: The model's tokenizer.
        token_ids: The tokens.
        logprobs: Their log probabilities.
        top: Number of most likely tokens to give for each place: 0 or 1.
        offset: Characters of the text before them.
    """
    if logprobs is None:
        return None
    texts = [token_text(tokenizer, token_id)[0] for token_id in token_ids]
    offsets = [offset]
    for text in texts:
        offsets.append(offsets[-1] + len(text))
    return {
        "tokens": texts,
        "token_logprobs": list(logprobs),
        "top_logprobs": [{text: value} for text, value in zip(texts, logprobs, strict=True)] if top else None,
        "text_offset": offsets[:-1],
    }
