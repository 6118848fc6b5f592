"""The GPU check without a GPU: its stages as a dry run, and its checks on the stand-in."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement

from gpu_stages import backends, report, torch_exact, torch_steps
from gpu_stages.context import Context
from medusa_runtime import Bundle
from medusa_runtime.backends.tensorrt import backend as backend_module
from medusa_runtime.backends.tensorrt.cuda import Cuda
from medusa_runtime.bundles.compiled import CompiledEngine
from support.machine import PROMPTS, Machine
from support.script import load_script
from support.tiny_models import tiny_model

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts/gpu_check.sh"


@pytest.fixture(scope="module")
def gpu_check() -> Any:
    return load_script("gpu_check")


@pytest.mark.long
@pytest.mark.slow
def test_every_stage_runs_without_a_gpu(gpu_check: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The dry run with small sizes. One stage has a process of its own, under its time limit; the others run here."""
    supervise = gpu_check.supervise

    def run_here(name: str, options: argparse.Namespace, ends: float) -> dict[str, Any]:
        if name == "export":
            return supervise(name, options, ends)
        started = time.monotonic()
        with torch.set_grad_enabled(True):  # a stage may change it for its whole process
            gpu_check.run_stage(argparse.Namespace(**{**vars(options), "run": name}))
        found = json.loads((tmp_path / f"{name}.json").read_text())
        found |= {"wall_seconds": time.monotonic() - started, "limit": gpu_check.STAGES[name].dry_limit}
        (tmp_path / f"{name}.json").write_text(json.dumps(found))
        return found

    monkeypatch.setattr(gpu_check, "supervise", run_here)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--device", "cpu", "--seconds", "0.2", "--out", str(tmp_path)])
    assert gpu_check.main() == 0
    found = json.loads((tmp_path / "gpu_check.json").read_text())
    assert list(found["stages"]) == list(gpu_check.STAGES)
    stages = found["stages"]
    assert stages["torch-exact"]["agrees"] and not stages["torch-exact"]["wrong"]
    assert list(stages["torch-steps"]["overhead"]) == [str(size) for size in torch_steps.SIZES]
    assert stages["torch-training"]["distill"]["tokens_per_second"] > 0
    assert stages["torch-training"]["train"]["tokens_per_second"] > 0
    assert len(stages["torch-training"]["calibrate"]["top1"]) == 4
    assert set(stages["torch-heads"]["top1"]) == {"shipped", "more_data"}
    assert stages["onnxruntime-cuda"]["agrees"] and stages["onnxruntime-cuda"]["compared"] > 100
    assert min(stages["onnxruntime-cuda"]["tokens_per_second"].values()) > 0
    assert all("refused" in stages[name] for name in ("tensorrt", "tensorrt-rtx"))
    assert all(stage["wall_seconds"] < stage["limit"] for stage in stages.values())
    text = (tmp_path / "gpu_check.md").read_text()
    assert "This is a dry run on a CPU" in text
    assert "| torch-exact |" in text and "tokens agree" in text
    assert (tmp_path / "gpu_check.png").stat().st_size > 1000


def options(folder: Path, **others: Any) -> argparse.Namespace:
    values = {"device": "cpu", "out": folder, "limit": None, "run": None, "model": None, "heads": None}
    return argparse.Namespace(**{**values, "bundle": None, "seconds": 0.1, **others})


