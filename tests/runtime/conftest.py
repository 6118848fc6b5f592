"""Services and an engine for several test files of the runtime."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from medusa_runtime import (
    Bundle,
    MedusaEngine,
    MedusaService,
)
from medusa_runtime.text.tokenizer import Tokenizer
from support.gate import Gate


@pytest.fixture(scope="module")
def engine(tiny_bundle: Bundle) -> MedusaEngine:
    return MedusaEngine.load(tiny_bundle.folder, threads=1)


@pytest.fixture(scope="module")
def shared(tiny_bundle: Bundle) -> Iterator[MedusaService]:
    with MedusaService.load(tiny_bundle.folder, rows=3, threads=1, tree_size=4) as service:
        yield service


@pytest.fixture
def gate(tiny_bundle: Bundle) -> Gate:
    return Gate(tiny_bundle, rows=2)


@pytest.fixture
def service(tiny_bundle: Bundle, gate: Gate) -> Iterator[MedusaService]:
    service = MedusaService(
        tiny_bundle, gate, Tokenizer.load(tiny_bundle.folder), max_queue=2, tree_size=4, prefill_chunk=8
    )
    yield service
    gate.open.set()
    service.close()
