"""The demo: all contestants give the same tokens, also where an answer ends early."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from medusa_export.benchmarks.prompts import bench_prompts
from medusa_export.benchmarks.speeds import speeds
from medusa_runtime import MedusaEngine
from support.script import load_script


@pytest.mark.slow
def test_answers_that_end_early_are_the_same(smollm2_bundle: Path, smollm2_gguf: str) -> None:
    """transformers answers with as many tokens as it is asked for. So plain decoding says how many."""
    demo = load_script("demo")
    sample = [prompt for prompt in demo.first_of_each_kind(bench_prompts()) if prompt.category == "extraction"]
    with MedusaEngine.load(smollm2_bundle, threads=1) as engine:
        answers = demo.compare(Console(quiet=True), engine, smollm2_gguf, sample)
    assert len(answers[demo.REFERENCE][0][0].token_ids) < demo.COMPARED_TOKENS
    assert all(speed.identical for speed in speeds(answers, demo.REFERENCE).values())