def test_a_stage_that_takes_too_long_is_stopped(
    gpu_check: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its report holds what was found by then."""
    script = tmp_path / "slow.py"
    script.write_text(
        "import pathlib, sys, time\n"
        f"pathlib.Path({str(tmp_path)!r}, 'torch-exact.json').write_text('{{\"agrees\": true}}')\n"
        "time.sleep(60)\n"
    )
    monkeypatch.setattr(gpu_check, "__file__", str(script))
    found = gpu_check.supervise("torch-exact", options(tmp_path, limit=2.0))
    assert found["agrees"] and found["stopped"] and 2 <= found["wall_seconds"] < 30
    assert report.outcome(found).startswith("stopped at its limit")
    script.write_text("raise SystemExit(7)\n")
    found = gpu_check.supervise("torch-exact", options(tmp_path))
    assert found["failed"] == "The process ended with code 7."


def test_stages_share_a_total(gpu_check: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage is cut to what is left, and doesn't begin where that is next to nothing."""
    monkeypatch.setattr(gpu_check, "_LEAST_SECONDS", 0.5)
    script = tmp_path / "slow.py"
    script.write_text("import time; time.sleep(60)\n")
    monkeypatch.setattr(gpu_check, "__file__", str(script))
    ends = time.monotonic() + 1.5
    assert gpu_check.supervise("torch-exact", options(tmp_path), ends)["stopped"]
    assert time.monotonic() < ends + 20
    found = gpu_check.supervise("torch-steps", options(tmp_path), ends)
    assert found["refused"] == "`--total` left no time: `--stages torch-steps` runs it."
    assert json.loads((tmp_path / "torch-steps.json").read_text()) == found
    gpu_check.supervise("torch-exact", options(tmp_path), ends)
    assert json.loads((tmp_path / "torch-exact.json").read_text())["stopped"]  # what an earlier run found is kept
    for name in ("torch-exact", "torch-steps"):
        assert f"| {name} | " in report.as_markdown(gpu_check.joined(options(tmp_path)))


def test_a_package_that_is_missing_is_a_refusal(
    gpu_check: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Context) -> None:
        raise ModuleNotFoundError("No module named 'accelerate'", name="accelerate.utils")

    monkeypatch.setattr(torch_steps, "run", fail)
    assert gpu_check.run_stage(options(tmp_path, run="torch-steps")) == 0
    found = json.loads((tmp_path / "torch-steps.json").read_text())
    assert found == {"refused": "A package is missing. No module named 'accelerate'"}
    assert not gpu_check.names_missing_package(ModuleNotFoundError("", name="medusa_export.gone"))


def test_packages_of_other_versions_are_named(gpu_check: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"transformers": "4.57.1"}

    def version(name: str) -> str:
        if name == "msgspec":
            raise gpu_check.PackageNotFoundError(name)
        return there.get(name, "2026.1" if name != "torch" else "2.11.0+cu130")

    monkeypatch.setattr(gpu_check, "version", version)
    assert gpu_check.lacking() == [
        "msgspec is not installed; the project needs msgspec>=0.19.",
        "This is transformers 4.57.1; the project needs transformers<6,>=5.16.",
    ]


def test_steps_are_timed_where_no_graph_can_be_captured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch_steps, "_measure_graphs", refuse)
    context = Context(torch.device("cpu"), tmp_path, "torch-steps")
    with torch.set_grad_enabled(True), pytest.raises(RuntimeError, match=r"No CUDA graphs: .* not permitted"):
        torch_steps.run(context)
    assert set(context.report["launched_step_ms"]) == set(torch_steps.CHOSEN)
    stage = {**json.loads((tmp_path / "torch-steps.json").read_text()), "wall_seconds": 1.0, "limit": 9}
    text = report.as_markdown(
        {"date": "", "dry": False, "machine": {"gpu": "", "versions": {}}, "stages": {"a": stage}}
    )
    assert "- 16 nodes without CUDA graphs: " in text and "- no CUDA graphs: RuntimeError: operation" in text


def test_a_family_that_fails_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    greedy = torch_exact._greedy

    def fail_once(model: Any, prompt: list[int], count: int) -> list[int]:
        if model.config.model_type == "llama":
            raise RuntimeError("no kernel")
        return greedy(model, prompt, count)

    monkeypatch.setattr(torch_exact, "_greedy", fail_once)
    monkeypatch.setattr(torch_exact, "DRY_TOKENS", 3)
    context = Context(torch.device("cpu"), tmp_path, "torch-exact")
    with torch.set_grad_enabled(True):
        torch_exact.run(context)
    assert context.report["wrong"] == ["llama"] and not context.report["agrees"]
    assert context.report["families"]["mistral"] == {"backend": [True] * 3, "replayed": [True] * 3}
    text = "\n".join(report._details(context.report))
    assert "- tokens of llama against transformers, made: RuntimeError: no kernel" in text
    assert "- tokens of mistral against transformers, backend: equal; replayed: equal" in text


def test_a_failure_is_reported_in_its_words(gpu_check: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Context) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(torch_steps, "run", fail)
    assert gpu_check.run_stage(options(tmp_path, run="torch-steps")) == 1
    found = json.loads((tmp_path / "torch-steps.json").read_text())
    assert found["failed"] == "RuntimeError: out of memory"
    assert gpu_check.exit_code({"stages": {"torch-steps": found}}) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_a_refusal(gpu_check: Any, tmp_path: Path) -> None:
    assert gpu_check.run_stage(options(tmp_path, run="torch-steps", device="cuda")) == 0
    found = json.loads((tmp_path / "torch-steps.json").read_text())
    assert "finds no GPU" in found["refused"]
    assert gpu_check.exit_code({"stages": {"torch-steps": found}}) == 3


