"""Chat templates: the text around an answer, and the tokens that open or end it."""

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

# A placeholder for a text in a chat template. No template alters it.
MARK = "medusa0export1text2mark"

# Tags at the end of a prompt that open or close a thought: <think>, <seed:think>, <|START_THINKING|>.
_THOUGHT = r"[\w:]*(?i:think|reason|thought)[\w:]*"
_OPENED = re.compile(rf"(?P<tag>(?P<left><\|?|\[)(?P<name>{_THOUGHT})(?P<right>\|?>|\]))\s*\Z")
_CLOSED = re.compile(rf"(</{_THOUGHT}>|\[/{_THOUGHT}\]|<\|END_{_THOUGHT}\|>)\s*\Z")


@dataclass(frozen=True)
class Thought:
    """The state of the model's thought at the end of a prompt.

    Attributes:
        opening: The tag at the end of the prompt that opens a thought; empty if there is none.
        closing: The tag that ends this thought.
        is_closed: True if the prompt itself ends a thought, so that an answer without a thought follows.
    """

    opening: str = ""
    closing: str = ""
    is_closed: bool = False

    @classmethod
    def at_end_of(cls, prompt: str) -> Thought:
        """Finds the tag at the end of a prompt."""
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
        """Renders a conversation. See the function ``render``."""
        return render(self.tokenizer, messages, answering=answering)

    @cached_property
    def special(self) -> dict[str, int]:
        """All special tokens and their ids."""
        return special_tokens(self.tokenizer)

    def around(self, before: Sequence[Message], answer: Message) -> tuple[str, str]:
        """The text before and behind the content of an answer that is the last message.

        Args:
            before: The messages before the answer.
            answer: The assistant's message. Its content has no effect.

        Raises:
            DatasetError: The template refuses these messages, or doesn't show the answer.
        """
        text = self.render([*before, {**answer, "content": MARK}], answering=False)
        header, found, tail = text.rpartition(MARK)
        if not found:
            raise DatasetError("The chat template hides or alters the assistant's messages.")
        return header, tail

    def words(self, text: str) -> str:
        """A text without its special tokens."""
        for token in sorted(filter(None, self.special), key=len, reverse=True):
            text = text.replace(token, "")
        return text

    def ending(self, tail: str) -> str:
        """The part of the text behind an answer that the model writes: special tokens, and spaces before them.

        Args:
            tail: The rendered text behind the answer.
        """
        found = self._special_start(tail)
        usual = self._usual_ending
        return usual if usual and found.startswith(usual) else found

    @cached_property
    def _usual_ending(self) -> str:
        """The special tokens that end both the last answer and earlier answers; empty if there are none.

        Some templates end a whole conversation with one more token. The model doesn't write that token.
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
        """The special tokens at the start of a text, up to the end-of-sequence token, with spaces before them."""
        place = start = len(text) - len(text.lstrip())
        while token := max((t for t in self.special if t and text.startswith(t, place)), key=len, default=""):
            place += len(token)
            if token == self.tokenizer.eos_token:
                break
        return text[:place] if place > start else ""


def load_chat_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a chat model.

    Raises:
        CheckpointError: The tokenizer can't be read.
        DatasetError: The model has no tokenizer or no chat template, or the tokenizer gives no offsets of its tokens.
    """
    tokenizer = load_tokenizer(model)
    if tokenizer is None or tokenizer.chat_template is None:
        raise DatasetError(
            f"{model} has no chat template, which is needed to render conversations: use an instruct model."
        )
    if not tokenizer.is_fast:
        raise DatasetError(
            f"The tokenizer {type(tokenizer).__name__} of {model} can't give the places of its tokens in a text: use "
            "a model whose tokenizer has a fast version (tokenizer.json)."
        )
    return tokenizer


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, answering: bool) -> str:
    """Renders a conversation as the text that the model reads.

    Args:
        tokenizer: A tokenizer with a chat template.
        messages: The messages.
        answering: True to open the assistant's turn (the generation prompt).

    Raises:
        DatasetError: The tokenizer has no chat template, or the template refuses these messages.
    """
    try:
        text: str = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=answering)
    except Exception as error:  # a template is a program and may raise any exception
        raise DatasetError(f"The chat template can't render these messages: {error}") from error
    return text


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Ids of all special tokens by their text. Includes tokens without a role, such as the end of a turn."""
    added = {token.content: index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)) | added
