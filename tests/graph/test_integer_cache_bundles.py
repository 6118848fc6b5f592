"""Bundles with 8-bit caches: their tokens are those of plain decoding, and each entry is rounded once."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from medusa_export import build_engine, export
from medusa_export.common.errors import EngineBuildError, OptionError
from medusa_runtime import BackendError, Bundle, MedusaEngine, MedusaService, SamplingParams
from medusa_runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from medusa_runtime.bundles.bundle import GRAPH, ONNXRUNTIME_BATCH_GRAPH, ONNXRUNTIME_CUDA_GRAPH, ONNXRUNTIME_GRAPH
from support.on_host import OnnxRuntimeOnHost
from support.stock import Exported, Stock
from support.tiny_models import tiny_model
from support.verifying import failed, verify

PROMPTS = [[(7 * i * i + 3 * row) % 100 + 1 for i in range(length)] for row, length in enumerate((5, 30, 61))]
GRAPHS = (GRAPH, ONNXRUNTIME_GRAPH, ONNXRUNTIME_BATCH_GRAPH)
SAMPLED = SamplingParams(temperature=0.9, seed=3)
NEW = 40


@pytest.fixture(scope="module")
def exported(stock: Stock) -> Exported:
    return stock.export(kv_cache="int8")


@pytest.fixture(scope="module")
def bundle(exported: Exported) -> Bundle:
    return exported.bundle


@pytest.fixture(scope="module")
def plain(bundle: Bundle) -> list[list[int]]:
    """The answers of plain decoding, greedy and sampled, each without anything kept of the one before."""
    answers = []
    with MedusaEngine.load(bundle.folder, threads=1) as engine:
        for prompt in PROMPTS:
            for sampling in (None, SAMPLED):
                engine.evict()
                found = engine.generate(prompt, max_new_tokens=NEW, tree_size=1, lookup=False, sampling=sampling)
                answers.append(list(found.token_ids))
    return answers


@pytest.mark.slow
def test_every_graph_computes_what_the_reference_computes(exported: Exported) -> None:
    assert failed(verify(exported.bundle, exported.step)) == set()


def test_the_bundle_says_what_its_states_are(bundle: Bundle, stock: Stock) -> None:
    assert bundle.kv_cache == "int8"
    assert stock.export().bundle.kv_cache is None
    heads, size = bundle.states[0].shape
    assert bundle.entry_bytes == 2 * bundle.model.num_layers * heads * (size + 4)
    assert [group.dtype for group in bundle.state_groups] == ["int8", "float32"]


def test_there_is_no_graph_that_its_backend_refuses(bundle: Bundle) -> None:
    assert {name for name in bundle.files if name.endswith(".onnx")} == set(GRAPHS)
    (note,) = bundle.notes
    assert note.startswith(f"{ONNXRUNTIME_CUDA_GRAPH} is left out. ")
    assert note.endswith("keys and values are 8-bit integers, and onnxruntime-cuda does not take them.")


@pytest.mark.parametrize("size", [2, 5, 9])
def test_trees_chunks_and_kept_prefixes_change_no_token(bundle: Bundle, plain: list[list[int]], size: int) -> None:
    with MedusaEngine.load(bundle.folder, threads=1) as engine:
        for chunk in (7, 64):
            answers = [
                engine.generate(prompt, max_new_tokens=NEW, tree_size=size, prefill_chunk=chunk, sampling=sampling)
                for prompt in PROMPTS
                for sampling in (None, SAMPLED)  # the second one finds the prompt's entries
            ]
            assert [list(answer.token_ids) for answer in answers] == plain
            assert answers[1].stats.cached_tokens > 0
            again = engine.generate([*PROMPTS[2], *plain[4][:20]], max_new_tokens=NEW - 20, tree_size=size)
            assert list(again.token_ids) == plain[4][20:]


def test_a_service_gives_the_tokens_of_plain_decoding(bundle: Bundle, plain: list[list[int]]) -> None:
    backend = OnnxRuntimeBackend(bundle, rows=3, threads=1)
    with MedusaService(bundle, backend, None, tree_size=5, prefill_chunk=16) as service:
        for _ in range(2):  # the second time, rows are copied
            handles = [
                service.submit(prompt, max_new_tokens=NEW, sampling=sampling)
                for prompt in PROMPTS
                for sampling in (None, SAMPLED)
            ]
            assert [list(handle.result(60).token_ids) for handle in handles] == plain


def held(backend: OnnxRuntimeBackend, row: int, length: int) -> list[NDArray[np.generic]]:
    """Copies of the first entries of a row in each group of states."""
    margin = backend._bundle.slots.margin
    return [group[:, :, margin : margin + length].copy() for group in backend._store.row(row)]


@pytest.mark.parametrize("graph", GRAPHS)
def test_an_entry_is_rounded_once(bundle: Bundle, graph: str) -> None:
    """Pending entries, moves, copies, cuts and larger caches leave integers and scales as they were."""
    rows = 1 if graph == ONNXRUNTIME_GRAPH else 2
    with closing(OnnxRuntimeBackend(bundle, rows=rows, threads=1, graph=bundle.folder / graph)) as backend:
        backend.reserve(64)
        backend.step(30, {0: PROMPTS[1]}, [0])
        for _ in range(4):
            backend.step(9, rows=[0])
        length = int(backend.lengths[0])
        backend.truncate(0, length)  # pending entries come to their slots
        before = held(backend, 0, length)
        assert [part.dtype for part in before] == [np.int8, np.float32]
        assert all(part.any() for part in before)
        for cut in (length - 1, 11):
            backend.truncate(0, cut)
            backend.step(7, {0: PROMPTS[0]}, [0])
            backend.reserve(backend.capacity + 64)
            backend.step(1, rows=[0])
            assert all(
                np.array_equal(new, old[:, :, :cut]) for new, old in zip(held(backend, 0, cut), before, strict=True)
            )
        if rows > 1:
            backend.copy(0, 1, 11)
            assert all(map(np.array_equal, held(backend, 1, 11), held(backend, 0, 11)))


@pytest.mark.parametrize("graph", GRAPHS)
def test_a_free_slot_that_is_not_finite_reaches_no_token(bundle: Bundle, graph: str) -> None:
    """A row emits nothing if a scale is not finite, and goes on as before once it is scrubbed."""
    emitted = []
    for poison in (False, True):
        with closing(OnnxRuntimeBackend(bundle, threads=1, graph=bundle.folder / graph)) as backend:
            backend.reserve(64)
            backend.step(30, {0: PROMPTS[1]})
            if poison:
                _, scales = backend._store.row(0)
                scales[:, :, bundle.slots.slot(int(backend.lengths[0])) + 9 :] = np.nan
                assert backend.step(1).count[0] == 0
                backend.scrub(0)
            emitted.append([backend.step(1).emitted(0)[0] for _ in range(4)])
    assert emitted[0] == emitted[1]


def test_a_bundle_in_half_precision_has_no_integer_caches(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="needs a bundle that computes in fp32, not in fp16"):
        export(tiny_model("llama").half(), tmp_path / "bundle", kv_cache="int8")
    with pytest.raises(OptionError, match="no K/V cache of type 'int4': give one of int8"):
        export(tiny_model("llama"), tmp_path / "bundle", kv_cache="int4")  # type: ignore[arg-type]


def test_backends_that_take_no_integer_caches_say_so(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="K/V cache in int8, which was never tried with onnxruntime-cuda"):
        OnnxRuntimeOnHost(bundle)
    pytest.importorskip("tensorrt_rtx")
    with pytest.raises(EngineBuildError, match=r"K/V cache in int8, .* Export the bundle without `kv_cache`"):
        build_engine(bundle, tmp_path / "engine", targets=["sm89"])