def test_stages_are_chosen_by_name_or_by_its_beginning(gpu_check: Any) -> None:
    assert gpu_check.selected("tensorrt") == ["tensorrt"]  # a name, not the beginning of tensorrt-rtx
    assert gpu_check.selected("torch,export")[-2:] == ["torch-heads", "export"]
    with pytest.raises(SystemExit, match="no stage 'cuda': choose some of torch-steps, "):
        gpu_check.selected("cuda")


STAGE = {
    "wall_seconds": 12.0, "limit": 60, "agrees": True, "step_ms": {"1": 10.0, "64": 10.8},
    "launched_step_ms": {"64": 33}, "overhead": {"1": 1.0, "64": 1.08}, "tokens_per_second": {"auto": 321.4},
    "host_gap_ms": 0.02, "notes": ["well"], "compared": 1234, "network_layers": 2675, "build_seconds": 17.2,
    "not_on_the_gpu": {}, "weight_bytes": 13_500_000_000, "context_tokens": 512, "nodes_per_step": 16.0,
    "uncaptured": [{"tree_size": 9, "draws": 0, "words": "no memory"}],
}  # fmt: skip


def test_a_report_becomes_a_page_and_a_row(tmp_path: Path) -> None:
    found = {
        "date": "2026-01-02",
        "dry": False,
        "machine": {"gpu": "NVIDIA H100", "driver": "580.1", "versions": {"torch": "2.11.0", "tensorrt": None}},
        "stages": {"torch-steps": STAGE, "tensorrt": {"wall_seconds": 1.0, "limit": 9, "refused": "no library"}},
    }
    text = report.as_markdown(found)
    for part in (
        "| against the first | 1.00 | 1.08 |", "| without CUDA graphs, ms |  | 33.00 |", "no library\n", "not run",
        "- tensorrt not installed", "steps of 9 are no CUDA graphs: no memory",
        "the host's part of a plain step is 0.020", "an engine of 2,675 layers, built in 17 s",
        "1,234 comparisons with PyTorch", "all nodes are on the GPU", "weights of 13,500,000,000 bytes, 512 tokens",
    ):  # fmt: skip
        assert part in text
    found["stages"]["tensorrt"] = STAGE
    (tmp_path / "gpu.md").write_text("before\n<!-- gpu checks: begin -->\nold\n<!-- gpu checks: end -->\nafter\n")
    report.plot(found, tmp_path / "plot.png")
    report.publish(found, tmp_path / "plot.png", tmp_path)
    page = (tmp_path / "gpu.md").read_text()
    assert "| [NVIDIA H100, driver 580.1](gpu_checks/nvidia-h100.md) | 2026-01-02 | 1.08 | tensorrt 321 |\n" in page
    assert "old" not in page and page.endswith("after\n")
    assert {path.name for path in (tmp_path / "gpu_checks").iterdir()} == {
        f"nvidia-h100.{kind}" for kind in ("json", "md", "png")
    }


def test_the_page_shows_the_reports_that_are_there() -> None:
    page = (ROOT / "docs/gpu.md").read_text(encoding="utf-8")
    assert report.with_cards(page, sorted((ROOT / "docs/gpu_checks").glob("*.json"))) == page
    assert "<!-- gpu checks: begin -->" in page


def test_transformers_ends_where_the_bundle_does(tiny_bundle: Bundle) -> None:
    model = tiny_model("llama")
    bundle = replace(tiny_bundle, model=replace(tiny_bundle.model, eos_token_ids=(7, 9)))
    backends.transformers_speed(model, PROMPTS[:1], bundle, torch.device("cpu"), count=4)
    assert model.generation_config.eos_token_id == [7, 9]


def ran(folder: Path, *arguments: str, gpu_package: bool = True) -> tuple[list[str], str, str]:
    """The packages that ``gpu_check.sh`` asks pip for, its errors, and how it calls Python. Nothing is installed."""
    stubs = {
        "nvidia-smi": "exit 0",
        "pip": f'echo "$@" >> pip.log; [[ {int(gpu_package)} = 1 || "$*" != *onnxruntime-gpu* ]]',
        "python": f'echo "$PYTHONPATH: $@" >> python.log; [ "$1" != scripts/gpu_check.py ] && {sys.executable} "$@"; :',
        "scripts/smollm2.sh": "echo model",
        "scripts/setup.sh": 'cd "$(dirname "${BASH_SOURCE[0]}")/.."; PATH=$PWD:$PATH',
    }
    (folder / "scripts").mkdir(parents=True, exist_ok=True)
    for name, body in stubs.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (folder / name).chmod(0o755)
    for name in ("scripts/gpu_check.sh", "scripts/wheelhouse_join.py", "pyproject.toml"):
        shutil.copy(ROOT / name, folder / name)
    command = ["bash", str(folder / "scripts/gpu_check.sh"), *arguments]
    outcome = subprocess.run(
        command, capture_output=True, text=True, check=True, env={"PATH": f"{folder}:/usr/bin:/bin", "PYTHON": "python"}
    )
    log = folder / "pip.log"
    return log.read_text().splitlines() if log.exists() else [], outcome.stderr, (folder / "python.log").read_text()


