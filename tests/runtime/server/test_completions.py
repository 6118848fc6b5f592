"""Completions and tokens."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest

from medusa_runtime import MedusaEngine, SamplingParams


def test_completions_of_every_kind_of_prompt(client: openai.OpenAI, engine: MedusaEngine) -> None:
    assert engine.tokenizer is not None
    texts = ["Hi", "some text"]
    expected = [engine.generate(text, max_new_tokens=16).text for text in texts]
    ids = [engine.tokenizer.encode(text) for text in texts]
    prompts: list[tuple[Any, list[str]]] = [
        (texts[0], expected[:1]), (texts, expected), (ids[0], expected[:1]), (ids, expected),
    ]  # fmt: skip
    for prompt, wanted in prompts:
        answer = client.completions.create(model="tiny", prompt=prompt, temperature=0)
        assert [choice.text for choice in answer.choices] == wanted
        assert answer.usage is not None and answer.usage.completion_tokens == 16 * len(wanted)
    streamed = ["", "", "", ""]
    # The client's own type lets no reason be null before the end, which OpenAI's server sends, too.
    lenient = openai.OpenAI(base_url=client.base_url, api_key="none")
    for part in lenient.completions.create(model="tiny", prompt=texts, temperature=0, n=2, echo=True, stream=True):
        streamed[part.choices[0].index] += part.choices[0].text
    assert streamed == [text + rest for text, rest in zip(texts, expected, strict=True) for _ in range(2)]


def test_log_probabilities_have_places_in_the_text(client: openai.OpenAI, engine: MedusaEngine) -> None:
    expected = engine.generate("Hi", max_new_tokens=10, logprobs=True)
    assert expected.logprobs is not None
    answer = client.completions.create(model="tiny", prompt="Hi", temperature=0, max_tokens=10, logprobs=1)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.tokens is not None and logprobs.text_offset is not None
    assert logprobs.token_logprobs == pytest.approx(expected.logprobs, abs=1e-4)
    assert logprobs.top_logprobs is not None and len(logprobs.top_logprobs) == 10
    for token, place in zip(logprobs.tokens, logprobs.text_offset, strict=True):
        assert expected.text[place:].startswith(token) or "�" in token


def test_the_most_likely_tokens_are_listed_beside_the_chosen_one(client: openai.OpenAI, engine: MedusaEngine) -> None:
    params = SamplingParams(temperature=1.5, seed=2)
    expected = engine.generate("Hi", max_new_tokens=12, sampling=params, logprobs=True, top_logprobs=5)
    assert expected.logprobs is not None and expected.top_logprobs is not None
    fields: Any = {"model": "tiny", "prompt": "Hi", "temperature": 1.5, "seed": 2, "max_tokens": 12, "logprobs": 5}
    logprobs = client.completions.create(**fields).choices[0].logprobs
    assert logprobs is not None and logprobs.top_logprobs is not None and logprobs.tokens is not None
    beside = 0
    for token, logprob, top, found in zip(
        logprobs.tokens, expected.logprobs, expected.top_logprobs, logprobs.top_logprobs, strict=True
    ):
        assert found[token] == pytest.approx(logprob, abs=1e-4)
        assert max(found.values()) == pytest.approx(top[0].logprob, abs=1e-4)
        assert len(found) in (5, 6)
        beside += len(found) == 6
    assert beside
    streamed: list[dict[str, float]] = []
    lenient = openai.OpenAI(base_url=client.base_url, api_key="none")  # see above
    for part in lenient.completions.create(**fields, stream=True):
        if part.choices[0].logprobs is not None:
            streamed += part.choices[0].logprobs.top_logprobs or ()
    assert streamed == logprobs.top_logprobs


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"best_of": 3}, "unsupported_parameter"),
        ({"suffix": "end"}, "unsupported_parameter"),
        ({"echo": True, "logprobs": 0}, "unsupported_parameter"),
        ({"logprobs": 6}, "invalid_value"),
        ({"prompt": []}, "invalid_type"),
        ({"prompt": [101]}, "invalid_value"),
        ({"prompt": [-1]}, "invalid_value"),
        ({"prompt": ""}, "invalid_value"),
        ({"n": 129}, "invalid_value"),
        ({"prompt": [[5]] * 100_000, "n": 128}, "invalid_value"),
        ({"prompt": "Hi", "max_tokens": 511}, "context_length_exceeded"),
    ],
)
def test_refusals(web: httpx.Client, fields: dict[str, object], code: str) -> None:
    response = web.post("/v1/completions", json={"prompt": "Hi", **fields})
    assert (response.status_code, response.json()["error"]["code"]) == (400, code), response.text


def test_tokens(web: httpx.Client, engine: MedusaEngine) -> None:
    assert engine.tokenizer is not None
    answer = web.post("/tokenize", json={"prompt": "Hi", "return_token_strs": True}).json()
    assert answer == {
        "count": 2, "max_model_len": 512, "tokens": engine.tokenizer.encode("Hi"), "token_strs": ["H", "i"],
    }  # fmt: skip
    messages = [{"role": "user", "content": "Hi"}]
    answer = web.post("/tokenize", json={"messages": messages}).json()
    assert answer["tokens"] == engine.tokenizer.encode_chat(messages)
    for body in ({}, {"prompt": "Hi", "messages": messages}):
        response = web.post("/tokenize", json=body)
        assert response.status_code == 400 and "either prompt or messages" in response.text
