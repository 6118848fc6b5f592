"""The TensorRT backend's buffers and state, on a stand-in for the GPU (see ``stand_in_cuda``): no GPU has run this."""

from __future__ import annotations

import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medusa_export.verification.backend import verify_backend
from medusa_export.verification.plan import VerifyOptions
from medusa_runtime import BackendError, Bundle, MedusaEngine, RequestError
from medusa_runtime.backends import open_backend
from medusa_runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from medusa_runtime.backends.tensorrt import backend as backend_module
from medusa_runtime.backends.tensorrt.backend import TensorRTBackend
from medusa_runtime.backends.tensorrt.cuda import Cuda
from medusa_runtime.bundles.compiled import CompiledEngine
from medusa_runtime.sampling import Draws, SamplingParams
from support.decoding import TREE, decode, make_step, random_heads
from support.machine import PROMPTS, Machine
from support.stand_in_cuda import cudaError_t
from support.tiny_models import tiny_model


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("capturable", [True, False])
def test_rows_side_by_side_give_the_tokens_of_transformers(
    machine: Machine, expected: list[list[int]], rows: int, capturable: bool
) -> None:
    machine.trt.capturable = capturable
    backend = machine.backend(rows)
    for size, chunk, seed in ((9, 5, 0), (9, 32, None), (4, 7, 1), (1, 13, None)):
        result = decode(backend, TREE, PROMPTS[:rows], expected[:rows], size=size, chunk=chunk, count=40, seed=seed)
        assert result.tokens == expected[:rows]
        if seed is not None:
            assert len(result.accepted) > 2
    assert (machine.cuda.calls["cudaGraphLaunch"] > 20) == capturable
    assert set(backend.uncaptured) == (set() if capturable else {(9, 0), (4, 0), (1, 0)})
    assert {batch for batch, _ in machine.trt.executed} == {rows}


def test_a_size_is_captured_once_and_replayed(machine: Machine) -> None:
    backend = machine.backend()
    backend.step(13, {0: PROMPTS[0]})
    for size in (4, 9, 4, 4, 9, 4):
        backend.step(size)
    assert machine.cuda.calls["cudaStreamBeginCapture"] == 2
    assert machine.cuda.calls["cudaGraphLaunch"] == 4
    assert [size for _, size in machine.trt.executed] == [13, 4, 9, 4, 4, 9, 4]
    before = dict(machine.cuda.calls)
    backend.step(4)
    added = {name: n - before.get(name, 0) for name, n in machine.cuda.calls.items() if n != before.get(name, 0)}
    # The calls of a usual step: one launch, one copy to the host, and the wait for the copy.
    assert added == {"cudaGraphLaunch": 1, "cudaMemcpyAsync": 1, "cudaEventRecord": 1, "cudaEventSynchronize": 1}


@pytest.mark.parametrize("where", ["cudaStreamEndCapture", "cudaGraphInstantiate", "cudaStreamBeginCapture"])
def test_a_refused_capture_falls_back(machine: Machine, expected: list[list[int]], where: str) -> None:
    backend = machine.backend()
    machine.cuda.fail[where] = cudaError_t.cudaErrorStreamCaptureUnsupported
    result = decode(backend, TREE, PROMPTS[:1], expected[:1], size=9, chunk=32, count=40, seed=3)
    assert result.tokens == expected[:1]
    assert machine.cuda.calls["cudaGraphLaunch"] == 0
    assert where in backend.uncaptured[9, 0]
    assert "cudaErrorStreamCaptureUnsupported" in backend.uncaptured[9, 0]


@pytest.mark.parametrize("raises", [False, True])
def test_a_step_that_turns_out_to_be_uncapturable_falls_back(
    machine: Machine, expected: list[list[int]], raises: bool
) -> None:
    """Contexts of TensorRT for all GPUs can't say beforehand if a step can be captured: the capture fails."""
    machine.trt.capturable, machine.trt.raises = None, raises
    backend = machine.backend()
    result = decode(backend, TREE, PROMPTS[:1], expected[:1], size=9, chunk=32, count=40, seed=3)
    assert result.tokens == expected[:1]
    assert machine.cuda.calls["cudaStreamBeginCapture"] == 1
    assert machine.cuda.calls["cudaGraphLaunch"] == 0
    assert "a step that waits can't be captured" in backend.uncaptured[9, 0]
    backend.close()
    assert not machine.cuda.graphs


