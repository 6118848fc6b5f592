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
from support.gate import AnyGate
from support.rig import CPU, Rig, rig_of


@pytest.fixture(scope="module")
def engine(tiny_bundle: Bundle) -> MedusaEngine:
    return MedusaEngine.load(tiny_bundle.folder, threads=1)


@pytest.fixture(scope="module")
def shared(tiny_bundle: Bundle) -> Iterator[MedusaService]:
    with MedusaService.load(tiny_bundle.folder, rows=3, threads=1, tree_size=4) as service:
        yield service


@pytest.fixture(scope="module")
def rig(tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """Backends on the CPU. Test files whose tests also run over a stand-in override this."""
    with rig_of(CPU, tiny_bundle, tmp_path_factory.mktemp("engine")) as rig:
        yield rig


@pytest.fixture
def gate(rig: Rig) -> AnyGate:
    return rig.gate()


@pytest.fixture
def service(tiny_bundle: Bundle, gate: AnyGate) -> Iterator[MedusaService]:
    service = MedusaService(
        tiny_bundle, gate, Tokenizer.load(tiny_bundle.folder), max_queue=2, tree_size=4, prefill_chunk=8
    )
    yield service
    gate.open.set()
    service.close()
