"""The engine: requests, streams, statistics, and refused options."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

import medusa_runtime
from medusa_runtime import BackendError, Bundle, BundleError, MedusaEngine, RequestError, errors
from medusa_runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from medusa_runtime.bundles.bundle import DESCRIPTION, ONNXRUNTIME_BATCH_GRAPH
from medusa_runtime.bundles.contract import CONTRACT_VERSION
from medusa_runtime.decoding.latency import CACHE_FILE
from support.decoding import TREE, greedy
from support.stock import Stock
from support.tiny_models import tiny_model

PROMPT = [(7 * i * i + 3) % 101 for i in range(13)]


@pytest.fixture(scope="module")
def engine(tiny_bundle: Bundle) -> MedusaEngine:
    return MedusaEngine.load(tiny_bundle.folder, threads=1)


def test_all_sizes_and_chunks_give_the_tokens_of_transformers(engine: MedusaEngine) -> None:
    expected = tuple(greedy(tiny_model("llama"), PROMPT, 40))
    for size in range(1, 10):
        for chunk in (1, 5, 512):
            result = engine.generate(PROMPT, max_new_tokens=40, tree_size=size, prefill_chunk=chunk)
            assert result.token_ids == expected
            assert result.stats.tree_sizes == {size: result.stats.steps}
            assert result.stats.nodes_per_step == size
            assert sum(n * times for n, times in result.stats.accepted_lengths.items()) >= 39
            assert result.stats.steps == sum(result.stats.accepted_lengths.values())


def test_kinds_of_prompts(engine: MedusaEngine) -> None:
    text = engine.generate("Hi", max_new_tokens=6)
    assert engine.generate(engine.tokenizer.encode("Hi"), max_new_tokens=6).token_ids == text.token_ids
    assert engine.generate(np.array(engine.tokenizer.encode("Hi")), max_new_tokens=6).token_ids == text.token_ids
    chat = engine.generate([{"role": "user", "content": "Hi"}], max_new_tokens=6)
    assert chat.token_ids == engine.generate("[user]Hi\n[assistant]", max_new_tokens=6).token_ids


def test_a_stream_adds_up_to_the_result(engine: MedusaEngine) -> None:
    stream = engine.stream("Hello", max_new_tokens=20, tree_size=9)
    chunks = list(stream)
    result = stream.result()
    assert "".join(chunk.text for chunk in chunks) == result.text
    assert tuple(token for chunk in chunks for token in chunk.token_ids) == result.token_ids
    assert result.finish_reason == "length"
    assert len(result.token_ids) == result.stats.completion_tokens == 20


def test_stops(engine: MedusaEngine) -> None:
    whole = engine.generate("Hello", max_new_tokens=30, tree_size=1)
    for size in (1, 9):
        stop = whole.text[7:9]
        result = engine.generate("Hello", max_new_tokens=30, tree_size=size, stop=[stop])
        assert result.finish_reason == "stop"
        assert result.text == whole.text[: whole.text.index(stop)]
        token = whole.token_ids[5]
        result = engine.generate("Hello", max_new_tokens=30, tree_size=size, stop_token_ids=[token])
        assert result.token_ids == whole.token_ids[: whole.token_ids.index(token) + 1]


def test_a_stream_that_was_overtaken_says_so(engine: MedusaEngine) -> None:
    first = engine.stream("Hello", max_new_tokens=20)
    next(first)
    second = engine.stream("World", max_new_tokens=5)
    with pytest.raises(RequestError, match="begun another request"):
        next(first)
    assert second.result().token_ids == engine.generate("World", max_new_tokens=5).token_ids
    waiting = engine.stream("Hello", max_new_tokens=5)
    engine.generate("World", max_new_tokens=1)
    for _ in range(2):  # a stream that failed raises its error on each call
        with pytest.raises(RequestError, match="begun another request"):
            next(waiting)
        with pytest.raises(RequestError, match="begun another request"):
            waiting.result()


def test_a_stream_that_failed_is_no_answer(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = MedusaEngine.load(tiny_bundle.folder, threads=1)
    for error in (BackendError("broken"), KeyboardInterrupt()):
        stream = engine.stream(PROMPT, max_new_tokens=50, tree_size=4)
        next(stream)

        def fail(*_: object, error: BaseException = error) -> None:
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(engine.backend, "step", fail)
            with pytest.raises(type(error)):
                next(stream)
        for _ in range(2):
            with pytest.raises(BackendError if error.args else RequestError):
                stream.result()


def test_a_refused_request_leaves_a_stream_alone(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = MedusaEngine.load(tiny_bundle.folder, threads=1)
    expected = engine.generate(PROMPT, max_new_tokens=30, tree_size=4).token_ids
    stream = engine.stream(PROMPT, max_new_tokens=30, tree_size=4)
    next(stream)
    for options in ({"prefill_chunk": 0}, {"tree_size": 99}, {"max_new_tokens": 0}):
        with pytest.raises(RequestError):
            engine.stream("Hi", **options)
    assert stream.result().token_ids == expected

    def fail(*_: object, **__: object) -> None:
        raise BackendError("broken")

    for name, call in (("assign", lambda: engine.stream("Hi")), ("reserve", engine.measure)):
        stream = engine.stream(PROMPT, max_new_tokens=30, tree_size=4)
        next(stream)
        with monkeypatch.context() as patch:
            patch.setattr(engine.backend, name, fail)
            patch.setattr("medusa_runtime.decoding.latency._read", lambda *_: {})
            with pytest.raises(BackendError, match="broken"):
                call()
        with pytest.raises(RequestError, match="begun another request"):
            stream.result()
    assert engine.generate(PROMPT, max_new_tokens=30, tree_size=4).token_ids == expected


def test_a_closed_engine_says_so(tiny_bundle: Bundle) -> None:
    engine = MedusaEngine.load(tiny_bundle.folder, threads=1)
    engine.generate(PROMPT, max_new_tokens=3)
    engine.close()
    engine.close()
    with pytest.raises(RequestError, match="closed"):
        engine.generate(PROMPT, max_new_tokens=3)
    with pytest.raises(BackendError, match="closed"):
        engine.backend.step(1)


def test_a_stream_that_is_too_late_takes_no_memory(tiny_bundle: Bundle) -> None:
    engine = MedusaEngine.load(tiny_bundle.folder, threads=1)
    stream = engine.stream(PROMPT, max_new_tokens=3)
    engine.close()
    with pytest.raises(RequestError, match="closed"):
        next(stream)
    assert engine.backend.capacity == 0


@pytest.mark.parametrize(
    ("prompt", "options", "words"),
    [
        ("", {}, "prompt is empty"),
        ([], {}, "prompt is empty"),
        ([101], {}, "from 0 to 100"),
        ([1.5], {}, "from 0 to 100"),
        ([True], {}, "from 0 to 100"),
        ("x" * 600, {}, "exceed the 512 tokens"),
        ("Hi", {"max_new_tokens": 511}, "exceed the 512 tokens"),
        ("Hi", {"max_new_tokens": 0}, "max_new_tokens is 0: expected an integer of at least 1"),
        ("Hi", {"max_new_tokens": "5"}, "max_new_tokens is '5'"),
        ("Hi", {"max_new_tokens": True}, "max_new_tokens is True"),
        ("Hi", {"stop_token_ids": [1.0]}, "stop_token_ids is 1.0"),
        ("Hi", {"tree_size": 0}, "1 to 9"),
        ("Hi", {"tree_size": 10}, "1 to 9"),
        ("Hi", {"prefill_chunk": 0}, "prefill_chunk is 0: expected an integer of at least 1"),
    ],
)
def test_unusable_requests(engine: MedusaEngine, prompt: object, options: dict[str, object], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        engine.stream(prompt, **options)


def test_caches_are_as_large_as_needed(tiny_bundle: Bundle) -> None:
    """No step may write beyond the capacity, as ONNX Runtime doesn't check it."""
    engine = MedusaEngine.load(tiny_bundle.folder, threads=1)
    backend, depth = engine.backend, TREE.max_depth
    step = backend.step

    def checked(size: int, *others: object) -> object:
        assert depth + int(backend.lengths[0]) + size <= backend.capacity
        return step(size, *others)

    backend.step = checked
    rng = np.random.default_rng(0)
    for _ in range(40):
        prompt = rng.integers(1, 101, rng.integers(1, 60)).tolist()
        options = {
            "max_new_tokens": int(rng.integers(1, 60)),
            "tree_size": int(rng.integers(1, 10)),
            "prefill_chunk": int(rng.integers(1, 70)),
        }
        needed = backend.capacity
        engine.generate(prompt, **options)
        assert backend.capacity <= max(needed, len(prompt) + options["max_new_tokens"] + 3 * 64 + 2 * depth)
    # Also at the end of the positions.
    assert len(engine.generate([5] * 500, max_new_tokens=12, tree_size=9).token_ids) == 12