def test_a_refusal_with_sampling_is_none_without(machine: Machine) -> None:
    backend = machine.backend()
    backend.assign(0, Draws(SamplingParams(seed=1), 13, 101))
    backend.step(13, {0: PROMPTS[0]})
    machine.trt.capturable = False
    for _ in range(3):
        backend.step(4)
    ((size, draws),) = backend.uncaptured
    assert size == 4 and draws > 0
    machine.trt.capturable = True
    backend.assign(0, None)
    for _ in range(3):
        backend.step(4)
    assert machine.cuda.calls["cudaGraphLaunch"] == 2
    assert set(backend.uncaptured) == {(4, draws)}


def test_a_step_that_fails_while_captured_is_run_without(machine: Machine) -> None:
    backend, other = machine.backend(), machine.backend()
    for each in (backend, other):
        each.step(13, {0: PROMPTS[0]})
        each.step(9)
    machine.trt.fails = "no kernel of that kind can be captured"
    assert backend.step(9).tokens.tolist() == other.step(9).tokens.tolist()
    assert "no kernel of that kind" in backend.uncaptured[9, 0]
    assert not machine.cuda.captures
    backend.step(4)
    backend.step(4)
    assert machine.cuda.calls["cudaGraphLaunch"] == 2  # one of the other backend, and one of another size


def test_the_next_step_may_be_submitted_before_the_last_is_read(machine: Machine, expected: list[list[int]]) -> None:
    backend = machine.backend()
    tokens = backend.step(20, {0: PROMPTS[0]}).tokens[0, :1].tolist()
    backend.submit(4)
    ran = len(machine.trt.executed)
    for _ in range(15):
        backend.submit(4)
        assert len(machine.trt.executed) == ran  # nobody has waited for this step
        step = backend.collect()
        ran += 1
        assert len(machine.trt.executed) == ran
        tokens += step.tokens[0, : step.count[0]].tolist()
    assert tokens[:16] == expected[0][:16]
    assert len(tokens) <= backend.lengths[0] - len(PROMPTS[0]) + 4
    backend.collect()  # reading the lengths of a step in flight leaves its result to the caller that collects it
    backend.submit(1)
    backend.submit(1)
    with pytest.raises(BackendError, match="2 steps are in flight"):
        backend.submit(1)
    backend.collect()
    backend.collect()
    with pytest.raises(BackendError, match="No step was submitted"):
        backend.collect()


@settings(max_examples=15)
@given(actions=st.lists(st.sampled_from([("reset",), *[("decode", n) for n in (1, 3, 9)], ("prefill", 7), ("draft",)])))
def test_whatever_the_order_it_agrees_with_onnx_runtime(
    tiny_bundle: Bundle, tiny_engine: CompiledEngine, actions: list[tuple[object, ...]]
) -> None:
    ours = Machine(tiny_bundle, tiny_engine).backend(2)
    theirs = OnnxRuntimeBackend(tiny_bundle, rows=2, threads=1)
    theirs.reserve(128)
    rng = np.random.default_rng(len(actions))
    for backend in (ours, theirs):
        backend.step(13, {0: PROMPTS[0], 1: PROMPTS[1]})
    for action, *size in actions[:12]:
        row = int(rng.integers(2))
        draft = rng.integers(101, size=TREE.size)
        results = []
        for backend in (ours, theirs):
            if action == "reset":
                backend.reset(row)
                results.append(backend.step(9, {row: PROMPTS[2][:8]}))
            elif action == "draft":
                backend.drafts[row, 1:] = draft[1:]
                results.append(backend.step(9))
            elif action == "prefill":
                results.append(backend.step(9, {row: PROMPTS[2][: int(size[0])]}))
            else:
                results.append(backend.step(int(size[0])))
        for mine, other in pairwise(results):
            np.testing.assert_array_equal(mine.count, other.count)
            for at in range(2):
                count = int(other.count[at])
                assert mine.tokens[at, :count].tolist() == other.tokens[at, :count].tolist()
        np.testing.assert_array_equal(ours.lengths, theirs.lengths)


