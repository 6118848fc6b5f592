"""A bundle of contract version 5, as it was written then: its graph gives no most likely tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from medusa_runtime import Constraints, MedusaEngine, RequestError, SamplingParams
from medusa_runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from medusa_runtime.bundles.bundle import Bundle
from medusa_runtime.errors import BackendError
from medusa_runtime.sampling import GREEDY, Draws

HELD = Path(__file__).parents[2] / "data" / "contract_5"
ANSWER = json.loads((HELD / "expected.json").read_text())  # of that time
PROMPT, TOKENS = ANSWER["prompt"], ANSWER["tokens"]


def test_an_engine_answers_as_then() -> None:
    with MedusaEngine.load(HELD / "bundle", threads=1) as engine:
        result = engine.generate(PROMPT, max_new_tokens=20, logprobs=True)
        assert list(result.token_ids) == TOKENS
        assert result.logprobs == pytest.approx(ANSWER["logprobs"], abs=1e-4)
        sampled = engine.generate(PROMPT, max_new_tokens=20, sampling=SamplingParams(seed=3))
        assert list(sampled.token_ids) == ANSWER["sampled"]


def test_the_chosen_token_of_a_greedy_answer_is_the_most_likely_one() -> None:
    with MedusaEngine.load(HELD / "bundle", threads=1) as engine:
        result = engine.generate(PROMPT, max_new_tokens=20, logprobs=True, top_logprobs=1)
    assert result.logprobs is not None
    assert result.top_logprobs == tuple((pair,) for pair in zip(result.token_ids, result.logprobs, strict=True))


@pytest.mark.parametrize(
    "options",
    [
        {"top_logprobs": 2},
        {"top_logprobs": 1, "sampling": SamplingParams()},
        {"top_logprobs": 1, "constraints": Constraints(presence_penalty=1.0)},
    ],
)
def test_more_is_refused(options: dict[str, Any]) -> None:
    with (
        MedusaEngine.load(HELD / "bundle", threads=1) as engine,
        pytest.raises(RequestError, match="gives no most likely tokens: export it again"),
    ):
        engine.generate(PROMPT, logprobs=True, **options)


def test_a_backend_refuses_them() -> None:
    bundle = Bundle.load(HELD / "bundle")
    assert not bundle.top_logprobs
    backend = OnnxRuntimeBackend(bundle, threads=1)
    with pytest.raises(BackendError, match="gives no most likely tokens: export the bundle again"):
        backend.assign(0, Draws(GREEDY, 3, 101, ranks=True))
    backend.close()
