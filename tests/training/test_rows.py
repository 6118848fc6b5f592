"""Rows of data: usable rows are read, and the others are skipped and named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medusa_export.cli import main
from medusa_export.common.errors import DatasetError
from medusa_export.training.conversations import Conversation
from medusa_export.training.dataset import load_sources
from medusa_export.training.distillation import DESCRIPTION
from medusa_export.training.job import SETTINGS
from medusa_export.training.labels import tokenize
from medusa_export.training.rows import Reading, read_conversations
from support.distilling import distilled
from support.tiny_tokenizer import make_tokenizer

GOOD = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there."}]}


def lines(*rows: object) -> bytes:
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows).encode()


def read(folder: Path, data: bytes, name: str = "data.jsonl") -> Reading:
    (folder / name).write_bytes(data)
    return read_conversations(folder / name)


def turns(*said: tuple[str, object]) -> dict[str, object]:
    return {"conversations": [{"from": role, "value": value} for role, value in said]}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": []}, "its conversation is empty"),
        ({"conversations": {"from": "human"}}, "its messages are dict, not a list"),
        ({"messages": [[{"role": "user", "content": "Hi"}]]}, "holds the turn"),
        ({"messages": [{"role": "user", "content": None}]}, "a turn of 'user' has no text"),
        ({"messages": [{"role": "user", "content": 5}]}, "is int, not text"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]}, "parts that are not text"),
        (turns(("alien", "Hi")), "holds a turn of 'alien'"),
        (turns(("gpt", "Hello")), "no user message"),
        (turns(("human", " "), ("gpt", "Hello")), "its user messages are empty"),
        ({"data": ["Hi", 5]}, "'data' holds values that are not texts"),
        ({"text2": "a"}, "has the keys 'text2'"),
        ({}, "has the keys (none)"),
        (5, "it holds int"),
        ("null", "it holds NoneType"),
        ('{"prompt": "a', "not valid JSON"),
        ('{"prompt": "a", "prompt": "b"}', "has the key 'prompt' twice"),
        ('{"messages": [{"role": "user", "content": "a", "content": "b"}]}', "has the key 'content' twice"),
        ('{"prompt": "\\ud800"}', "not valid UTF-8"),
        ("[" * 100_000, "nested too deep"),
        ('{"prompt": ' + "9" * 5000 + "}", "not valid JSON"),
    ],
)
def test_an_unusable_row_is_skipped_and_named(tmp_path: Path, row: object, reason: str) -> None:
    found = read(tmp_path, lines(GOOD, "", row, GOOD))
    assert len(found.conversations) == 2
    (skipped,) = found.skipped
    assert skipped.source == "data.jsonl line 3"
    assert reason in skipped.reason
    assert found.rows == 3
    with pytest.raises(DatasetError, match=r"No row can be used: skipped 1 of 1 rows: data.jsonl line"):
        read(tmp_path, lines("\n", row) if row != "[" * 100_000 else lines(*[""] * 2, '{"a": ' + str(row)))


@pytest.mark.parametrize("role", ["gpt", "bing", "bard", "chatgpt", "Assistant", "model", "bot", "function_call"])
def test_names_of_the_model(tmp_path: Path, role: str) -> None:
    (found,) = read(tmp_path, lines(turns(("human", "Hi"), (role, "Hello")))).conversations
    assert [message["role"] for message in found.messages] == ["user", "assistant"]


@pytest.mark.parametrize("role", ["tool", "observation", "function"])
def test_names_of_tools(tmp_path: Path, role: str) -> None:
    (found,) = read(tmp_path, lines(turns(("system", "S"), ("human", "Hi"), (role, "5")))).conversations
    assert [message["role"] for message in found.messages] == ["system", "user", "tool"]


def test_answers_before_the_first_user_message_are_not_learned(tmp_path: Path) -> None:
    row = turns(("system", "S"), ("gpt", "Welcome!"), ("human", "Hi"), ("gpt", "Hello"))
    (found,) = read(tmp_path, lines(row)).conversations
    assert [message["content"] for message in found.messages] == ["S", "Hi", "Hello"]


def test_texts_in_parts_and_thoughts(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "Hi"}, {"type": "text", "text": " there"}]
    answer = {"role": "assistant", "content": "Hello", "reasoning": "Hm."}
    (found,) = read(tmp_path, lines({"messages": [{"role": "user", "content": parts}, answer]})).conversations
    assert found.user_turns == ("Hi there",)
    assert found.messages[1] == {"role": "assistant", "content": "Hello"} | dict.fromkeys(
        ("reasoning_content", "reasoning", "thinking"), "Hm."
    )


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Hi", "input": "", "output": "Hello"},
        {"prompt": "Hi", "completion": "Hello"},
        {"question": "Hi", "answer": "Hello"},
        {"prompt": [{"role": "user", "content": "Hi"}], "completion": [{"role": "assistant", "content": "Hello"}]},
        {"prompt": [{"role": "user", "content": "Hi"}], "response": "Hello"},
    ],
)
def test_prompts_with_an_answer(tmp_path: Path, row: object) -> None:
    (found,) = read(tmp_path, lines(row)).conversations
    assert [message["content"] for message in found.messages] == ["Hi", "Hello"]


@pytest.mark.parametrize("name", ["p.jsonl", "p.json", "p.ndjson", "p.txt", "p"])
@pytest.mark.parametrize("shape", ["lines", "array", "one object over lines"])
@pytest.mark.parametrize("mark", ["", "utf-8", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_files_of_any_name_and_encoding(tmp_path: Path, name: str, shape: str, mark: str, end: str) -> None:
    text = {
        "lines": lines(GOOD).decode(),
        "array": json.dumps([GOOD]),
        "one object over lines": json.dumps(GOOD, indent=1),
    }
    data = text[shape].replace("\n", end)
    encoded = data.encode("utf-16") if mark == "utf-16" else data.encode("utf-8-sig" if mark else "utf-8")
    assert read(tmp_path, encoded, name).conversations == [
        Conversation(({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there."}))
    ]


def test_byte_order_marks_within_concatenated_files(tmp_path: Path) -> None:
    assert [c.user_turns for c in read(tmp_path, "\ufeffone\r\n\ufefftwo\r\n".encode(), "p.txt").conversations] == [
        ("one",), ("two",)
    ]  # fmt: skip
    both = lines(GOOD) + "\ufeff".encode() + lines(GOOD)
    assert len(read(tmp_path, both).conversations) == 2


def test_invalid_bytes_skip_only_their_line(tmp_path: Path) -> None:
    found = read(tmp_path, b"one\ntw\xff\xfeo\nthree\n", "p.txt")
    assert [c.user_turns[0] for c in found.conversations] == ["one", "three"]
    assert str(found.skipped[0]) == "p.txt line 2: its text is not valid UTF-8"


@pytest.mark.parametrize(("start", "kind"), [(b"PAR1", "a Parquet file"), (b"\x1f\x8b\x08", "compressed by gzip")])
def test_binary_files_are_refused(tmp_path: Path, start: bytes, kind: str) -> None:
    with pytest.raises(DatasetError, match=kind):
        read(tmp_path, start + b"\x00\xff", "p.jsonl")


def test_a_gigantic_row_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medusa_export.training.row_parsing._MOST_CHARACTERS", 1000)
    found = read(tmp_path, lines(GOOD, {"prompt": "a" * 1001}))
    assert str(found.skipped[0]) == "data.jsonl line 2: it has more than 1,000 characters"


def test_an_array_that_was_cut_off(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="damaged or cut off"):
        read(tmp_path, json.dumps([GOOD, GOOD]).encode()[:-9], "p.json")


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.sampled_from(["user", "gpt", "Hi"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(["messages", "conversations", "data", "prompt", "output", "role", "from", "content", "value",
                         "written", "complete", "text", "thinking", "system", "input"]),
        inner, max_size=4,
    ),
    max_leaves=12,
)  # fmt: skip


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(_JSON, max_size=4), junk=st.binary(max_size=8))
def test_every_row_is_read_or_named(tmp_path: Path, rows: list[object], junk: bytes) -> None:
    data = lines(GOOD, *map(json.dumps, rows)) + junk.replace(b"\n", b"") + b"\n"
    found = read(tmp_path, data)
    places = {row.source for row in (*found.conversations, *found.skipped)}
    assert len(places) == found.rows
    assert len(rows) + 1 <= found.rows <= len(rows) + 2
    for conversation in found.conversations:
        for sample in tokenize(make_tokenizer(260), conversation):
            assert any(sample.is_label)


UNUSABLE = [
    {"messages": []},  # line 7
    {"messages": [{"role": "user", "content": "Only a question"}]},
    turns(("human", "An empty one"), ("gpt", " ")),
    turns(("human", "long " * 600), ("gpt", "too late")),
    turns(("system", "No systems here"), ("human", "Refused"), ("gpt", "never")),
]
REASONS = (
    "line 7: its conversation is empty",
    "line 8: it has no answer to learn from",
    "line 9: its answers are empty",
    "line 10: its first answer begins after the first 300 tokens (max_length)",
    "line 11: The chat template can't render these messages: system messages are not known",
)


@pytest.fixture(scope="module")
def picky_model(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose template refuses system messages."""
    folder = tmp_path_factory.mktemp("picky") / "model"
    folder.mkdir()
    for path in tiny_model_folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    template = folder / "chat_template.jinja"
    refusal = "{% if m['role'] == 'system' %}{{ raise_exception('system messages are not known') }}{% endif %}"
    template.write_text("{% for m in messages %}" + refusal + "{% endfor %}" + template.read_text())
    return folder


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Six usable rows, then five from which nothing can be learned."""
    path = tmp_path / "data.jsonl"
    good = [turns(("human", f"Question {i}"), ("bing", f"Answer {i} is this.")) for i in range(6)]
    path.write_bytes(lines(*good, *UNUSABLE))
    return path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_a_training_skips_rows_and_reports_them(picky_model: Path, mixed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ("--heldout", 0.4, "--max-length", 300, "--num-heads", 2, "--epochs", 1, "-q")
    command = ("train", picky_model, "--data", mixed, "-o", out, *options)
    result = run(*command, "--strict")
    assert result.exit_code == 1
    assert "With --strict, no row is skipped, but this would be: skipped 5 of 11 rows" in result.output
    assert not out.exists()  # the training did not begin
    result = run(*command)
    assert result.exit_code == 0, (result.output, result.exception)
    assert result.output.count("warning: skipped 5 of 11 rows: data.jsonl line 7: its conversation is empty; ") == 1
    kept = json.loads((out / SETTINGS).read_text())["rows"]
    assert (kept["read"], kept["skipped"]) == (11, 5)
    assert kept["first"] == [f"data.jsonl {reason}" for reason in REASONS]
    # The same command continues, with or without --strict. The usable rows alone are the same data.
    before = (out / "medusa_lm_head.safetensors").read_bytes()
    alone = tmp_path / "alone.jsonl"
    alone.write_bytes(b"".join(mixed.read_bytes().splitlines(keepends=True)[:6]))
    for data in (mixed, alone):
        result = run("train", picky_model, "--data", data, "-o", out, *options)
        assert result.exit_code == 0, (result.output, result.exception)
        assert (out / "medusa_lm_head.safetensors").read_bytes() == before
    heads = ("calibrate", picky_model, "--heads", out, "--data", mixed, "--max-length", 300, "-q")
    assert "With --strict" in run(*heads, "-o", tmp_path / "c.json", "--strict").output
    result = run(*heads, "-o", tmp_path / "c.json")
    assert result.exit_code == 0, (result.output, result.exception)
    assert "warning: skipped 5 of 11 rows" in result.output


def test_the_error_for_a_split_with_nothing_to_learn_gives_reasons(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("\n".join(f"Prompt {i}" for i in range(9)))
    with pytest.raises(DatasetError, match=r"No row can be used: skipped 9 of 9 rows: p.txt line 1: it has no answer"):
        load_sources([path], heldout=0.4).tokenized(make_tokenizer(260))


def test_a_distillation_skips_rows_and_records_them(picky_model: Path, mixed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    assert distilled(picky_model, folder, "--prompts", mixed, "--strict")[0] == 1
    assert not folder.exists()
    code, output = distilled(picky_model, folder, "--prompts", mixed)
    assert code == 0, output
    assert "warning: skipped 1 of 11 rows: data.jsonl line 7: its conversation is empty" in output
    assert "refuses some prompts: skipped 1 of 10 rows: data.jsonl line 11: The chat template can't" in output
    kept = json.loads((folder / DESCRIPTION).read_text())
    assert kept["rows"]["skipped"] == 1
    assert len(kept["refused"]) == kept["left_out"] == 1  # line 10 leaves no room for an answer
    # A job that was killed and continued gives the same result.
    names = ("train.jsonl", "heldout.jsonl", DESCRIPTION)
    before = [(folder / name).read_bytes() for name in names]
    sorted((folder / "answers").iterdir())[0].unlink()
    (folder / "train.jsonl").unlink()
    code, output = distilled(picky_model, folder, "--prompts", mixed)
    assert code == 0, output
    assert [(folder / name).read_bytes() for name in names] == before
    one = tmp_path / "one.jsonl"
    one.write_bytes(b"".join(mixed.read_bytes().splitlines(keepends=True)[:6]) + lines(UNUSABLE[-1]))
    code, output = distilled(picky_model, tmp_path / "strict", "--prompts", one, "--strict")
    assert code == 1
    assert "With --strict, no prompt may be refused. one.jsonl line 7" in output


def test_a_system_message_that_the_template_refuses_is_found_at_once(
    picky_model: Path, prompts: Path, tmp_path: Path
) -> None:
    code, output = distilled(picky_model, tmp_path / "data", "--prompts", prompts, "--system", "Be kind")
    assert code == 1
    assert "None of 22 prompts can be answered" in output
    assert "without --system" in output
    assert not (tmp_path / "data" / "answers").exists()
