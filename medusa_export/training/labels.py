"""Conversations as tokens, with the tokens that the model wrote marked as labels.

An answer is taken in the context in which a model writes it: the prompt that the chat template makes of the messages
before it, tokenized as a server does it, and then the answer's own tokens up to the one that ends it. Templates often
drop the thoughts of earlier turns. So each answer of a conversation gives a sample, except where the prompt of the next
answer repeats it token by token: these are one sample.
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from medusa_export.common.errors import DatasetError
from medusa_export.training.conversations import Conversation, Message, Sample
from medusa_export.training.templates import ChatTemplate, Thought

# Texts to put before a part of a text, so that no space is put there.
_ANCHORS = ("a", "\n", ".")


class Labeller:
    """Turns conversations into samples.

    Args:
        tokenizer: A fast tokenizer with a chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._template = ChatTemplate(tokenizer)

    def samples(self, conversation: Conversation, max_length: int | None = None) -> list[Sample]:
        """The samples of a conversation. Each has labels.

        Args:
            conversation: A conversation.
            max_length: Tokens of a sample at most. Answers that begin behind them are left out.

        Raises:
            DatasetError: The chat template refuses, hides or alters a message.
        """
        found: list[Sample] = []
        answers = [place for place, message in enumerate(conversation.messages) if message["role"] == "assistant"]
        for number, place in enumerate(answers):
            before, answer = conversation.messages[:place], conversation.messages[place]
            if not before or not (answer["content"].strip() or "reasoning_content" in answer):
                continue
            complete = conversation.complete or place + 1 < len(conversation.messages)
            written = conversation.written[number] if number < len(conversation.written) else ()
            prompt, own = self._as_written(before, answer, written, complete) or self._as_rendered(
                before, answer, complete
            )
            if max_length is not None and len(prompt) >= max_length:
                break
            sample = Sample([*prompt, *own], [False] * len(prompt) + [True] * len(own))
            _add(found, sample if max_length is None else sample.cut(max_length))
        return found

    def _as_written(
        self, before: Sequence[Message], answer: Message, written: Sequence[int], complete: bool
    ) -> tuple[list[int], list[int]] | None:
        """The tokens before an answer and its own, if those that the model wrote are known.

        They are known only if this tokenizer makes the answer's text of them.
        """
        size = len(self._tokenizer)
        if not written or not all(0 <= token < size for token in written):
            return None
        if decoded(self._tokenizer, written[:-1] if complete else written) != answer["content"]:
            return None
        return self._ids(self._template.render(before, answering=True)), list(written)

    def _as_rendered(self, before: Sequence[Message], answer: Message, complete: bool) -> tuple[list[int], list[int]]:
        """The tokens before an answer and its own, by its text."""
        context, own = self._texts(before, answer, complete)
        return self._ids(context), self._behind(context, own)

    def _texts(self, before: Sequence[Message], answer: Message, complete: bool) -> tuple[str, str]:
        """The text that a model reads before an answer, and the text that it writes.

        Raises:
            DatasetError: The chat template refuses, hides or alters the answer.
        """
        prompt = self._template.render(before, answering=True)
        whole = self._template.render([*before, answer], answering=False)
        header, tail = self._template.around(before, answer)
        content, thought = answer["content"].strip(), Thought.at_end_of(prompt)
        ending = self._template.ending(tail) if complete else ""
        shown = whole.removesuffix(tail)
        kept = shown[len(header) :].strip() if shown.startswith(header) else None
        raw = _without(answer["content"], prompt, thought)
        opened = header.rstrip(" ")  # a space is part of the word behind it
        if not complete and shown.removeprefix(prompt).strip() != content:
            return prompt, raw  # the template takes half a thought for an answer
        if kept == content and self._has_no_opening(before, prompt, header):
            return opened, shown[len(opened) :] + ending
        if whole.endswith(tail) and _shows(shown, prompt, content, kept, thought):
            return prompt, shown[len(prompt) :] + ending
        if not whole.endswith(tail) or kept is None or not content.endswith(kept):
            raise DatasetError(
                "The chat template hides or alters what the assistant says: it doesn't show "
                f"{content[:60]!r} as it stands."
            )
        if thought.is_closed:  # the model writes no thought here, whatever the data holds
            return prompt, kept + ending
        # Without a thought, where the prompt would open one, the answer stands behind its header alone. With one, the
        # template drops the thought, but the model wrote it.
        has_thought = raw != answer["content"] or thought.closing in content if thought.opening else kept != content
        return (prompt, raw + ending) if has_thought else (opened, shown[len(opened) :] + ending)

    def _has_no_opening(self, before: Sequence[Message], prompt: str, header: str) -> bool:
        """Whether the template opens no answer when asked to. The header's words aren't the model's even so."""
        words = header.removeprefix(prompt)
        if words == header or prompt != self._template.render(before, answering=False):
            return False
        return bool(self._template.words(words).strip())

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _behind(self, context: str, own: str) -> list[int]:
        """The tokens of a text that stands behind another one."""
        text, border = context + own, len(context)
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        found: list[int] = []
        for token, (first, last) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
            if first >= border:
                found.append(token)
            elif last > border and not found:
                # A token that begins in the context: only the part of its text behind the border is the model's.
                found += self._alone(text[border:last])
        return found

    def _alone(self, text: str) -> list[int]:
        """The tokens of a part of a text, without the space that some tokenizers put before a text."""
        for anchor in _ANCHORS:
            before, both = self._ids(anchor), self._ids(anchor + text)
            if both[: len(before)] == before:
                return both[len(before) :]
        return self._ids(text)


def decoded(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    """The text of tokens that a model wrote, special tokens included."""
    text: str = tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def tokenize(tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> list[Sample]:
    """The samples of a conversation; see ``Labeller.samples``."""
    return Labeller(tokenizer).samples(conversation)


def _add(samples: list[Sample], sample: Sample) -> None:
    """Adds a sample. It takes the place of the last one if it begins with the same tokens."""
    if samples:
        known = samples[-1]
        length = len(known.input_ids)
        if sample.input_ids[:length] == known.input_ids:
            samples.pop()
            sample = Sample(sample.input_ids, [*known.is_label, *sample.is_label[length:]])
    samples.append(sample)


def _without(content: str, prompt: str, thought: Thought) -> str:
    """An answer's text without the tag that the prompt ends with, if it repeats that."""
    if not thought.opening or not content.lstrip().startswith(thought.opening):
        return content
    text = content.lstrip().removeprefix(thought.opening)
    return text.lstrip() if prompt[-1].isspace() else text


def _shows(shown: str, prompt: str, content: str, kept: str | None, thought: Thought) -> bool:
    """Whether a rendered answer is what the model writes behind its prompt.

    Args:
        shown: The conversation up to the end of the answer.
        prompt: The prompt.
        content: The answer's text.
        kept: What the template shows where an answer's text stands. None if the text before it changes with the answer.
        thought: Where the prompt leaves the model's thought.
    """
    if not shown.startswith(prompt):
        return False
    rest = shown[len(prompt) :]
    if thought.opening and rest.lstrip().startswith(thought.opening):  # the tag would be there twice
        return False
    is_whole = kept == content or _squeezed(_without(content, prompt, thought)) in _squeezed(rest)
    return is_whole or (thought.is_closed and kept is not None and content.endswith(kept))


def _squeezed(text: str) -> str:
    return "".join(text.split())
