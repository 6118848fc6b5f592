"""Chat templates: the text around an answer, and what ends or opens one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile

from transformers import PreTrainedTokenizerBase

from medusa_export.common.errors import DatasetError
from medusa_export.models.checkpoints import load_tokenizer
from medusa_export.training.conversations import Message

# Stands for a text in a chat template. No template alters it.
MARK = "medusa0export1text2mark"

# A tag at the end of a prompt that opens a thought, and one that closes it: <think>, <seed:think>, <|START_THINKING|>.
_THOUGHT = r"[\w:]*(?i:think|reason|thought)[\w:]*"
_OPENED = re.compile(rf"(?P<tag>(?P<left><\|?|\[)(?P<name>{_THOUGHT})(?P<right>\|?>|\]))\s*\Z")
_CLOSED = re.compile(rf"(</{_THOUGHT}>|\[/{_THOUGHT}\]|<\|END_{_THOUGHT}\|>)\s*\Z")


@dataclass(frozen=True)
class Thought:
    """Where a prompt leaves the model's thought.

    Attributes:
        opening: The tag that the prompt ends with and opens a thought with; empty if there is none.
        closing: The tag that ends this thought.
        is_closed: The prompt ends a thought itself, so that an answer without one follows.
    """

    opening: str = ""
    closing: str = ""
    is_closed: bool = False

    @classmethod
    def at_end_of(cls, prompt: str) -> Thought:
        """Finds the tag that a prompt ends with."""
        if _CLOSED.search(prompt):
            return cls(is_closed=True)
        if (found := _OPENED.search(prompt)) is None:
            return cls()
        name = found["name"]
        closed = f"END_{name[6:]}" if name.startswith("START_") else f"/{name}"
        return cls(found["tag"], f"{found['left']}{closed}{found['right']}")


class ChatTemplate:
    """A tokenizer's chat template.

    Args:
        tokenizer: A tokenizer with a chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    def render(self, messages: Sequence[Message], *, answering: bool) -> str:
        """Renders a conversation as ``render`` does."""
        return render(self.tokenizer, messages, answering=answering)

    @cached_property
    def special(self) -> dict[str, int]:
        """All special tokens and their ids."""
        return special_tokens(self.tokenizer)

    def around(self, before: Sequence[Message], answer: Message) -> tuple[str, str]:
        """The text before and behind the content of an answer that is the last message.

        Args:
            before: The messages before it.
            answer: The assistant's message. Its content doesn't matter.

        Raises:
            DatasetError: The template refuses these messages, or doesn't show the answer.
        """
        text = self.render([*before, {**answer, "content": MARK}], answering=False)
        header, found, tail = text.rpartition(MARK)
        if not found:
            raise DatasetError("The chat template hides or alters what the assistant says.")
        return header, tail

    def words(self, text: str) -> str:
        """A text without its special tokens."""
        for token in sorted(filter(None, self.special), key=len, reverse=True):
            text = text.replace(token, "")
        return text

    def ending(self, tail: str) -> str:
        """The part of the text behind an answer that the model wrote: special tokens, and spaces before them.

        Args:
            tail: The text behind the answer.
        """
        found = self._special_start(tail)
        usual = self._usual_ending
        return usual if usual and found.startswith(usual) else found

    @cached_property
    def _usual_ending(self) -> str:
        """What ends an answer, whether it is the last message or not; empty if that differs or is not special.

        Some templates end a whole conversation with one more token. The model doesn't write that.
        """
        question: Message = {"role": "user", "content": "a"}
        answer: Message = {"role": "assistant", "content": MARK}
        try:
            last = self.around([question], answer)[1]
            inner = self.render([question, answer, question], answering=True).rpartition(MARK)[2]
        except DatasetError:
            return ""
        shared = "".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(last, inner, strict=False)))
        return self._special_start(shared)

    def _special_start(self, text: str) -> str:
        """The special tokens that a text begins with, up to the end-of-sequence token. Spaces may stand before them."""
        place = start = len(text) - len(text.lstrip())
        while token := max((t for t in self.special if t and text.startswith(t, place)), key=len, default=""):
            place += len(token)
            if token == self.tokenizer.eos_token:
                break
        return text[:place] if place > start else ""


def load_chat_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a model that holds conversations.

    Raises:
        CheckpointError: It can't be read.
        DatasetError: There is none, it has no chat template, or it can't tell where its tokens lie in a text.
    """
    tokenizer = load_tokenizer(model)
    if tokenizer is None or tokenizer.chat_template is None:
        raise DatasetError(
            f"{model} has no chat template, so it is not known how it reads conversations: give an instruct model."
        )
    if not tokenizer.is_fast:
        raise DatasetError(
            f"The tokenizer {type(tokenizer).__name__} of {model} can't tell where its tokens lie in a text: use a "
            "model whose tokenizer has a fast version (tokenizer.json)."
        )
    return tokenizer


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, answering: bool) -> str:
    """Renders a conversation as the model sees it.

    Args:
        tokenizer: A tokenizer with a chat template.
        messages: The messages.
        answering: Whether to open the assistant's turn (the generation prompt).

    Raises:
        DatasetError: The tokenizer has no chat template, or it refuses these messages.
    """
    try:
        text: str = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=answering)
    except Exception as error:  # a template raises what it likes
        raise DatasetError(f"The chat template can't render these messages: {error}") from error
    return text


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """All special tokens and their ids, with those that have no role, such as the end of a turn often."""
    added = {token.content: index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)) | added
