"""The command ``trt``: engine folders that it writes, requests that it refuses, and failures that it reports."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import onnx
import pytest
import torch

from medusa_export.common.errors import EngineBuildError
from medusa_export.targets.tensorrt.build import write_engine
from medusa_export.targets.tensorrt.builder import EngineBuilder
from medusa_export.targets.tensorrt.messages import build_error, remedy
from medusa_export.targets.tensorrt.options import BuildOptions, check_targets, known_targets
from medusa_export.targets.tensorrt.rewrites.pipeline import TENSORRT, TensorrtGraph, graph_for_tensorrt
from medusa_runtime import BackendError, Bundle, BundleError
from medusa_runtime.backends.tensorrt import library as libraries
from medusa_runtime.backends.tensorrt.library import import_tensorrt
from medusa_runtime.bundles.bundle import DESCRIPTION
from medusa_runtime.bundles.compiled import ENGINE, CompiledEngine, EngineLimits
from medusa_runtime.bundles.contract import CONTRACT_VERSION
from support.cli import run
from support.decoding import TREE
from support.interrupts import interrupt


@pytest.mark.slow
def test_the_command_writes_all_that_a_service_needs(tiny_bundle: Bundle, tmp_path: Path) -> None:
    out = tmp_path / "engine"
    arguments = ("trt", tiny_bundle.folder, "-o", out, "--target", "sm80,sm_89", "--max-seq-len", 64, "--opt-level", 0)
    code, output = run(*arguments)
    assert code == 0, output
    assert "for sm80, sm89; up to 4 sequences of 53 tokens" in output
    assert "weights and caches are fp32" in output
    engine = CompiledEngine.load(out)
    assert engine.targets == ("sm80", "sm89")
    assert (engine.flavor, engine.limits) == ("tensorrt-rtx", EngineLimits(4, 64, 60))
    assert [profile.name for profile in engine.profiles] == ["decode", "prefill"]
    assert engine.profiles[0].sequence == (1, 9, 9)
    opened = Bundle.load(out)
    assert opened.tree == TREE
    assert opened.model == tiny_bundle.model
    assert {"tokenizer.json", DESCRIPTION, ENGINE} <= set(engine.files)
    assert not list(out.glob("model.onnx*"))
    data = json.loads((out / "engine.json").read_text())
    assert data["network_layers"]["total"] == sum(engine.layers.values()) > 100
    assert data["rewrites"] == dict(engine.rewrites) and engine.rewrites["pick_parts"] > 0
    assert list(engine.rewrites) == [rewrite.name for rewrite in TENSORRT.rewrites]
    assert data["bundle"]["files"]["model.onnx"] == tiny_bundle.files["model.onnx"].sha256
    code, output = run("inspect", out)
    assert code == 0
    assert "pick_parts" in output
    assert "tensorrt-rtx" in output and "up to 4 sequences of 53 tokens, 60 per step" in output
    assert json.loads(run("inspect", out, "--json")[1])["engine"] == data
    code, output = run(*arguments)
    assert code == 1
    assert "There is an engine at" in output and "--overwrite" in output
    options = ("--target", "sm89", "--opt-level", 0, "--overwrite", "-q")
    assert run("trt", tiny_bundle.folder, "-o", out, *options) == (0, "")
    assert CompiledEngine.load(out).targets == ("sm89",)
    code, output = run("trt", out, "-o", tmp_path / "again", "--target", "sm89")
    assert code == 1
    assert "holds an engine, which has no graph" in output
    code, output = run("trt", tiny_bundle.folder, "-o", tiny_bundle.folder, "--overwrite", "--target", "sm89")
    assert code == 1
    assert "holds other files and no engine" in output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--target", "sm90"), "can't build for 'sm90': it knows sm75, sm80"),
        (("--target", "ampere"), "can't build for 'ampere'"),
        (("--target", "sm89", "--max-seq-len", "11"), "--max-seq-len 11 is smaller than a step: the tree has 9 nodes"),
        (("--target", "sm89", "--max-prefill", "8"), "--max-prefill 8 is smaller than the tree of 9"),
        (("--target", "sm89", "--max-prefill", "62", "--max-seq-len", "64"), "Give at most 60"),
        (("--flavor", "tensorrt", "--target", "sm89"), "pip install 'medusa-export[tensorrt]'"),
        (("--target", "sm89", "--timing-cache", "cache"), "does nothing with a timing cache"),
        (("--target", "sm89", "--timing-cache", "cache"), "Drop --timing-cache."),
    ],
)
def test_what_can_not_be_built(tiny_bundle: Bundle, tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    code, output = run("trt", tiny_bundle.folder, "-o", tmp_path / "out", *arguments)
    assert code != 0
    assert words in output
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to build for")
def test_without_a_gpu_a_target_is_needed(tiny_bundle: Bundle, tmp_path: Path) -> None:
    code, output = run("trt", tiny_bundle.folder, "-o", tmp_path / "out", "-q")
    assert code == 1
    assert "--target: sm75, sm80" in output
    assert not list(tmp_path.iterdir())


def test_which_flavor(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "tensorrt-rtx" in libraries.installed_flavors()
    monkeypatch.setattr(libraries, "installed_flavors", lambda: ["tensorrt", "tensorrt-rtx"])
    with pytest.raises(BackendError, match="are both installed: choose one with `flavor`"):
        import_tensorrt()
    assert import_tensorrt("tensorrt-rtx").version
    monkeypatch.setattr(libraries, "installed_flavors", list)
    with pytest.raises(BackendError, match="TensorRT is not installed"):
        import_tensorrt()
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(BackendError, match=r"medusa-export\[tensorrt-rtx\]"):
        import_tensorrt("tensorrt-rtx")


@pytest.mark.slow
def test_a_timing_cache(tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands for a flavor that measures kernels; TensorRT-RTX, in its place here, has the same calls and ignores it."""
    library = libraries.TensorRTLibrary("tensorrt", import_tensorrt("tensorrt-rtx").trt)
    path = tmp_path / "cache"
    options = BuildOptions(EngineLimits(1, 64, 16), ("sm89",), opt_level=0, timing_cache=path)
    write_engine(library, tiny_bundle, options, tmp_path / "engine")
    assert path.stat().st_size > 0
    assert CompiledEngine.load(tmp_path / "engine").flavor == "tensorrt"
    builder = EngineBuilder(library, tiny_bundle, options)
    builder._config()  # reads it again
    for answers in ({"create_timing_cache.return_value": None}, {"set_timing_cache.return_value": False}):
        config = Mock(**answers)
        builder._builder = Mock(**{"create_builder_config.return_value": config})
        builder.log.errors[:] = ["Skipping timing cache: it is of another device."]
        with pytest.raises(EngineBuildError, match=r"cache can't be used: .* of another device") as raised:
            builder._config()
        assert "delete it or give another file" in str(raised.value.remedy)
    folder = replace(options, timing_cache=tmp_path)
    with pytest.raises(EngineBuildError, match="can't be read"):
        EngineBuilder(library, tiny_bundle, folder)._config()


