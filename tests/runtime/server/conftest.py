"""A server over the tiny bundle, and clients."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import httpx
import openai
import pytest

from medusa_runtime import Bundle, MedusaEngine, MedusaService
from medusa_runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from medusa_runtime.server.prometheus import ServerMetrics
from medusa_runtime.server.settings import Settings
from medusa_runtime.text.tokenizer import Tokenizer
from support.servers import running
from support.stock import Stock
from support.tiny_tokenizer import CHAT_TEMPLATE, make_tokenizer


@dataclass(frozen=True)
class Served:
    """A server, and the service behind it."""

    address: str
    service: MedusaService


@pytest.fixture(scope="session")
def served(tiny_bundle: Bundle) -> Iterator[Served]:
    metrics = ServerMetrics("tiny")
    with MedusaService.load(tiny_bundle.folder, rows=3, threads=1, tree_size=4, metrics=metrics) as service:
        settings = Settings(bundle=tiny_bundle.folder, model_names=("tiny", "other"), keep_alive_seconds=0.05)
        with running(service, metrics, settings) as address:
            yield Served(address, service)


@pytest.fixture(scope="session")
def byte_service(stock: Stock) -> Iterator[MedusaService]:
    """A service of a tiny random model that knows all bytes and has an end token, so that it can follow grammars."""
    bundle = stock.export(vocab_size=257).bundle
    bundle = replace(bundle, model=replace(bundle.model, eos_token_ids=(0,)))
    backend = OnnxRuntimeBackend(bundle, rows=3, threads=1)
    tokenizer = Tokenizer(make_tokenizer(257).backend_tokenizer, chat_templates={"default": CHAT_TEMPLATE})
    with MedusaService(bundle, backend, tokenizer, tree_size=8) as service:
        yield service


@pytest.fixture(scope="session")
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{served.address}/v1", api_key="none", max_retries=0, timeout=60, _strict_response_validation=True
    ) as client:
        yield client


@pytest.fixture(scope="session")
def web(served: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=served.address, timeout=60) as web:
        yield web


@pytest.fixture(scope="session")
def engine(tiny_bundle: Bundle) -> Iterator[MedusaEngine]:
    with MedusaEngine.load(tiny_bundle.folder, threads=1, measure=False) as engine:
        yield engine
