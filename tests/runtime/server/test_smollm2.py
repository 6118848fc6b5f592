"""A real model behind the server, with OpenAI's client: chats at a time, streams and tokens."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from medusa_runtime import MedusaEngine, MedusaService
from medusa_runtime.server.prometheus import ServerMetrics
from medusa_runtime.server.settings import Settings
from support.servers import running

QUESTIONS = ["Why is the sky blue?", "Say hello.", "Write a list of three fruits.", "What is 2 + 2?"]


@pytest.mark.slow
def test_answers_at_a_time_are_those_of_an_engine(smollm2_bundle: Path) -> None:
    chats: list[Any] = [[{"role": "user", "content": question}] for question in QUESTIONS]
    with MedusaEngine.load(smollm2_bundle, measure=False) as engine:
        expected = [engine.generate(chat, max_new_tokens=24, logprobs=True) for chat in chats]
    metrics = ServerMetrics("smollm2")
    with (
        MedusaService.load(smollm2_bundle, rows=4, tree_size=4, metrics=metrics) as service,
        running(service, metrics, Settings(bundle=smollm2_bundle, model_names=("smollm2",))) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key="none", _strict_response_validation=True) as client,
    ):

        def ask(chat: Any) -> tuple[str, list[float], int]:
            whole = client.chat.completions.create(
                model="smollm2", messages=chat, temperature=0, max_tokens=24, logprobs=True
            )
            (choice,) = whole.choices
            streamed = client.chat.completions.create(
                model="smollm2", messages=chat, temperature=0, max_tokens=24, stream=True
            )
            assert "".join(part.choices[0].delta.content or "" for part in streamed) == choice.message.content
            response = client.responses.create(model="smollm2", input=chat, temperature=0, max_output_tokens=24)
            assert response.output_text == choice.message.content
            assert choice.logprobs is not None and choice.logprobs.content is not None and whole.usage is not None
            details = whole.usage.completion_tokens_details
            assert details is not None and details.accepted_prediction_tokens is not None
            logprobs = [token.logprob for token in choice.logprobs.content]
            return choice.message.content or "", logprobs, details.accepted_prediction_tokens

        with ThreadPoolExecutor(len(chats)) as pool:
            answers = list(pool.map(ask, chats))
    assert [text for text, _, _ in answers] == [result.text for result in expected]
    for (_, logprobs, _), result in zip(answers, expected, strict=True):
        assert logprobs == pytest.approx(result.logprobs, abs=1e-3)
    assert sum(accepted for _, _, accepted in answers) > 0
