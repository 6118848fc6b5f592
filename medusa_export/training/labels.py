"""Turns conversations into tokens, and marks the tokens that the model wrote as labels.

A sample holds an answer in the context in which a model writes it. First comes the prompt that the chat template makes
of the messages before the answer, tokenized as a server does it. Then come the answer's own tokens, up to the one that
ends it. Templates often drop the thoughts of earlier turns. So each answer of a conversation gives a sample of its own,
with one exception: if the prompt of the next answer repeats it token by token, both answers form one sample.
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from medusa_export.common.errors import DatasetError
from medusa_export.training.conversations import Conversation, Message, Sample
from medusa_export.training.templates import ChatTemplate, Thought

# Some tokenizers put a space before a text. These texts are put before a part of a text, to avoid that space.
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
        """The samples of a conversation. Each sample has labels.

        Args:
            conversation: The conversation.
            max_length: The most tokens of a sample. Answers that begin after them are left out. None for no limit.

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
        """The tokens before an answer, and the recorded tokens that the model wrote; None if there is no record.

        A record counts only if this tokenizer decodes it to the answer's text.
        """
        size = len(self._tokenizer)
        if not written or not all(0 <= token < size for token in written):
            return None
        if decoded(self._tokenizer, written[:-1] if complete else written) != answer["content"]:
            return None
        return self._ids(self._template.render(before, answering=True)), list(written)

    def _as_rendered(self, before: Sequence[Message], answer: Message, complete: bool) -> tuple[list[int], list[int]]:
        """The tokens before an answer, and the answer's tokens, made from its text."""
        context, own = self._texts(before, answer, complete)
        return self._ids(context), self._behind(context, own)

    def _texts(self, before: Sequence[Message], answer: Message, complete: bool) -> tuple[str, str]:
        """The text that a model reads before an answer, and the text that the model writes.

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
        opened = header.rstrip(" ")  # without the space, which is part of the next word's token
        if not complete and shown.removeprefix(prompt).strip() != content:
            return prompt, raw  # the template treats an unfinished thought as an answer
        if kept == content and self._has_no_opening(before, prompt, header):
            return opened, shown[len(opened) :] + ending
        if whole.endswith(tail) and _shows(shown, prompt, content, kept, thought):
            return prompt, shown[len(prompt) :] + ending
        if not whole.endswith(tail) or kept is None or not content.endswith(kept):
            raise DatasetError(
                "The chat template hides or alters the assistant's messages: it doesn't show "
                f"{content[:60]!r} unchanged."
            )
        if thought.is_closed:  # the model writes no thought here, even if the data holds one
            return prompt, kept + ending
        # The prompt may open a thought. If the answer has none, it follows its header directly. If it has one, the
        # model wrote the thought, although the template drops it.
        has_thought = raw != answer["content"] or thought.closing in content if thought.opening else kept != content
        return (prompt, raw + ending) if has_thought else (opened, shown[len(opened) :] + ending)

    def _has_no_opening(self, before: Sequence[Message], prompt: str, header: str) -> bool:
        """True if the template ignores the request to open an answer, so that the prompt lacks the answer's header.

        The model does not write the header's words in this case either.
        """
        words = header.removeprefix(prompt)
        if words == header or prompt != self._template.render(before, answering=False):
            return False
        return bool(self._template.words(words).strip())

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _behind(self, context: str, own: str) -> list[int]:
        """The tokens of a text that follows another text."""
        text, border = context + own, len(context)
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        found: list[int] = []
        for token, (first, last) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
            if first >= border:
                found.append(token)
            elif last > border and not found:
                # A token that begins in the context: the model wrote only the part of its text behind the border.
                found += self._alone(text[border:last])
        return found

    def _alone(self, text: str) -> list[int]:
        """The tokens of a part of a text. Avoids the space that some tokenizers put before a text."""
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
    """The samples of a conversation. See ``Labeller.samples``."""
    return Labeller(tokenizer).samples(conversation)


def _add(samples: list[Sample], sample: Sample) -> None:
    """Adds a sample. If it begins with the last sample's tokens, it replaces that sample and keeps its labels."""
    if samples:
        known = samples[-1]
        length = len(known.input_ids)
        if sample.input_ids[:length] == known.input_ids:
            samples.pop()
            sample = Sample(sample.input_ids, [*known.is_label, *sample.is_label[length:]])
    samples.append(sample)


def _without(content: str, prompt: str, thought: Thought) -> str:
    """An answer's text. If it begins with the thought's opening tag, which the prompt has already, without that tag."""
    if not thought.opening or not content.lstrip().startswith(thought.opening):
        return content
    text = content.lstrip().removeprefix(thought.opening)
    return text.lstrip() if prompt[-1].isspace() else text


def _shows(shown: str, prompt: str, content: str, kept: str | None, thought: Thought) -> bool:
    """True if a rendered answer is what the model writes after its prompt.

    Args:
        shown: The rendered conversation up to the end of the answer.
        prompt: The rendered prompt.
        content: The answer's text.
        kept: The rendered text in the place of the answer's text. None if the text before it depends on the answer.
        thought: State of the model's thought at the end of the prompt.
    """
    if not shown.startswith(prompt):
        return False
    rest = shown[len(prompt) :]
    if thought.opening and rest.lstrip().startswith(thought.opening):  # the tag would occur twice
        return False
    is_whole = kept == content or _squeezed(_without(content, prompt, thought)) in _squeezed(rest)
    return is_whole or (thought.is_closed and kept is not None and content.endswith(kept))


def _squeezed(text: str) -> str:
    """A text without whitespace."""
    return "".join(text.split())
