"""The GPU check without a GPU: on ONNX Runtime's CPU provider and on the stand-in."""

from __future__ import annotations

import json
import shutil
import subprocess
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from medusa_runtime import Bundle
from medusa_runtime.backends.tensorrt import backend as backend_module
from medusa_runtime.backends.tensorrt.cuda import Cuda
from medusa_runtime.bundles.compiled import CompiledEngine
from support.decoding import make_step, random_heads
from support.machine import PROMPTS, Machine
from support.script import load_script
from support.tiny_models import tiny_model

SCRIPT = Path(__file__).parents[2] / "scripts/gpu_check.sh"


@pytest.fixture(scope="module")
def gpu_check() -> Any:
    return load_script("gpu_check")


def test_a_report(gpu_check: Any, tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "TOKENS", 16)
    model = tiny_model("llama")
    step = make_step(model, random_heads(model))
    found = gpu_check.check("onnxruntime", tiny_bundle, step, PROMPTS * 2, tmp_path)
    assert found["agrees"] and found["compared"] > 100
    assert list(found["step_ms"]) == [1, 2, 4, 8]
    assert min(found["tokens_per_second"].values()) > 0
    report = {
        "machine": gpu_check.machine(),
        "bundle": "tiny",
        "backends": {"onnxruntime": found, "tensorrt": {"refused": "no GPU at all"}},
        "transformers": gpu_check.transformers_speed(model, PROMPTS, tiny_bundle),
    }
    report["backends"]["replaying"] = {**found, "enqueued_step_ms": dict.fromkeys(found["step_ms"], 12.5)}
    text = gpu_check.as_markdown(json.loads(json.dumps(report)))
    assert "| onnxruntime | yes |" in text
    assert "| nodes | 1 | 2 | 4 | 8 |" in text
    assert text.count("| without CUDA graphs, ms | 12.50 | 12.50 | 12.50 | 12.50 |") == 1
    assert "Refused: no GPU at all" in text
    assert "- torch 2" in text


def test_transformers_ends_where_the_bundle_does(
    gpu_check: Any, tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check, "TOKENS", 16)
    model = tiny_model("llama")
    bundle = replace(tiny_bundle, model=replace(tiny_bundle.model, eos_token_ids=(7, 9)))
    gpu_check.transformers_speed(model, PROMPTS[:1], bundle)
    assert model.generation_config.eos_token_id == [7, 9]


def ran(folder: Path, *, gpu_package: bool) -> tuple[list[str], str]:
    """The packages that ``gpu_check.sh`` asks pip for on a machine with a GPU, and its output. Nothing is installed."""
    stubs = {
        "nvidia-smi": "exit 0",
        "pip": f'echo "$@" >> pip.log; [[ {int(gpu_package)} = 1 || "$*" != *onnxruntime-gpu* ]]',
        "medusa-export": "exit 0",
        "python": "exit 0",
        "scripts/smollm2.sh": "echo model",
        "scripts/setup.sh": 'cd "$(dirname "${BASH_SOURCE[0]}")/.."; PATH=$PWD:$PATH',
    }
    (folder / "scripts").mkdir(parents=True)
    for name, body in stubs.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (folder / name).chmod(0o755)
    script = Path(shutil.copy(SCRIPT, folder / "scripts"))
    outcome = subprocess.run(["bash", str(script)], capture_output=True, text=True, check=True)
    return (folder / "pip.log").read_text().splitlines(), outcome.stderr


def test_the_package_for_gpus_has_a_version_of_its_own(tmp_path: Path) -> None:
    """The package for GPUs may lack the version of the package for CPUs."""
    asked, words = ran(tmp_path / "there", gpu_package=True)
    assert asked[-1] == "install --quiet --constraint constraints.txt onnxruntime-gpu[cuda,cudnn]"
    assert "note:" not in words
    asked, words = ran(tmp_path / "missing", gpu_package=False)
    assert asked[-1] == "install --quiet --constraint constraints.txt onnxruntime"
    assert "note: no onnxruntime-gpu; ONNX Runtime runs on the CPU only" in words
    root = SCRIPT.parents[1]
    pinned = [
        line for line in (root / "constraints.txt").read_text().splitlines() if line.startswith("onnxruntime-gpu")
    ]
    extra = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]["gpu"]
    (wanted,) = map(Requirement, extra)
    assert len(pinned) == 1
    assert wanted.specifier.contains(pinned[0].partition("==")[2])


def test_the_host_gap_is_taken_from_steps_submitted_ahead(
    gpu_check: Any, tiny_bundle: Bundle, tiny_engine: CompiledEngine
) -> None:
    machine = Machine(tiny_bundle, tiny_engine)
    backend = machine.backend()
    assert isinstance(gpu_check.host_gap(backend, PROMPTS[0]), float)
    assert len(machine.trt.executed) == 1 + gpu_check.WARM_UP + 2 * gpu_check.REPEATS + 1
    backend.close()


def test_steps_are_timed_without_graphs_too(
    gpu_check: Any, tiny_engine: CompiledEngine, tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(tiny_bundle, tiny_engine)
    machine.trt.__version__ = tiny_engine.version
    monkeypatch.setattr(backend_module, "import_tensorrt", lambda flavor: machine.library)
    monkeypatch.setattr(Cuda, "open", classmethod(lambda cls: cls(machine.cuda)))
    monkeypatch.setattr(gpu_check, "REPEATS", 12)  # 128 slots have room for these
    times = gpu_check.enqueued_step_times(Bundle.load(tiny_engine.folder), PROMPTS[0][:4])
    assert list(times) == [1, 2, 4, 8]
    assert machine.cuda.calls["cudaStreamBeginCapture"] == machine.cuda.calls["cudaGraphLaunch"] == 0
    assert not machine.cuda.blocks
