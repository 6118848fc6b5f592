"""Parsers of reasoning and tool calls: no part depends on how the text is divided into pieces."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medusa_runtime import MedusaError
from medusa_runtime.server.output import hermes, llama3, mistral
from medusa_runtime.server.output.call_form import CallForm, ForcedCallParser
from medusa_runtime.server.output.formats import TOOL_FORMATS, ChatFormat
from medusa_runtime.server.output.harmony import HarmonyParser
from medusa_runtime.server.output.hermes import HermesParser
from medusa_runtime.server.output.llama3 import Llama3Parser
from medusa_runtime.server.output.mistral import MistralParser
from medusa_runtime.server.output.parts import Arguments, Call, Content, OutputParser, PlainParser, Reasoning
from medusa_runtime.server.output.reasoning import ReasoningParser, Trimmer
from medusa_runtime.text.tokenizer import Tokenizer
from support.chat_templates import PUBLISHED
from support.tiny_tokenizer import make_tokenizer

Part = Content | Reasoning | Call | Arguments
Make = Callable[[], OutputParser]

MAKERS: dict[str, Make] = {
    "hermes": lambda: Trimmer(HermesParser()),
    "llama3": lambda: Trimmer(Llama3Parser(["look", "go"])),
    "mistral": lambda: Trimmer(MistralParser()),
    "harmony": lambda: Trimmer(HarmonyParser()),
    "think": lambda: ReasoningParser(PlainParser(), is_open=False),
    "open think": lambda: ReasoningParser(Trimmer(HermesParser()), is_open=True),
    "forced": lambda: ForcedCallParser(hermes.CALLS, ["look", "go"]),
}
LOOK, GO = Call("look", '{"at": "sky"}'), Call("go", "{}")
_LOOK = '{"name": "look", "arguments": {"at": "sky"}}'
_GO = '{"name": "go", "arguments": {}}'
_NEW_CALLS = '[TOOL_CALLS]look[ARGS]{"at": "sky"}[TOOL_CALLS]go[CALL_ID]x1[ARGS]{}'
_ANALYSIS, _FINAL = "<|channel|>analysis<|message|>Hm.<|end|>", "<|channel|>final<|message|>"
_CALL = "<|start|>assistant<|channel|>commentary to=functions.look <|constrain|>json<|message|>"

CASES: list[tuple[str, str, list[Part]]] = [
    ("hermes", "Hello.", [Content("Hello.")]),
    ("hermes", "a < b <tool", [Content("a < b <tool")]),
    ("hermes", f"I look.\n<tool_call>\n{_LOOK}\n</tool_call>", [Content("I look."), LOOK]),
    ("hermes", f"<tool_call>{_LOOK}</tool_call>\n<tool_call>{_GO}</tool_call>\n", [LOOK, GO]),
    ("hermes", f"<tool_call>{_LOOK}", [LOOK]),
    ("hermes", "<tool_call>none</tool_call> x", [Content("<tool_call>none</tool_call> x")]),
    ("hermes", "<tool_call>" + "[" * 100_000, [Content("<tool_call>" + "[" * 100_000)]),
    ("llama3", '{"name": "look", "parameters": {"at": "sky"}}', [LOOK]),
    ("llama3", f"<|python_tag|>{_LOOK}; {_GO}", [LOOK, GO]),
    ("llama3", '{"name": "other", "parameters": {}}', [Content('{"name": "other", "parameters": {}}')]),
    ("llama3", '{"sky": "blue"} it is', [Content('{"sky": "blue"} it is')]),
    ("llama3", " Hello.", [Content(" Hello.")]),
    ("llama3", "<|python_tag|>print(1)", [Content("<|python_tag|>print(1)")]),
    ("mistral", f"[TOOL_CALLS][{_LOOK}, {_GO}]", [LOOK, GO]),
    ("mistral", "I look. " + _NEW_CALLS, [Content("I look."), LOOK, GO]),
    ("mistral", "[TOOL_CALLS]look", [Content("[TOOL_CALLS]look")]),
    ("mistral", "[TOOL] x", [Content("[TOOL] x")]),
    ("harmony", "<|channel|>final<|message|>Hello.<|return|>", [Content("Hello.")]),
    ("harmony", f"{_ANALYSIS}<|start|>assistant{_FINAL}Hello.", [Reasoning("Hm."), Content("Hello.")]),
    ("harmony", f'{_ANALYSIS}{_CALL}{{"at": "sky"}}<|call|>', [Reasoning("Hm."), LOOK]),
    ("harmony", " to=functions.go<|channel|>commentary json<|message|>{}<|call|>", [GO]),
    ("harmony", "<|channel|>commentary<|message|>I look.<|end|>" + _CALL + '{"at": "sky"}', [Content("I look."), LOOK]),
    ("harmony", "Hello.", [Content("Hello.")]),
    ("think", "<think>\nHm.\n\nSo.\n</think>\n\nHello.\n", [Reasoning("Hm.\n\nSo."), Content("Hello.\n")]),
    ("think", "Hello.", [Content("Hello.")]),
    ("think", " <thin", [Content(" <thin")]),
    ("think", "<think>\nHm.", [Reasoning("Hm.")]),
    ("think", "<think>\n\n</think>\n\nHello.", [Content("Hello.")]),
    ("open think", f"Hm.\n</think>\n\n<tool_call>{_LOOK}</tool_call>", [Reasoning("Hm."), LOOK]),
    ("open think", "Hm.\n</think>", [Reasoning("Hm.")]),
]  # fmt: skip


def parts_of(make: Make, pieces: list[str]) -> list[Part]:
    """The parts of a text that comes in pieces; neighbours of one kind are joined."""
    parser = make()
    found: list[Part] = []
    for part in [*(part for piece in pieces for part in parser.feed(piece)), *parser.finish()]:
        last = found[-1] if found else None
        if isinstance(part, Arguments):
            assert isinstance(last, Call)
            found[-1] = Call(last.name, last.arguments + part.text)
        elif isinstance(part, Call) or type(part) is not type(last):
            found.append(part)
        else:
            assert not isinstance(last, Call) and last is not None
            found[-1] = type(part)(last.text + part.text)
    return found


@pytest.mark.parametrize(("form", "text", "expected"), CASES, ids=lambda value: str(value)[:40])
def test_parts_of_whole_texts_and_of_single_characters(form: str, text: str, expected: list[Part]) -> None:
    assert parts_of(MAKERS[form], [text]) == expected
    if len(text) < 1000:
        assert parts_of(MAKERS[form], list(text)) == expected


PIECES = ["<tool_call>", "</tool_call>", "<think>", "</think>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", _LOOK, _GO,
          "<|channel|>", "analysis", "final", "<|message|>", "<|end|>", "<|start|>", "to=functions.go", "{}", "\n", " ",
          "a", "<", "; "]  # fmt: skip


@settings(max_examples=300)
@given(st.sampled_from(sorted(MAKERS)), st.lists(st.sampled_from(PIECES), max_size=12), st.data())
def test_pieces_of_any_size_give_the_same_parts(form: str, parts: list[str], data: st.DataObject) -> None:
    text = "".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[start:end] for start, end in pairwise([0, *cuts, len(text)])]
    assert parts_of(MAKERS[form], pieces) == parts_of(MAKERS[form], [text])


def test_one_call_is_left_if_calls_may_not_be_parallel() -> None:
    text = f"<tool_call>{_LOOK}</tool_call><tool_call>{_GO}</tool_call>"
    assert parts_of(lambda: Trimmer(HermesParser(), one_call=True), [text]) == [LOOK]


@pytest.mark.parametrize("form", [hermes.CALLS, llama3.CALLS, mistral.CALLS, mistral.LIST_CALLS])
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_forced_calls_are_read_while_they_come(form: CallForm, size: int) -> None:
    arguments = '{"at": "s}\\"ky", "in": [{}, "["]}'
    calls = [form.head('lo"ok') + arguments + form.end, form.head("go") + "{}" + form.end]
    text = form.opening + form.before + (form.between or "").join(calls) + form.after
    pieces = [text[start : start + size] for start in range(0, len(text), size)]
    expected: list[Part] = [Call('lo"ok', arguments), Call("go", "{}")]
    assert parts_of(lambda: ForcedCallParser(form, ['lo"ok', "go"]), pieces) == expected
    cut = text[: text.index("s}") + 1]  # the most tokens of the answer came first
    assert parts_of(lambda: ForcedCallParser(form, ['lo"ok', "go"]), [cut]) == [Call('lo"ok', '{"at": "s')]


def tokenizer_with(template: str) -> Tokenizer:
    return Tokenizer(make_tokenizer().backend_tokenizer, chat_templates={"default": template})


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{% if tools %}{{ tools | tojson }} <tool_call>{% endif %}x", "hermes"),
        ("{% if tools %}{{ tools | tojson }} [TOOL_CALLS]{% endif %}x", "mistral-list"),
        ("{% if tools %}{{ tools | tojson }} [TOOL_CALLS]f[ARGS]{}{% endif %}x", "mistral"),
        ('{% if tools %}{{ tools | tojson }} {"name": "f", "parameters": {}}{% endif %}x', "llama3"),
        ("{% if tools %}{{ tools | tojson }} <tool_call><function=f>{% endif %}x", None),
        ("<tool_call> without tools", None),
        (PUBLISHED["gpt-oss"].template, "harmony"),
        (PUBLISHED["SmolLM2"].template, None),
    ],
)  # fmt: skip
def test_the_template_shows_the_format(template: str, expected: str | None) -> None:
    form = ChatFormat.of(tokenizer_with(template))
    assert form.tools is (TOOL_FORMATS[expected] if expected else None)


def test_a_format_can_be_chosen() -> None:
    assert ChatFormat.of(None, tools="hermes").tools is TOOL_FORMATS["hermes"]
    assert ChatFormat.of(tokenizer_with("<think></think>")).thinks
    assert not ChatFormat.of(tokenizer_with("<think></think>"), reasoning_format="none").thinks
    with pytest.raises(MedusaError, match="no tool format 'xml'"):
        ChatFormat.of(None, tools="xml")
