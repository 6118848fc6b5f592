# ruff: noqa: RUF001
"""Parts of chat templates, and conversations to render with them."""

from __future__ import annotations

from dataclasses import dataclass

THINK = "<think>", "</think>"


def _talk(*answers: dict[str, str]) -> list[dict[str, str]]:
    questions = ({"role": "user", "content": "Hi"}, {"role": "user", "content": "And you?"})
    return [
        message
        for question, answer in zip(questions, answers, strict=True)
        for message in (question, {"role": "assistant", **answer})
    ]


def _keyed(thought: str, said: str) -> dict[str, str]:
    return {"content": said, "reasoning_content": thought, "reasoning": thought, "thinking": thought}


TALKS = {
    "plain": _talk({"content": "Hello."}, {"content": "Fine."}),
    # The text holds the whole thought.
    "tagged": _talk({"content": "<think>\nHm.\n</think>\n\nHello."}, {"content": "<think>\nOh.\n</think>\n\nFine."}),
    # The prompt opens the thought, and the text continues it.
    "opened": _talk({"content": "Hm.\n</think>\n\nHello."}, {"content": "Oh.\n</think>\n\nFine."}),
    # The thought has a key of its own.
    "keyed": _talk(_keyed("Hm.", "Hello."), _keyed("Oh.", "Fine.")),
}


@dataclass(frozen=True)
class Published:
    """A chat template and its tokenizer.

    Attributes:
        template: The chat template.
        special: Special tokens: first the one that ends a text, then the one that begins it, if there is one.
        kind: Kind of the tokenizer: ``bytes`` (byte-level BPE), ``pieces`` (words and texts begin with a space) or
            ``bare pieces`` (words begin with a space, texts don't).
        wrote: The texts that the samples of a conversation stand for, by name of the conversation. «…» marks what the
            model wrote.
        plain_tokens: Added tokens that are not special.
    """

    template: str
    special: tuple[str, ...]
    kind: str
    wrote: dict[str, tuple[str, ...]]
    plain_tokens: tuple[str, ...] = ()


def jinja(user: str, answer: str, opening: str, *, start: str = "''", end: str = "''") -> str:
    """Makes a template of five expressions: a user's turn, an answer, an answer's opening, the start and the end."""
    return (
        "{{ " + start + " }}{% for m in messages %}{% if m.role == 'user' %}{{ " + user + " }}"
        "{% else %}{{ " + answer + " }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ " + opening + " }}{% else %}{{ " + end + " }}{% endif %}"
    )


def chatml(*, start: str = "''", opening: str = "'<|im_start|>assistant\\n'", answer: str = "m.content") -> str:
    """ChatML: ``<|im_start|>`` and ``<|im_end|>`` around each turn."""
    return jinja(
        "'<|im_start|>user\\n' + m.content + '<|im_end|>\\n'",
        f"'<|im_start|>assistant\\n' + {answer} + '<|im_end|>\\n'",
        opening,
        start=start,
    )


def llama3(*, start: str = "'<|begin_of_text|>'", answer: str = "m.content", end: str = "''") -> str:
    """Llama 3: a header with the role before each turn."""
    header = "'<|start_header_id|>{}<|end_header_id|>\\n\\n'".format
    return jinja(
        f"{header('user')} + m.content + '<|eot_id|>'",
        f"{header('assistant')} + {answer} + '<|eot_id|>'",
        header("assistant"),
        start=start,
        end=end,
    )


def cohere(*, before: str = "", behind: str = "", end: str = "''") -> str:
    """Cohere: tokens for turns and roles, and optionally tokens around an answer."""
    return jinja(
        "'<|START_OF_TURN_TOKEN|><|USER_TOKEN|>' + m.content + '<|END_OF_TURN_TOKEN|>'",
        f"'<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>{before}' + m.content + '{behind}<|END_OF_TURN_TOKEN|>'",
        "'<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>'",
        start="bos_token",
        end=end,
    )


def deepseek(*, answer: str = "m.content", opening: str = "", before: str = "") -> str:
    """DeepSeek: a token for each role, and one behind an answer."""
    return jinja(
        "'<｜User｜>' + m.content",
        f"'<｜Assistant｜>{before}' + {answer} + eos_token",
        f"'<｜Assistant｜>{opening}'",
        start="bos_token",
    )