def test_without_a_tokenizer(stock: Stock) -> None:
    engine = MedusaEngine.load(stock.export(heads=False).bundle.folder)
    result = engine.generate(PROMPT, max_new_tokens=5)
    assert len(result.token_ids) == 5
    assert result.text == ""
    with pytest.raises(RequestError, match="no tokenizer"):
        engine.generate("Hi")
    with pytest.raises(RequestError, match="stop_token_ids"):
        engine.generate(PROMPT, stop=["x"])


def test_auto_measures_once_and_keeps_it(tiny_bundle: Bundle, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_bundle.folder, tmp_path / "bundle"))
    (folder / CACHE_FILE).unlink(missing_ok=True)
    with MedusaEngine.load(folder, threads=1, measure=False) as engine:
        assert set(engine.generate(PROMPT, max_new_tokens=3).stats.tree_sizes) == {1}
        assert not (folder / CACHE_FILE).exists()
    with MedusaEngine.load(folder, threads=1) as engine:
        assert (folder / CACHE_FILE).exists()  # before the first request
    (known,) = json.loads((folder / CACHE_FILE).read_text()).values()
    assert {"1", "2"} <= set(known) <= {"1", "2", "3", "4", "6", "8", "9"}  # the sizes that are not too slow
    (folder / CACHE_FILE).write_text(
        json.dumps({k: dict.fromkeys(known, 1.0) for k in json.loads((folder / CACHE_FILE).read_text())})
    )
    with MedusaEngine.load(folder, threads=1, measure=False) as engine:  # now all sizes take equally long
        stats = engine.generate(PROMPT, max_new_tokens=3).stats
        assert set(stats.tree_sizes) == {max(map(int, known))}


