"""The field ``tool_choice``: which functions an answer may or must call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

from medusa_runtime.constraints.options import Constraints
from medusa_runtime.server.chat_prompt import ChatPrompt
from medusa_runtime.server.errors import ApiError
from medusa_runtime.server.output.call_form import CallableTool
from medusa_runtime.server.output.formats import ChatFormat
from medusa_runtime.server.output.parts import OutputParser
from medusa_runtime.server.schema.base import JsonObject
from medusa_runtime.server.schema.chat import Tool

_EXPECTED = "expected 'none', 'auto', 'required', a function, or allowed tools"


@dataclass(frozen=True)
class ToolChoice:
    """The calls that a request allows or demands.

    Attributes:
        mode: ``none`` (no call), ``auto`` (calls or text), or ``required`` (a call at least).
        tools: The functions that the model is shown.
        name: The function that must be called; None if any may be.
        one_call: If True, the answer has one call at most.
    """

    mode: Literal["none", "auto", "required"]
    tools: Sequence[Tool]
    name: str | None
    one_call: bool

    @classmethod
    def of(cls, given: str | JsonObject | None, tools: Sequence[Tool], *, parallel: bool | None) -> Self:
        """The choice of a request.

        Args:
            given: The field, as chat completions or responses have it.
            tools: The functions of the request.
            parallel: The field ``parallel_tool_calls``.

        Raises:
            ApiError: The field has another form, names a function that the request lacks, or needs tools.
        """
        mode: Any = given or "auto"
        name, shown = None, list(tools)
        if isinstance(mode, Mapping):
            kind: Any = mode.get("type")
            facts: Any = mode.get(kind, mode) if isinstance(kind, str) else None
            if kind == "function" and isinstance(facts, Mapping) and isinstance(facts.get("name"), str):
                mode, name = "required", str(facts["name"])
                _check_known([name], tools)
            elif kind == "allowed_tools" and isinstance(facts, Mapping) and isinstance(facts.get("tools"), list):
                names = [_name_of(tool) for tool in facts["tools"]]
                _check_known(names, tools)
                mode, shown = facts.get("mode"), [tool for tool in tools if tool.function.name in names]
        if mode not in ("none", "auto", "required"):
            raise _refused(f"tool_choice is {given!r:.200}: {_EXPECTED}.")
        if mode == "required" and not shown:
            raise _refused("tool_choice demands a call, but there are no tools: give tools, or leave it out.")
        return cls(mode, () if mode == "none" else shown, name, parallel is False or name is not None)

    @property
    def is_forced(self) -> bool:
        """True if the answer must call a function."""
        return self.mode == "required"

    def constrained(self, form: ChatFormat, prompt: ChatPrompt, constraints: Constraints | None) -> Constraints | None:
        """Constraints that also make the answer follow the grammar of its calls.

        An answer with forced calls has nothing else. Otherwise it has calls, or the format that the request asks for.
        Calls must be valid if the function is strict. Without forced or strict calls and without a format, nothing is
        added.

        Raises:
            RequestError: A function's schema is no JSON object.
        """
        answer_format = None if constraints is None or self.is_forced else constraints.grammar
        is_free = answer_format is None and not any(tool.function.strict for tool in self.tools)
        if not self.is_forced and (is_free or not self.tools):
            return constraints
        callable_tools = [
            CallableTool(
                tool.function.name,
                tool.function.parameters if self.is_forced or tool.function.strict else {},
            )
            for tool in self.tools
            if self.name in (None, tool.function.name)
        ]
        grammar = form.calls(
            prompt.text,
            callable_tools,
            one_call=self.one_call,
            may_answer=not self.is_forced,
            answer_format=answer_format,
        )
        return replace(constraints or Constraints(), grammar=grammar)

    def parser(self, form: ChatFormat, prompt: ChatPrompt) -> OutputParser:
        """The parser of an answer."""
        return form.parser(prompt.text, prompt.tool_names, one_call=self.one_call, forced=self.is_forced)


def _name_of(tool: Any) -> str:
    """The function's name of an entry of ``allowed_tools``, in the form of chat completions or of responses."""
    facts = tool.get("function", tool) if isinstance(tool, Mapping) else None
    name = facts.get("name") if isinstance(facts, Mapping) else None
    if not isinstance(name, str):
        raise _refused("An entry of the allowed tools names no function.")
    return name


def _check_known(names: Sequence[str], tools: Sequence[Tool]) -> None:
    known = [tool.function.name for tool in tools]
    for name in names:
        if name not in known:
            raise _refused(f"tool_choice names the function {name!r:.80}, but tools has {known!r:.300}.")


def _refused(message: str) -> ApiError:
    return ApiError(400, message, "invalid_value", param="tool_choice")
