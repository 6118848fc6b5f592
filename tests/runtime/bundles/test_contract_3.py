"""A bundle of contract version 3, as it was written then: one tensor of pending entries, and no list of states."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from medusa_runtime import Bundle, BundleError, Constraints, MedusaEngine, MedusaService, RequestError
from medusa_runtime.backends.base import Backend
from medusa_runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from medusa_runtime.bundles.bundle import DESCRIPTION, GRAPH
from support.on_host import OnnxRuntimeOnHost

HELD = Path(__file__).parents[2] / "data" / "contract_3"
ANSWER = json.loads((HELD / "expected.json").read_text())  # of transformers' generate
PROMPT, TOKENS = ANSWER["prompt"], ANSWER["tokens"]


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return Bundle.load(HELD / "bundle")


def test_its_states_follow_from_its_model(bundle: Bundle) -> None:
    assert [state.name for state in bundle.states] == ["key_0", "value_0", "key_1", "value_1"]
    assert {(state.kind, state.shape, state.margin, state.pending) for state in bundle.states} == {
        ("kv", (1, 16), bundle.tree.max_depth, "pending_kv")
    }


@pytest.mark.parametrize("chunk", [7, 16, 64])
def test_an_engine_answers_as_then(bundle: Bundle, chunk: int) -> None:
    with MedusaEngine.load(bundle.folder, threads=1) as engine:
        for size in (1, 3, 8, 9):
            result = engine.generate(PROMPT, max_new_tokens=len(TOKENS), tree_size=size, prefill_chunk=chunk)
            assert list(result.token_ids) == TOKENS


def test_constraints_are_refused(bundle: Bundle) -> None:
    assert not bundle.constraints
    with (
        MedusaEngine.load(bundle.folder, threads=1) as engine,
        pytest.raises(RequestError, match="knows no constraints: export it again"),
    ):
        engine.generate(PROMPT, constraints=Constraints(presence_penalty=1.0))


@pytest.mark.parametrize("graph", [None, GRAPH])
def test_a_service_answers_as_then(bundle: Bundle, graph: str | None) -> None:
    path = None if graph is None else bundle.folder / graph
    with MedusaService(bundle, OnnxRuntimeBackend(bundle, rows=3, threads=1, graph=path), None) as service:
        handles = [service.submit(PROMPT[:length], max_new_tokens=20) for length in (37, 30, 12)]
        assert list(handles[0].result(60).token_ids) == TOKENS[:20]
        again = service.submit([*PROMPT, *TOKENS[:8]], max_new_tokens=12)
        assert list(again.result(60).token_ids) == TOKENS[8:20]


@pytest.mark.parametrize("kind", [OnnxRuntimeOnHost, OnnxRuntimeBackend])
def test_pending_entries_are_cut_with_their_row(bundle: Bundle, kind: type[OnnxRuntimeBackend]) -> None:
    options = {"graph": bundle.graph} if kind is OnnxRuntimeBackend else {}
    backend: Backend = kind(bundle, threads=1, **options)
    backend.reserve(128)
    backend.step(40, {0: PROMPT})
    backend.step(9)
    backend.truncate(0, 30)
    assert backend.step(9, {0: PROMPT[30:]}).emitted(0)[0] == TOKENS[:1]


def test_a_description_without_the_shape_of_caches_is_refused(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(HELD / "bundle", tmp_path / "bundle"))
    data = json.loads((folder / DESCRIPTION).read_text())
    del data["model"]["head_dim"]
    (folder / DESCRIPTION).write_text(json.dumps(data))
    with pytest.raises(BundleError, match="'states' is missing"):
        Bundle.load(folder)