@pytest.mark.parametrize("kept", [None, "slow", {}, {"2": 1.0}, {"1": "slow"}, {"1": 0.0}, {"1": 1.0, "two": 1.0}])
def test_a_damaged_measurement_is_made_again(tiny_bundle: Bundle, tmp_path: Path, kept: object) -> None:
    folder = Path(shutil.copytree(tiny_bundle.folder, tmp_path / "bundle"))
    with MedusaEngine.load(folder, threads=1) as engine:
        expected = engine.generate(PROMPT, max_new_tokens=3).token_ids
    path = folder / CACHE_FILE
    path.write_text(json.dumps(dict.fromkeys(json.loads(path.read_text()), kept)))
    with MedusaEngine.load(folder, threads=1) as engine:
        assert engine.generate(PROMPT, max_new_tokens=3).token_ids == expected
    assert all({"1", "2"} <= set(table) for table in json.loads(path.read_text()).values())


def edit(folder: Path, **changes: object) -> None:
    path = folder / DESCRIPTION
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_unusable_bundles(tiny_bundle: Bundle, tmp_path: Path) -> None:
    def fresh(name: str) -> Path:
        return Path(shutil.copytree(tiny_bundle.folder, tmp_path / name))

    with pytest.raises(BundleError, match="There is no bundle at"):
        Bundle.load(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BundleError, match=r"has no medusa\.json"):
        Bundle.load(tmp_path / "empty")
    folder = fresh("digest")
    data = bytearray((folder / "model.onnx.data").read_bytes())
    data[100] ^= 1
    (folder / "model.onnx.data").write_bytes(data)
    with pytest.raises(BundleError, match="does not match the digest"):
        Bundle.load(folder)
    folder = fresh("short")
    (folder / "model.onnx").write_bytes((folder / "model.onnx").read_bytes()[:-10])
    with pytest.raises(BundleError, match="altered or cut off"):
        Bundle.load(folder)
    folder = fresh("missing")
    (folder / "model.onnx.data").unlink()
    with pytest.raises(BundleError, match=r"lacks its file model\.onnx\.data"):
        Bundle.load(folder)
    folder = fresh("newer")
    edit(folder, contract_version=CONTRACT_VERSION + 1)
    with pytest.raises(BundleError, match="version"):
        Bundle.load(folder)
    acceptance = {"source": "calibrated", "node_values": [1.0] * 9}
    for values, words in (({"node_values": [1.0]}, "'node_values' holds 1 values for a tree of 9 nodes"),
                          ({"guessed_values": [1.0] * 8}, "'guessed_values' holds 8"),
                          ({"guess_share": "half"}, "guess_share': expected `float`, got `str`")):  # fmt: skip
        folder = fresh(next(iter(values)))
        edit(folder, acceptance=acceptance | values)
        with pytest.raises(BundleError, match=words):
            Bundle.load(folder)
    folder = fresh("json")
    (folder / DESCRIPTION).write_text((folder / DESCRIPTION).read_text()[:-40])
    with pytest.raises(BundleError, match="not valid JSON"):
        Bundle.load(folder)
    files = json.loads((tiny_bundle.folder / DESCRIPTION).read_text())["files"]
    for name in ("../secret", "/etc/passwd", "a\\..\\b"):
        folder = fresh(f"escape{len(name)}")
        edit(folder, files={**files, name: {"size": 1, "sha256": "0"}})
        with pytest.raises(BundleError, match="outside"):
            Bundle.load(folder)
    folder = fresh("link")
    (tmp_path / "elsewhere").write_bytes((folder / "model.onnx").read_bytes())
    (folder / "model.onnx").unlink()
    (folder / "model.onnx").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match="leads outside the folder"):
        Bundle.load(folder, check_digests=False)
    assert Bundle.load(folder).files == tiny_bundle.files
    for key in ("model", "dtype", "tree", "files", "inputs"):
        folder = fresh(f"without-{key}")
        edit(folder, **{key: None})
        with pytest.raises(BundleError):
            Bundle.load(folder)


