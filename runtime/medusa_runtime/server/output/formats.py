"""The formats of tool calls and reasoning that the server reads, by name, and the format of a model.

A tool format is added by a module with ``MARKS`` and a parser, and a line in ``TOOL_FORMATS``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from medusa_runtime.constraints.grammar import Grammar
from medusa_runtime.errors import MedusaError
from medusa_runtime.server.output import harmony, hermes, llama3, mistral, reasoning
from medusa_runtime.server.output.call_form import (
    CallableTool,
    CallForm,
    ForcedCallParser,
    ReasoningForm,
    calls_grammar,
)
from medusa_runtime.server.output.parts import OutputParser, PlainParser
from medusa_runtime.server.output.reasoning import Trimmer
from medusa_runtime.text.tokenizer import Tokenizer

ReasoningFormat = Literal["auto", "think", "none"]


@dataclass(frozen=True)
class ToolFormat:
    """A format of tool calls.

    Attributes:
        marks: The marks in the text. Those that are special tokens are shown in it.
        parser: Makes the parser of an answer, given the names of the functions.
        calls: How forced calls are written.
        sign: A part of the chat templates that use the format.
        id_length: Characters of the ids of calls, where a template checks them; 0 for OpenAI's form.
        always: True if answers without tools have the format, too.
    """

    marks: Sequence[str]
    parser: Callable[[Collection[str]], OutputParser]
    calls: CallForm
    sign: str
    id_length: int = 0
    always: bool = False


# The first format whose sign is in the template is the model's.
TOOL_FORMATS = {
    "harmony": ToolFormat(
        harmony.MARKS, lambda _: harmony.HarmonyParser(), harmony.CALLS, harmony.CHANNEL, always=True
    ),
    "hermes": ToolFormat(hermes.MARKS, lambda _: hermes.HermesParser(), hermes.CALLS, hermes.OPEN),
    "mistral": ToolFormat(
        mistral.MARKS, lambda _: mistral.MistralParser(), mistral.CALLS, mistral.ARGUMENTS, id_length=9
    ),
    "mistral-list": ToolFormat(
        mistral.MARKS, lambda _: mistral.MistralParser(), mistral.LIST_CALLS, mistral.OPEN, id_length=9
    ),
    "llama3": ToolFormat(llama3.MARKS, llama3.Llama3Parser, llama3.CALLS, '"parameters":'),
}
# A part of templates whose calls have the marks of hermes, but XML between them.
_XML_CALLS = "<function="
_PROBE = "probefunction"


@dataclass(frozen=True)
class ChatFormat:
    """The syntax of a model's answers, for their parser.

    Attributes:
        tools: The format of its tool calls; None if it has none that is known.
        thinks: True if its answers may begin with reasoning between ``<think>`` and ``</think>``.
        marks: Ids of the marks that are special tokens, by their text. They are shown in the answer's text.
    """

    tools: ToolFormat | None
    thinks: bool
    marks: Mapping[str, int]

    @classmethod
    def of(
        cls, tokenizer: Tokenizer | None, *, tools: str = "auto", reasoning_format: ReasoningFormat = "auto"
    ) -> ChatFormat:
        """The format of a model.

        Args:
            tokenizer: Its tokenizer, whose chat templates show the formats; None if it has none.
            tools: Name of the format of tool calls, ``none``, or ``auto`` for what the template shows.
            reasoning_format: ``think``, ``none``, or ``auto`` for what the template shows.

        Raises:
            MedusaError: There is no format of that name.
        """
        if tools not in ("auto", "none", *TOOL_FORMATS):
            raise MedusaError(
                f"There is no tool format {tools!r}: choose one of auto, none, {', '.join(TOOL_FORMATS)}."
            )
        templates = "".join(tokenizer.chat_templates.values()) if tokenizer else ""
        found = TOOL_FORMATS.get(tools)
        if tools == "auto" and _XML_CALLS not in templates:
            plain = templates.replace('\\"', '"')
            found = next((known for known in TOOL_FORMATS.values() if known.sign in plain), None)
            if found is not None and not found.always and not (tokenizer and _renders_tools(tokenizer)):
                found = None
        thinks = reasoning_format == "think" or (reasoning_format == "auto" and reasoning.CLOSE in templates)
        marks = [*(found.marks if found else ()), *(reasoning.MARKS if thinks else ())]
        special = tokenizer.special_tokens if tokenizer else {}
        return cls(found, thinks, {mark: special[mark] for mark in marks if mark in special})

    @property
    def shown_token_ids(self) -> tuple[int, ...]:
        """The marks that are special tokens."""
        return tuple(self.marks.values())

    def parser(
        self, prompt: str, names: Collection[str] | None, *, one_call: bool = False, forced: bool = False
    ) -> OutputParser:
        """The parser of an answer to a chat.

        Args:
            prompt: The rendered chat.
            names: Names of the functions that the model may call; None if it may call none.
            one_call: If True, all calls behind the first are left out.
            forced: If True, the answer follows the grammar of ``calls``, without other text.
        """
        inner: OutputParser = PlainParser()
        if forced and self.tools is not None and not self.tools.always:
            inner = ForcedCallParser(self.tools.calls, names or ())
        elif self.tools is not None and (names is not None or self.tools.always):
            inner = Trimmer(self.tools.parser(names or ()), one_call=one_call)
        if not self.thinks:
            return inner
        return reasoning.ReasoningParser(inner, is_open=reasoning.is_open(prompt))

    def calls(
        self,
        prompt: str,
        tools: Sequence[CallableTool],
        *,
        one_call: bool = False,
        may_answer: bool = False,
        answer_format: Grammar | None = None,
    ) -> Grammar:
        """The grammar of an answer that calls functions. Reasoning may come before the calls.

        Args:
            prompt: The rendered chat.
            tools: The functions that may be called.
            one_call: If True, there is one call at most.
            may_answer: If True, the answer may be text without calls, or have text before the calls.
            answer_format: The format of an answer without calls; None if its text is free.

        Raises:
            RequestError: A schema is no JSON object.
        """
        assert self.tools is not None, "the chat was rendered with tools"
        thought: ReasoningForm | None = None
        if self.tools.always:
            thought = harmony.REASONING
        elif self.thinks:
            begin = "" if reasoning.is_open(prompt) else reasoning.OPEN
            thought = ReasoningForm(begin, reasoning.CLOSE, gap="\n\n")
        return calls_grammar(
            self.tools.calls,
            tools,
            self.marks,
            reasoning=thought,
            one_call=one_call,
            may_answer=may_answer,
            answer_format=answer_format,
        )


def _renders_tools(tokenizer: Tokenizer) -> bool:
    """True if a chat template shows the model the tools of a request."""
    tool = {"type": "function", "function": {"name": _PROBE, "description": "", "parameters": {"type": "object"}}}
    try:
        shown = tokenizer.render_chat([{"role": "user", "content": "question"}], tools=[tool])
    except MedusaError:
        return False
    return _PROBE in shown
