"""Fixtures of the tests of the TensorRT backend."""

from __future__ import annotations

import pytest

from medusa_runtime import Bundle
from medusa_runtime.bundles.compiled import CompiledEngine
from support.decoding import greedy
from support.machine import PROMPTS, Machine
from support.tiny_models import tiny_model


@pytest.fixture
def machine(tiny_bundle: Bundle, tiny_engine: CompiledEngine) -> Machine:
    return Machine(tiny_bundle, tiny_engine)


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    model = tiny_model("llama")
    return [greedy(model, prompt, 40) for prompt in PROMPTS]
