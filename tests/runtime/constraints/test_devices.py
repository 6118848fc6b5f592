"""Constraints of rows of a compiled engine, on the stand-in for TensorRT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from medusa_runtime import Bundle, Constraints, Grammar, MedusaEngine, MedusaService, RequestError, SamplingParams
from medusa_runtime.backends.tensorrt import backend as tensorrt_backend
from medusa_runtime.bundles.compiled import EngineLimits
from medusa_runtime.text.tokenizer import Tokenizer
from support.machine import Machine, stand_in_engine

GIVEN: list[dict[str, Any]] = [
    {"constraints": Constraints(presence_penalty=1.5, repetition_penalty=1.2), "sampling": SamplingParams(seed=1)},
    {"constraints": Constraints(grammar=Grammar.regex("(ab|ba){9,12}-[0-9]+!"), min_new_tokens=25)},
    {},
    {"constraints": Constraints(logit_bias={5: 4.0}, banned_token_ids=[22, 37])},
]


def test_a_service_on_an_engine_answers_as_on_the_cpu(tiny_bundle: Bundle, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(tiny_bundle.folder)
    with MedusaEngine.load(tiny_bundle.folder, threads=1) as engine:
        alone = [
            engine.generate("go", max_new_tokens=30, stop_token_ids=[0], tree_size=1, **options) for options in GIVEN
        ]
    limits = EngineLimits(max_batch=3, capacity=128, max_prefill=16)
    backend = Machine(tiny_bundle, stand_in_engine(tiny_bundle, tmp_path, limits)).backend(rows=3)
    with MedusaService(tiny_bundle, backend, tokenizer, tree_size=9) as service:
        handles = [service.submit("go", max_new_tokens=30, stop_token_ids=[0], **options) for options in GIVEN]
        results = [handle.result(120) for handle in handles]
    assert [result.token_ids for result in results] == [result.token_ids for result in alone]
    assert results[1].stats.tokens_per_step > 1


def test_a_request_with_too_many_edited_tokens_ends_alone(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A penalty edits the tokens of the text and of the draft tree. Here an engine takes 40 of them."""
    monkeypatch.setattr(tensorrt_backend, "MAX_EDITS", 40)
    prompt, options = list(range(13)), {"max_new_tokens": 60, "stop_token_ids": [], "ignore_eos": True}
    others: list[dict[str, Any]] = [
        {}, {"constraints": Constraints(logit_bias={5: 4.0})}, {"sampling": SamplingParams(seed=1)},
    ]  # fmt: skip
    with MedusaEngine.load(tiny_bundle.folder, threads=1) as engine:
        alone = [engine.generate(prompt, tree_size=1, **options, **other) for other in others]
    limits = EngineLimits(max_batch=4, capacity=192, max_prefill=32)
    backend = Machine(tiny_bundle, stand_in_engine(tiny_bundle, tmp_path, limits)).backend(rows=4)
    with MedusaService(tiny_bundle, backend, None, tree_size=9) as service:
        with pytest.raises(RequestError, match=r"of 43 different tokens.* takes 40"):
            service.submit(list(range(35)), constraints=Constraints(repetition_penalty=1.1))
        with pytest.raises(RequestError, match=r"of 41 different tokens.* takes 40"):
            service.submit(prompt, constraints=Constraints(banned_token_ids=range(41)))
        handles = [service.submit(prompt, **options, **other) for other in others]
        growing = service.submit(prompt, constraints=Constraints(presence_penalty=50), **options)
        with pytest.raises(RequestError, match="takes 40"):
            growing.result(120)
        results = [handle.result(120) for handle in handles]
    assert [result.token_ids for result in results] == [result.token_ids for result in alone]
