"""The ONNX Runtime backend for GPUs: its own logic on ONNX Runtime's CPU, and how it is chosen."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnxruntime
import pytest

from medusa_runtime import BackendError, Bundle, MedusaEngine
from medusa_runtime.backends import open_backend
from medusa_runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from support.decoding import TREE, decode, greedy
from support.on_host import OnnxRuntimeOnHost
from support.tiny_models import tiny_model

PROMPTS = [[(7 * i * i + 3 + row) % 101 for i in range(length)] for row, length in enumerate((13, 6))]


@pytest.mark.parametrize("rows", [1, 2])
def test_tokens_are_those_of_transformers(tiny_bundle: Bundle, rows: int) -> None:
    expected = [greedy(tiny_model("llama"), prompt, 40) for prompt in PROMPTS[:rows]]
    backend = OnnxRuntimeOnHost(tiny_bundle, rows=rows, threads=1)
    for size, chunk, seed in ((9, 5, 0), (4, 64, None), (1, 5, None)):
        result = decode(backend, TREE, PROMPTS[:rows], expected, size=size, chunk=chunk, count=40, seed=seed)
        assert result.tokens == expected
    backend.close()
    assert backend.capacity == 0


def test_growing_keeps_what_is_in_the_caches(tiny_bundle: Bundle) -> None:
    expected = greedy(tiny_model("llama"), PROMPTS[0], 100)
    backend = OnnxRuntimeOnHost(tiny_bundle, threads=1)
    backend.reserve(40)
    tokens = backend.step(13, {0: PROMPTS[0]}).tokens[0, :1].tolist()
    while len(tokens) < 100:
        backend.reserve(3 + 13 + len(tokens) + 9)
        step = backend.step(9)
        tokens += step.tokens[0, : step.count[0]].tolist()
    assert tokens[:100] == expected
    assert backend.capacity > 100
    assert backend.lengths[0] == 13 + len(tokens) - 1
    backend.reset(0)
    assert backend.lengths[0] == 0


def test_growing_twice_keeps_what_is_in_the_caches(tiny_bundle: Bundle) -> None:
    backend, other = (OnnxRuntimeOnHost(tiny_bundle, threads=1) for _ in range(2))
    for each in (backend, other):
        each.reserve(64)
        each.step(13, {0: PROMPTS[0]})
    for capacity in (128, 256):
        backend.reserve(capacity)
    assert backend.step(9).emitted(0) == other.step(9).emitted(0)


@pytest.mark.parametrize("grown", [False, True])
@pytest.mark.parametrize("length", [0, 2, 6])
def test_a_scrubbed_row_goes_on_as_if_nothing_had_been(tiny_bundle: Bundle, length: int, grown: bool) -> None:
    """All slots of the row but its committed entries hold NaN. Another row keeps its content."""
    backend, other = (OnnxRuntimeOnHost(tiny_bundle, rows=2, threads=1) for _ in range(2))
    text, depth = PROMPTS[1][:length], TREE.max_depth
    for each in (backend, other):
        each.reserve(64)
        each.step(13, {1: PROMPTS[0]})
        each.reset(0)
        if text:
            each.step(9, {0: text})
    kept = int(backend.lengths[0])
    pending = backend._caches.pending["pending_0"][0]
    for value in [*backend._caches.values, pending]:
        array = value.numpy().copy()
        if value is pending:
            array[0, :, : max(depth - kept, 0)] = np.nan
        else:
            array[0, :, :depth] = np.nan
            array[0, :, depth + kept :] = np.nan
        value.update_inplace(array)
    if grown:
        backend.reserve(256)
    backend.scrub(0)
    chunk = {} if text else {0: PROMPTS[0][:6]}
    for size in (9, 4):
        step, expected = backend.step(size, chunk), other.step(size, chunk)
        for row in range(2):
            tokens, logprobs, _ = step.emitted(row)
            assert tokens == expected.emitted(row)[0]
            assert logprobs == pytest.approx(expected.emitted(row)[1], abs=1e-5)
        chunk = {}


def test_what_an_earlier_request_left_does_not_reach_the_next(tiny_bundle: Bundle) -> None:
    backend = OnnxRuntimeOnHost(tiny_bundle, threads=1)
    with MedusaEngine(tiny_bundle, backend, None) as engine:
        engine.generate(PROMPTS[1], max_new_tokens=10)
        for value in (*backend._caches.values, backend._caches.pending["pending_0"][0]):
            value.update_inplace(np.full_like(value.numpy(), np.nan))
        result = engine.generate(PROMPTS[0], max_new_tokens=40, tree_size=9)
        assert list(result.token_ids) == greedy(tiny_model("llama"), PROMPTS[0], 40)


def test_bfloat16_is_refused_for_what_it_is_here(tiny_bundle: Bundle) -> None:
    with pytest.raises(
        BackendError, match=r"passes caches through NumPy.*Export it in fp16 or fp32, or .*medusa-export trt"
    ):
        OnnxRuntimeOnHost(replace(tiny_bundle, dtype="bfloat16"))


@pytest.mark.parametrize("kind", [OnnxRuntimeOnHost, OnnxRuntimeBackend])
@pytest.mark.parametrize("standard", [True, False])
def test_a_failed_step_can_be_tried_again(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, kind: type[OnnxRuntimeBackend], standard: bool
) -> None:
    """The step fails after it has written its outputs. Lengths, pending entries and drafts are unchanged."""
    if kind is OnnxRuntimeOnHost:
        backend = kind(tiny_bundle, rows=2, threads=1)
    else:
        backend = kind(tiny_bundle, rows=2, threads=1, graph=tiny_bundle.graph if standard else None)
    backend.reserve(96)
    backend.step(13, dict(enumerate(PROMPTS)))
    backend.step(9)
    lengths, drafts = backend.lengths.copy(), backend.drafts.copy()
    run = backend._session.run_with_iobinding

    def run_and_fail(binding: object) -> None:
        run(binding)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(backend._session, "run_with_iobinding", run_and_fail)
    for size in (9, 1):
        with pytest.raises(BackendError, match=f"failed in a step of {size} tokens .* out of memory"):
            backend.step(size)
    np.testing.assert_array_equal(backend.lengths, lengths)
    np.testing.assert_array_equal(backend.drafts, drafts)
    monkeypatch.undo()
    tokens: list[list[int]] = [[], []]
    while min(map(len, tokens)) < 12:
        step = backend.step(9)
        for row in range(2):
            tokens[row] += step.tokens[row, : step.count[row]].tolist()
    for row, prompt in enumerate(PROMPTS):
        expected = greedy(tiny_model("llama"), prompt, 40)
        begin = int(lengths[row]) - len(prompt) + 1
        assert tokens[row][:10] == expected[begin : begin + 10]


@pytest.mark.skipif("CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="it is there")
def test_a_missing_provider_is_named(tiny_bundle: Bundle) -> None:
    with pytest.raises(BackendError, match=r"has no CUDAExecutionProvider: install it .*\[gpu\]"):
        open_backend("onnxruntime-cuda", tiny_bundle)


@pytest.mark.skipif("CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="it may well start")
def test_auto_falls_back_with_a_note(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """A provider that is listed but can't be started, as with a driver that is too old."""
    listed = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: listed)
    with pytest.warns(RuntimeWarning, match=r"Running on onnxruntime instead of onnxruntime-cuda\. .*CUDAExec"):
        engine = MedusaEngine.load(tiny_bundle.folder, threads=1)
    assert "CPU" in engine.backend.name
    assert list(engine.generate(PROMPTS[0], max_new_tokens=8).token_ids) == greedy(tiny_model("llama"), PROMPTS[0], 8)
    with pytest.raises(BackendError, match="CUDAExecutionProvider"):
        MedusaEngine.load(tiny_bundle.folder, "onnxruntime-cuda")
