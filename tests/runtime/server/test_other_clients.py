"""LangChain's and LiteLLM's clients, as they come, against a server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema_rs
import openai
import pytest

from medusa_runtime import MedusaService
from medusa_runtime.server.prometheus import ServerMetrics
from medusa_runtime.server.settings import Settings
from support.servers import LOOK, running

pytestmark = pytest.mark.slow  # the clients take seconds to import

SCHEMA = {"title": "look", "description": "Looks at something.", **LOOK}
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "look", "parameters": SCHEMA}}
FORCED = {"type": "function", "function": {"name": "look"}}
CHAT: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
TOKENS = 24


@pytest.fixture(scope="module")
def address(byte_service: MedusaService) -> Iterator[str]:
    settings = Settings(bundle=Path("tiny"), model_names=("tiny",), tool_format="hermes")
    with running(byte_service, ServerMetrics("tiny"), settings) as address:
        yield f"{address}/v1"


@pytest.fixture(scope="module")
def text(byte_service: MedusaService) -> str:
    """The greedy answer to ``CHAT``."""
    return byte_service.generate(CHAT, max_new_tokens=TOKENS).text


class TestLangChain:
    @pytest.fixture
    def chat(self, address: str) -> Any:
        from langchain_openai import ChatOpenAI

        return ChatOpenAI(
            model="tiny", base_url=address, api_key="none", temperature=0, max_tokens=TOKENS, max_retries=0
        )

    def test_answers_streams_and_batches(self, chat: Any, text: str) -> None:
        answer = chat.invoke(CHAT)
        assert answer.content == text and answer.response_metadata["finish_reason"] == "length"
        assert answer.usage_metadata["output_tokens"] == TOKENS
        assert "".join(part.content for part in chat.stream(CHAT)) == text
        assert [one.content for one in chat.batch([CHAT] * 3)] == [text] * 3

        async def read() -> str:
            return "".join([part.content async for part in chat.astream(CHAT)])

        assert asyncio.run(read()) == text

    def test_log_probabilities(self, chat: Any) -> None:
        found = chat.bind(logprobs=True, top_logprobs=2).invoke(CHAT).response_metadata["logprobs"]["content"]
        assert len(found) == TOKENS and all(len(place["top_logprobs"]) == 2 for place in found)

    def test_tools(self, chat: Any) -> None:
        forced = chat.bind_tools([TOOL], tool_choice="look").bind(max_tokens=150)
        (call,) = forced.invoke(CHAT).tool_calls
        assert call["name"] == "look"
        jsonschema_rs.validate(SCHEMA, call["args"])
        parts = iter(forced.stream(CHAT))
        whole = next(parts)
        for part in parts:
            whole += part
        assert [(one["name"], one["args"]) for one in whole.tool_calls] == [(call["name"], call["args"])]

    @pytest.mark.parametrize("method", ["json_schema", "function_calling"])
    def test_structured_output(self, chat: Any, method: str) -> None:
        longer = chat.model_copy(update={"max_tokens": 150})
        jsonschema_rs.validate(SCHEMA, longer.with_structured_output(SCHEMA, method=method).invoke(CHAT))

    def test_the_responses_api(self, chat: Any, text: str) -> None:
        assert chat.model_copy(update={"use_responses_api": True}).invoke(CHAT).text == text

    def test_completions_and_errors(self, address: str, chat: Any, byte_service: MedusaService) -> None:
        from langchain_openai import OpenAI

        model = OpenAI(model="tiny", base_url=address, api_key="none", temperature=0, max_tokens=9)
        assert model.invoke("The sky") == byte_service.generate("The sky", max_new_tokens=9).text
        with pytest.raises(openai.BadRequestError, match="temperature"):
            chat.bind(temperature=-1).invoke(CHAT)
        with pytest.raises(openai.NotFoundError, match="does not exist"):
            chat.bind(model="other").invoke(CHAT)


class TestLiteLLM:
    @pytest.fixture
    def litellm(self, monkeypatch: pytest.MonkeyPatch) -> Any:
        monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it asks for prices on the network
        import litellm

        return litellm

    @pytest.fixture
    def fields(self, address: str) -> dict[str, Any]:
        return {"model": "openai/tiny", "api_base": address, "api_key": "none", "temperature": 0, "max_tokens": TOKENS}

    def test_answers_and_streams(self, litellm: Any, fields: dict[str, Any], text: str) -> None:
        answer = litellm.completion(messages=CHAT, **fields)
        assert answer.choices[0].message.content == text and answer.usage.completion_tokens == TOKENS
        parts = litellm.completion(messages=CHAT, stream=True, **fields)
        assert "".join(part.choices[0].delta.content or "" for part in parts) == text
        again = asyncio.run(litellm.acompletion(messages=CHAT, **fields))
        assert again.choices[0].message.content == text

    def test_tools_and_schemas(self, litellm: Any, fields: dict[str, Any]) -> None:
        fields["max_tokens"] = 150
        answer = litellm.completion(messages=CHAT, tools=[TOOL], tool_choice=FORCED, **fields)
        (call,) = answer.choices[0].message.tool_calls
        jsonschema_rs.validate(SCHEMA, json.loads(call.function.arguments))
        form = {"type": "json_schema", "json_schema": {"name": "look", "strict": True, "schema": SCHEMA}}
        answer = litellm.completion(messages=CHAT, response_format=form, **fields)
        jsonschema_rs.validate(SCHEMA, json.loads(answer.choices[0].message.content))

    def test_completions_and_errors(self, litellm: Any, fields: dict[str, Any], byte_service: MedusaService) -> None:
        fields |= {"model": "text-completion-openai/tiny", "max_tokens": 9}
        answer = litellm.text_completion(prompt="The sky", **fields)
        assert answer.choices[0].text == byte_service.generate("The sky", max_new_tokens=9).text
        with pytest.raises(litellm.BadRequestError, match="temperature"):
            litellm.completion(messages=CHAT, **fields | {"model": "openai/tiny", "temperature": -1})
        with pytest.raises(litellm.NotFoundError, match="does not exist"):
            litellm.completion(messages=CHAT, **fields | {"model": "openai/other"})