CLEAN = """
import sys
from medusa_runtime import MedusaEngine
engine = MedusaEngine.load(sys.argv[1], threads=1)
print(engine.generate("Hello", max_new_tokens=4, tree_size=4).token_ids)
print(sorted(name for name in ("torch", "transformers", "onnx", "medusa_export") if name in sys.modules))
"""


def test_the_runtime_imports_neither_torch_nor_transformers(tiny_bundle: Bundle, engine: MedusaEngine) -> None:
    command = [sys.executable, "-c", CLEAN, str(tiny_bundle.folder)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert output[1] == "[]"
    assert output[0] == str(engine.generate("Hello", max_new_tokens=4).token_ids)


def test_public_surface() -> None:
    for name in medusa_runtime.__all__:
        assert getattr(medusa_runtime, name) is not None
    assert {"MedusaEngine", "GenerationResult", "Bundle", "MedusaError"} <= set(medusa_runtime.__all__)


def test_every_error_is_public() -> None:
    raised = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, Exception)}
    assert raised == {name for name in medusa_runtime.__all__ if name.endswith("Error")}


STEPS = """
import sys
import numpy as np
import onnxruntime
from medusa_runtime import Bundle
from medusa_runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
bundle = Bundle.load(sys.argv[1])
onnxruntime.set_default_logger_severity(2)
backend = OnnxRuntimeBackend(bundle, threads=1, graph=bundle.graph)
backend.reserve(64)
if sys.argv[2] == "elsewhere":
    other = onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros((1, 2, backend.capacity, 16), np.float32))
    backend.step(9, {0: [1, 2, 3]})
    next(iter(backend._bindings.values())).values.bind_ortvalue_output("present_key_0", other)
backend.step(9, {0: [1, 2, 3]})
for size in (1, 9):
    backend.step(size)
"""


def test_caches_are_written_in_place(tiny_bundle: Bundle) -> None:
    """ONNX Runtime warns when it has to copy a cache."""
    logs = {}
    for where in ("in place", "elsewhere"):
        command = [sys.executable, "-c", STEPS, str(tiny_bundle.folder), where]
        logs[where] = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert "copy" not in logs["in place"].lower()
    assert "copy" in logs["elsewhere"].lower()


def test_which_graph_runs_how_many_rows(tiny_bundle: Bundle) -> None:
    def operators(rows: int, bundle: Bundle = tiny_bundle) -> set[str]:
        backend = OnnxRuntimeBackend(bundle, rows=rows, threads=1)
        assert not backend._state.pending or rows > 1
        path = Path(backend._session._model_path)
        return {node.op_type for node in onnx.load(path, load_external_data=False).graph.node}

    assert "GroupQueryAttention" in operators(1)
    assert "MultiHeadAttention" in operators(2)
    files = {name: facts for name, facts in tiny_bundle.files.items() if name != ONNXRUNTIME_BATCH_GRAPH}
    assert "Attention" in operators(2, dataclasses.replace(tiny_bundle, files=files))