def test_a_flavor_that_builds_for_the_gpu_at_hand_only() -> None:
    class Config:
        pass

    class Module:
        IBuilderConfig = Config
        __version__ = "10.15"

    library = libraries.TensorRTLibrary("tensorrt", Module)
    assert known_targets(library) == ()
    with pytest.raises(EngineBuildError, match="drop `targets`"):
        check_targets(library, ["sm89"])


def test_a_refused_node_is_named(tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(bundle: Bundle, capacity: int) -> TensorrtGraph:
        model = onnx.load_from_string(graph_for_tensorrt(bundle, capacity).data)
        node = next(node for node in model.graph.node if node.op_type == "Softmax" or node.op_type == "Sigmoid")
        node.op_type, node.name = "Bernoulli", "the_odd_one"
        return TensorrtGraph(model.SerializeToString(), {})

    monkeypatch.setattr("medusa_export.targets.tensorrt.builder.graph_for_tensorrt", spoil)
    code, output = run("trt", tiny_bundle.folder, "-o", tmp_path / "out", "--target", "sm89", "-q")
    assert code == 1
    assert "'the_odd_one' (Bernoulli)" in output
    assert "doesn't know the operator: update it" in output
    assert not list(tmp_path.iterdir())


def test_builder_failures_name_the_node_and_the_remedy(tiny_bundle: Bundle) -> None:
    """Chunks longer than the caches: ``choose_limits`` refuses them, so the builder is asked directly."""
    limits = EngineLimits(max_batch=2, capacity=32, max_prefill=64)
    builder = EngineBuilder(import_tensorrt("tensorrt-rtx"), tiny_bundle, BuildOptions(limits, ("sm89",)))
    with pytest.raises(EngineBuildError, match="Raise `max_seq_len`, or lower `max_prefill`") as raised:
        builder.build()
    assert raised.value.node is not None and "cache_scatter" in raised.value.node
    for said, helps in (
        ("cudaError 35: CUDA driver version is insufficient", "update the driver"),
        ("Requested amount of GPU memory could not be allocated: out of memory", "lower `max_batch` or `max_seq_len`"),
        ("Cuda Runtime (cudaError 2: out of memory)", "lower `max_batch` or `max_seq_len`"),
        ("Timing cache data is corrupted", "delete it, or give another file"),
    ):
        assert helps in str(remedy(said))
    assert build_error([], ()).remedy is None
    driver = "[checkMacros.cpp::catchCudaError::250] Error Code 1 (cudaError 35: CUDA driver version is insufficient)"
    refused = build_error([f"the node is odd\n{driver}"], ["node"])
    assert refused.remedy is None and "driver" not in str(refused)


def test_engines_that_were_altered(tiny_engine: CompiledEngine, tmp_path: Path) -> None:
    def spoiled(name: str) -> Path:
        return Path(shutil.copytree(tiny_engine.folder, tmp_path / name))

    cut = spoiled("cut")
    with (cut / ENGINE).open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(BundleError, match="altered or cut off"):
        CompiledEngine.load(cut, check_digests=False)
    flipped = spoiled("flipped")
    data = bytearray((flipped / ENGINE).read_bytes())
    data[5000] ^= 1
    (flipped / ENGINE).write_bytes(data)
    with pytest.raises(BundleError, match="does not match the digest"):
        CompiledEngine.load(flipped)
    for name, change, words in (
        ("newer", {"contract_version": CONTRACT_VERSION + 1}, f"follows contract version {CONTRACT_VERSION + 1}"),
        ("older", {"contract_version": 2}, f"knows versions 3 to {CONTRACT_VERSION}"),
        ("other", {"bundle": {"sha256": "0" * 64}}, "was built from another bundle"),
        ("less", {"limits": {"max_batch": 1}}, "'limits.capacity' is missing"),
        (
            "shapes",
            {"profiles": [{"name": "decode", "batch": [1], "sequence": [1, 2, 3]}]},
            "batch': expected `array` of length 3",
        ),
    ):
        folder = spoiled(name)
        description = json.loads((folder / "engine.json").read_text())
        (folder / "engine.json").write_text(json.dumps({**description, **change}))
        with pytest.raises(BundleError, match=words):
            CompiledEngine.load(folder)
    (cut / "engine.json").write_text("{")
    with pytest.raises(BundleError, match="not valid JSON"):
        CompiledEngine.load(cut)
    assert CompiledEngine.load(tiny_engine.folder) == replace(tiny_engine)


@pytest.mark.slow
@pytest.mark.parametrize("overwrite", [True, False])
def test_an_interrupted_build_leaves_nothing(
    tiny_bundle: Bundle, tiny_engine: CompiledEngine, tmp_path: Path, overwrite: bool
) -> None:
    """And what was there as it was."""
    out = tmp_path / "out"
    command = ["trt", str(tiny_bundle.folder), "-o", str(out), "--target", "sm89"]
    if overwrite:
        shutil.copytree(tiny_engine.folder, out)
        command.append("--overwrite")
    returncode, errors = interrupt(command, at=["building for"])
    assert returncode != 0
    assert "Traceback" not in errors
    assert "Aborted" in errors
    assert list(tmp_path.iterdir()) == ([out] if overwrite else [])
    if overwrite:
        assert CompiledEngine.load(out) == replace(tiny_engine, folder=out)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, so it is run")
def test_verify_says_that_it_was_not_run(tiny_model_folder: Path, untrained_bundle: Bundle, tmp_path: Path) -> None:
    """Exit code 3, in every report, and no failure."""
    bundle, engine = untrained_bundle.folder, tmp_path / "engine"
    assert run("trt", bundle, "-o", engine, "--target", "sm89", "--opt-level", 0, "-q") == (0, "")
    reports = tmp_path / "report.json", tmp_path / "report.xml"
    for folder, backend, words in (
        (engine, "tensorrt-rtx", "CUDA failed while looking for a GPU"),
        (engine, "tensorrt", "holds an engine of tensorrt-rtx"),
        (bundle, "onnxruntime-cuda", "has no CUDAExecutionProvider"),
    ):
        code, output = run(
            "verify", folder, "--model", tiny_model_folder, "--backend", backend, "-q",
            "--json", reports[0], "--junit", reports[1],
        )  # fmt: skip
        assert code == 3
        assert output.startswith("not run: ") and words in output
        report = json.loads(reports[0].read_text())
        assert report["passed"] is False and words in report["not_run"]
        assert "<skipped" in reports[1].read_text() and "<failure" not in reports[1].read_text()
    code, output = run("verify", engine, "--model", tiny_model_folder, "-q")
    assert code == 1
    assert "holds an engine, which has no graph" in output


def test_a_builder_that_is_collected_while_another_is_made_stops_nothing(tiny_bundle: Bundle) -> None:
    """In a process of its own: without a pause of garbage collection, TensorRT waits for its own lock forever."""
    program = """
import sys
from medusa_export.targets.tensorrt import builder
from medusa_export.targets.tensorrt.options import BuildOptions
from medusa_runtime import Bundle
from medusa_runtime.backends.tensorrt.library import import_tensorrt
from medusa_runtime.bundles.compiled import EngineLimits

library, bundle = import_tensorrt("tensorrt-rtx"), Bundle.load(sys.argv[1])
options = BuildOptions(EngineLimits(max_batch=1, capacity=64, max_prefill=16), ("sm89",))
first = [builder.EngineBuilder(library, bundle, options)]
called = []

class Log(library.trt.ILogger):
    def log(self, severity, text):
        called.append(text)
        garbage, kept = list(first), []
        first.clear()
        garbage.append(garbage)
        del garbage
        kept += ([] for _ in range(100_000))  # enough for a collection

builder.error_log = lambda *_, **__: Log()
builder.EngineBuilder(library, bundle, options)
assert called
"""
    subprocess.run([sys.executable, "-c", program, str(tiny_bundle.folder)], check=True, timeout=120)