def test_the_package_for_gpus_has_a_version_of_its_own(tmp_path: Path) -> None:
    """The package for GPUs may lack the version of the package for CPUs."""
    asked, words, called = ran(tmp_path / "there", "--stages", "torch")
    assert asked[-1] == "install --quiet --constraint constraints.txt onnxruntime-gpu[cuda,cudnn]"
    assert "note:" not in words
    assert "scripts/gpu_check.py --model model --heads scripts/smollm2_heads --stages torch" in called
    asked, words, _ = ran(tmp_path / "missing", gpu_package=False)
    assert asked[-1] == "install --quiet --constraint constraints.txt onnxruntime"
    assert "note: no onnxruntime-gpu; ONNX Runtime runs on the CPU only" in words
    pinned = [
        line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("onnxruntime-gpu")
    ]
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["gpu"]
    (wanted,) = map(Requirement, extra)
    assert len(pinned) == 1
    assert wanted.specifier.contains(pinned[0].partition("==")[2])


def test_offline_takes_the_parts_that_have_arrived(tmp_path: Path) -> None:
    """The machine's own Python runs the check, with the packages that were carried before its own."""
    packing = load_script("wheelhouse")
    (tmp_path / "wheels").mkdir()
    source = tmp_path / "source"
    subprocess.run(
        [sys.executable, "-m", "zipfile", "-c", tmp_path / "wheels/none-1-py3-none-any.whl", SCRIPT], check=True
    )
    (tmp_path / "wheels/tiny.gguf").write_bytes(b"m" * 3000)
    source.mkdir()
    assert packing.pack((tmp_path / "wheels").iterdir(), source, 4000) >= 2
    carried = tmp_path / "carried"
    shutil.copytree(source / "part-01", carried / "part-01")
    asked, words, called = ran(tmp_path / "repository", "--offline", str(carried))
    assert not asked and "missing, of 2 parts: part-02" in words
    last = called.splitlines()[-1]
    assert last.startswith(f"{carried}/site:{tmp_path}/repository:")
    assert list((carried / "site").glob("medusa_export-*.dist-info/METADATA"))


def test_offline_runs_without_any_part(tmp_path: Path) -> None:
    """A machine that lacks nothing needs none."""
    carried = tmp_path / "carried"
    carried.mkdir()
    _, words, called = ran(tmp_path / "repository", "--offline", str(carried), "--stages", "torch")
    assert "holds no part" in words
    assert called.splitlines()[-1].endswith("scripts/gpu_check.py --stages torch")


def test_the_host_gap_is_taken_from_steps_submitted_ahead(tiny_bundle: Bundle, tiny_engine: CompiledEngine) -> None:
    machine = Machine(tiny_bundle, tiny_engine)
    backend = machine.backend()
    assert isinstance(backends.host_gap(backend, PROMPTS[0]), float)
    assert len(machine.trt.executed) == 1 + backends.WARM_UP + 2 * backends.REPEATS + 1
    backend.close()


def test_steps_are_timed_without_graphs_too(
    tiny_engine: CompiledEngine, tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(tiny_bundle, tiny_engine)
    machine.trt.__version__ = tiny_engine.version
    monkeypatch.setattr(backend_module, "import_tensorrt", lambda flavor: machine.library)
    monkeypatch.setattr(Cuda, "open", classmethod(lambda cls, device: cls(machine.cuda, device)))
    monkeypatch.setattr(backends, "REPEATS", 12)  # 128 slots have room for these
    times = backends.launched_step_times(Bundle.load(tiny_engine.folder), PROMPTS[0][:4])
    assert list(times) == [1, 2, 4, 8]
    assert machine.cuda.calls["cudaStreamBeginCapture"] == machine.cuda.calls["cudaGraphLaunch"] == 0
    assert not machine.cuda.blocks
