"""Constraints of rows of a compiled engine, on the stand-in for TensorRT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from medusa_runtime import Bundle, Constraints, Grammar, MedusaEngine, MedusaService, SamplingParams
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
