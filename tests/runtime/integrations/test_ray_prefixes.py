"""The start of a prompt, the order of replicas, and the arguments of an application on Ray."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="Ray is not installed: pip install 'medusa-export[ray]'")

from medusa_runtime.integrations.ray.options import Scaling, absolute, read_arguments
from medusa_runtime.integrations.ray.prefix import by_preference, prompt_start
from medusa_runtime.server.settings import SettingError, Settings


def start_of(length: int = 64, **body: object) -> bytes | None:
    return prompt_start(json.dumps(body).encode(), length)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def test_all_turns_of_a_conversation_have_the_same_start() -> None:
    opening = [{"role": "system", "content": "Be brief."}, user("Why is the sky blue?")]
    later = [*opening, {"role": "assistant", "content": "Rayleigh."}, user("And at dusk?")]
    first = start_of(model="tiny", messages=opening, stream=True)
    assert first is not None and first == start_of(messages=later)
    assert first != start_of(messages=[user("Why is the sky blue?")])
    assert start_of(input=opening) == start_of(input=later) == first
    assert start_of(instructions="Be brief.", input="Why?") == b'"Be brief.""Why?"'


def test_a_start_has_a_bound() -> None:
    assert start_of(8, prompt="a" * 100) == start_of(8, prompt="a" * 99) == b'"' + b"a" * 7
    assert start_of(prompt=[1, 2, 3]) == b"[1, 2, 3]"


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"{}", b'{"messages": null}', b"\xff", b'{"messages": 3, "a": 1e'])
def test_a_body_without_a_prompt_has_no_start(body: bytes) -> None:
    assert prompt_start(body, 64) is None


def test_starts_spread_over_replicas_and_stay_when_one_goes() -> None:
    replicas = [f"replica{number}" for number in range(4)]
    starts = [f"prompt {number}".encode() for number in range(400)]
    first = {start: by_preference(start, replicas)[0] for start in starts}
    assert all(60 < list(first.values()).count(name) < 140 for name in replicas)
    for start in starts:
        left = by_preference(start, replicas[1:])
        assert left == [name for name in by_preference(start, reversed(replicas)) if name != "replica0"]


def test_arguments_are_read_as_text_and_as_values() -> None:
    settings, scaling = read_arguments(
        {"bundle": "b", "rows": "2", "max_replicas": "3", "cpus": 2, "model_names": "a, b", "request_seconds": "1.5"}
    )
    assert settings == Settings(bundle=Path("b"), rows=2, model_names=("a", "b"), request_seconds=1.5)
    assert scaling == Scaling(max_replicas=3, cpus=2)


def test_keys_come_from_the_environment_unless_arguments_have_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDUSA_API_KEYS", "one, two,")
    assert read_arguments({"bundle": "b"})[0].api_keys == ("one", "two")
    assert read_arguments({"bundle": "b", "api_keys": ["three"]})[0].api_keys == ("three",)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "The bundle is missing: add bundle=FOLDER"),
        ({"bundle": "b", "row": "2"}, "There is no option `row`: an application has api_keys,"),
        ({"bundle": "b", "rows": "two"}, "`rows` is 'two': Input should be a valid integer"),
        ({"bundle": "b", "min_replicas": "3"}, "`max_replicas` is 1: expected at least `min_replicas`, 3"),
        ({"bundle": "b", "cpus": "0"}, "`cpus` is 0: expected a number of at least 1"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, str], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        read_arguments(arguments)


def test_the_bundle_must_exist_and_its_path_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SettingError, match=f"There is no bundle at {tmp_path}/smol: .* every node of the cluster"):
        absolute(Settings(bundle=Path("smol")))
    (tmp_path / "smol").mkdir()
    settings = absolute(Settings(bundle=Path("smol")))
    assert settings.bundle == tmp_path / "smol" and settings.names == ("smol",)