def test_an_engine_folder_is_loaded_like_a_bundle(
    machine: Machine, tiny_engine: CompiledEngine, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.trt.__version__ = tiny_engine.version
    monkeypatch.setattr(backend_module, "import_tensorrt", lambda flavor: machine.library)
    monkeypatch.setattr(Cuda, "open", classmethod(lambda cls, device: cls(machine.cuda, device)))
    with MedusaEngine.load(tiny_engine.folder) as engine:
        assert engine.backend.name == f"tensorrt-rtx {tiny_engine.version}, a stand-in"
        for size in (1, 5, 9):
            result = engine.generate(PROMPTS[0], max_new_tokens=40, tree_size=size)
            assert list(result.token_ids) == expected[0]
        assert engine.generate("Hi", max_new_tokens=5).text
        # 128 slots: the last one is used. Longer prompts go in chunks that the engine takes.
        longest = tiny_engine.limits.longest_sequence(TREE)
        prompt = PROMPTS[0] * 5
        result = engine.generate(prompt, max_new_tokens=longest - len(prompt), tree_size=9)
        assert len(result.token_ids) == longest - len(prompt)
        running = engine.stream(prompt, max_new_tokens=3)
        with pytest.raises(RequestError, match="--max-seq-len 129"):
            engine.generate(prompt, max_new_tokens=longest - len(prompt) + 1, tree_size=9)
        assert len(running.result().token_ids) == 3  # the refused request has not ended it
        for other in ("tensorrt", "onnxruntime"):
            with pytest.raises(BackendError, match="holds an engine of tensorrt-rtx"):
                MedusaEngine.load(tiny_engine.folder, other)
    assert not machine.cuda.blocks
    assert not machine.cuda.pinned
    assert not machine.cuda.streams
    assert not machine.cuda.graphs
    assert not machine.cuda.events


def test_steps_that_do_not_fit(machine: Machine) -> None:
    backend = machine.backend()
    for size, prompts, words in (
        (10, None, "verifies up to 9 at a time"),
        (33, {0: [1] * 33}, "larger 'medusa-export trt --max-prefill'"),
        (0, None, "step of 0 tokens"),
    ):
        with pytest.raises(BackendError, match=words):
            backend.step(size, prompts)
    for _ in range(3):
        backend.step(32, {0: [1] * 32})
    with pytest.raises(BackendError, match=r"32 tokens after 96 .* 128 slots"):
        backend.step(32, {0: [1] * 32})
    backend.step(28, {0: [1] * 28})
    backend.reset(0)
    backend.step(32, {0: [1] * 32})
    with pytest.raises(BackendError, match=r"1 to 3 sequences, not 4.*--max-batch 4"):
        machine.backend(4)
    with pytest.raises(BackendError, match=r"rows is 0: give at least 1"):
        machine.backend(0)


@pytest.mark.parametrize("drafts_shown", [False, True])
def test_a_closed_backend_touches_no_memory(machine: Machine, drafts_shown: bool) -> None:
    """An engine may share its backend with another one, which closes it."""
    backend = machine.backend(2)
    backend.step(5, {0: [1, 2, 3]})
    if drafts_shown:
        assert backend.drafts.shape == (2, 9)
    backend.close()
    calls = machine.cuda.calls.copy()
    for use in (
        lambda: backend.step(5),
        lambda: backend.drafts,
        lambda: backend.reset(0),
        lambda: backend.truncate(0, 2),
        lambda: backend.copy(0, 1, 2),
        lambda: backend.scrub(0),
        lambda: backend.assign(0, None),
        lambda: backend.set_long(0, True),
    ):
        with pytest.raises(BackendError, match="This backend is closed: load the engine again"):
            use()
    backend.close()
    assert machine.cuda.calls == calls


def test_failures_of_a_step_name_it(machine: Machine) -> None:
    backend = machine.backend(2)
    machine.trt.fails = "the tactic went missing"
    with pytest.raises(BackendError, match="step of 5 tokens over 2 rows: the tactic went missing"):
        backend.step(5, {0: [1, 2]})
    machine.cuda.fail["cudaEventSynchronize"] = cudaError_t.cudaErrorInvalidValue
    with pytest.raises(BackendError, match=r"cudaEventSynchronize gave cudaErrorInvalidValue \(1\)"):
        backend.step(5)
    backend.close()
    with pytest.raises(BackendError, match="closed"):
        backend.step(5)


@pytest.mark.parametrize("right", [pytest.param(True, marks=pytest.mark.slow), False])
def test_verify_tells_a_right_engine_from_a_wrong_one(
    tiny_bundle: Bundle,
    tiny_engine: CompiledEngine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    right: bool,
) -> None:
    model = tiny_model("llama")
    step = make_step(model.float(), random_heads(model))
    graph = None
    if not right:
        graph = Path(shutil.copytree(tiny_bundle.folder, tmp_path / "other")) / tiny_bundle.graph.name
        weights = graph.with_name("model.onnx.data")
        np.fromfile(weights, np.float32)[::-1].tofile(weights)
    machine = Machine(tiny_bundle, tiny_engine, graph)
    machine.trt.__version__ = tiny_engine.version
    monkeypatch.setattr(backend_module, "import_tensorrt", lambda flavor: machine.library)
    monkeypatch.setattr(Cuda, "open", classmethod(lambda cls, device: cls(machine.cuda, device)))
    outcome = verify_backend(
        Bundle.load(tiny_engine.folder), "tensorrt-rtx", step, PROMPTS * 2, VerifyOptions(max_new_tokens=24)
    )
    assert outcome.not_run is None
    assert [check.name.split(":")[-1].strip() for check in outcome.checks] == [
        "integers of a step", "tokens, tree size 1", "tokens, tree size 5", "tokens, tree size 9",
        "sampled tokens",
    ]  # fmt: skip
    assert all(check.compared > 50 for check in outcome.checks) or not right
    assert outcome.passed == right
    assert not machine.cuda.blocks


def test_a_bundle_is_not_an_engine(tiny_bundle: Bundle) -> None:
    with pytest.raises(BackendError, match="compile it with 'medusa-export trt'"):
        open_backend("tensorrt-rtx", tiny_bundle)
    with pytest.raises(BackendError, match="There is no backend 'cudnn'"):
        open_backend("cudnn", tiny_bundle)


@pytest.mark.parametrize("ahead", [False, True])
def test_rows_sample_as_they_do_in_onnx_runtime(machine: Machine, tiny_bundle: Bundle, ahead: bool) -> None:
    """Rows have different sampling parameters. Steps are also submitted while the last one is in flight."""
    policies = [SamplingParams(seed=1), None, SamplingParams(seed=2, temperature=2.0, top_p=0.9, acceptance="typical")]
    emitted = []
    for backend in (OnnxRuntimeBackend(tiny_bundle, rows=3, threads=1), machine.backend(3)):
        backend.reserve(128)
        for row, params in enumerate(policies):
            backend.assign(row, None if params is None else Draws(params, 13, 101))
        results = [backend.step(13, dict.fromkeys(range(3), PROMPTS[0])).emitted(row) for row in range(3)]
        under_way = 0
        for _ in range(11 if isinstance(backend, OnnxRuntimeBackend) or not ahead else 12):
            if ahead and isinstance(backend, TensorRTBackend):
                backend.submit(9)
                if under_way == 0:
                    under_way = 1
                    continue
                result = backend.collect()
            else:
                result = backend.step(9)
            results += [result.emitted(row) for row in range(3)]
        emitted.append(results)
        backend.close()
    for (tokens, logprobs, _), (wanted, expected, _) in zip(emitted[1], emitted[0], strict=True):
        assert tokens == wanted
        assert logprobs == pytest.approx(expected, abs=1e-4)
