"""Checks each GPU backend on this machine: whether it runs, whether it agrees with PyTorch, and how fast it is.

``gpu_check.sh`` runs this script. If a backend can't run, the report holds its error message.
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
import time
import traceback
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from medusa_export.benchmarks.contestants import engine_contestant
from medusa_export.benchmarks.speeds import race, speeds
from medusa_export.common.files import write_text
from medusa_export.step.reference import load_reference, prompt_ids
from medusa_export.targets.tensorrt.build import write_engine
from medusa_export.targets.tensorrt.options import BuildOptions, choose_limits
from medusa_export.verification.backend import verify_backend
from medusa_export.verification.reference import greedy_config
from medusa_runtime import Bundle, MedusaEngine, MedusaError
from medusa_runtime.backends.base import Backend
from medusa_runtime.backends.tensorrt.backend import TensorRTBackend
from medusa_runtime.backends.tensorrt.cuda import Cuda
from medusa_runtime.backends.tensorrt.library import import_tensorrt
from medusa_runtime.bundles.compiled import CompiledEngine

PLAIN = "tree size 1"
BACKENDS = ("onnxruntime-cuda", "tensorrt", "tensorrt-rtx")
SIZES = (1, 2, 4, 8, 16, 32, 64)
PACKAGES = ("onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx-cu13", "cuda-bindings", "torch", "transformers")
PROMPTS = (
    "Explain in a few sentences why the sky is blue.",
    "Write a short story about a clockmaker.",
    "List the planets of the solar system with one fact about each.",
    "Translate to French: The weather is lovely today.",
)
TOKENS, WARM_UP, REPEATS = 128, 5, 30


def main() -> int:
    """Checks a bundle on all backends and writes a report.

    Returns:
        The exit code: 0 if a backend ran and all that ran agree with PyTorch, 3 if no backend is available, 1 if a
        backend failed or disagrees.
    """
    bundle, model, heads, target = Bundle.load(sys.argv[1]), sys.argv[2], sys.argv[3], Path(sys.argv[4])
    report: dict[str, Any] = {"machine": machine(), "bundle": bundle.model.name, "backends": {}}
    step = load_reference(bundle, model, heads)
    prompts = prompt_ids(bundle, PROMPTS, chosen=True)
    for name in BACKENDS:
        print(f"{name} …", file=sys.stderr)
        try:
            report["backends"][name] = check(name, bundle, step, prompts, target)
        except MedusaError as error:
            report["backends"][name] = {"refused": str(error)}
        except Exception as error:  # noqa: BLE001  # the other backends are checked all the same
            traceback.print_exc()
            report["backends"][name] = {"refused": f"it failed: {error!r}", "failed": True}
    failed = any(facts.get("failed") for facts in report["backends"].values())
    ran = [facts for facts in report["backends"].values() if "refused" not in facts]
    report["transformers"] = transformers_speed(step.model, prompts, bundle) if ran else None
    write_text(target / "gpu_check.json", json.dumps(report, indent=1) + "\n")
    write_text(target / "gpu_check.md", as_markdown(report))
    print((target / "gpu_check.md").read_text(encoding="utf-8"))
    if not ran and not failed:
        return 3
    return int(failed or not all(facts["agrees"] for facts in ran))


def machine() -> dict[str, Any]:
    """Facts about this machine: the GPU, if there is one, and versions of packages."""
    facts: dict[str, Any] = {"python": platform.python_version(), "versions": {}}
    for package in PACKAGES:
        try:
            facts["versions"][package] = version(package)
        except PackageNotFoundError:
            facts["versions"][package] = None
    try:
        cuda = Cuda.open()
        facts["gpu"], facts["architecture"] = cuda.device.name, cuda.device.architecture
        facts["driver"] = cuda.call("asking for the driver's version", "cudaDriverGetVersion")
    except MedusaError as error:
        facts["gpu"] = None
        facts["refused"] = str(error)
    return facts


def check(name: str, bundle: Bundle, step: Any, prompts: list[list[int]], target: Path) -> dict[str, Any]:
    """Checks one backend: parity, then step times, then speed."""
    folder, facts = bundle.folder, {}
    if name.startswith("tensorrt"):
        folder = target / f"{name}-engine"
        limits = choose_limits(bundle, max_batch=4, max_seq_len=2048)
        engine = write_engine(import_tensorrt(name), bundle, BuildOptions(limits), folder, replace_existing=True)
        facts |= {"build_seconds": engine.build_seconds, "network_layers": sum(engine.layers.values())}
    outcome = verify_backend(Bundle.load(folder, check_digests=False), name, step, prompts)
    if outcome.not_run is not None:
        return {"refused": outcome.not_run}
    notes = [f"{part.name}: {note}" for part in outcome.checks for note in part.notes]
    facts |= {"agrees": outcome.passed, "compared": sum(part.compared for part in outcome.checks), "notes": notes}
    with MedusaEngine.load(folder, name, check_digests=False) as opened:
        facts |= {"name": opened.backend.name, "step_ms": step_times(opened.backend, bundle, prompts[0])}
        if isinstance(opened.backend, TensorRTBackend):
            facts["uncaptured"] = [
                {"tree_size": size, "draws": draws, "words": words}
                for (size, draws), words in opened.backend.uncaptured.items()
            ]
            facts["host_gap_ms"] = host_gap(opened.backend, prompts[0])
            facts["enqueued_step_ms"] = enqueued_step_times(Bundle.load(folder, check_digests=False), prompts[0])
        # Without lookup, steps are submitted ahead. With lookup, the host must read each step before the next.
        contestants = {
            PLAIN: engine_contestant(opened, 1),
            "auto, no lookup": engine_contestant(opened, "auto", lookup=False),
            "auto": engine_contestant(opened, "auto"),
        }
        for contestant in contestants.values():
            contestant(prompts[0], 8)  # warms up
        found = speeds(race(contestants, PLAIN, prompts, max_new_tokens=TOKENS, repeats=1), PLAIN)
        facts["tokens_per_second"] = {name: speed.tokens_per_second for name, speed in found.items()}
        facts["nodes_per_step"] = found["auto"].nodes_per_step
    return facts


def step_times(backend: Backend, bundle: Bundle, prompt: list[int]) -> dict[int, float]:
    """Median milliseconds of a step by tree size."""
    times = {}
    for size in (size for size in SIZES if size <= bundle.tree.size):
        backend.reserve(bundle.tree.max_depth + len(prompt) + size + (WARM_UP + REPEATS) * (bundle.tree.max_depth + 1))
        backend.reset(0)
        backend.step(max(len(prompt), size), {0: prompt})
        taken = []
        for _ in range(WARM_UP + REPEATS):
            started = time.perf_counter()
            backend.step(size)
            taken.append(time.perf_counter() - started)
        times[size] = 1000 * statistics.median(taken[WARM_UP:])
    return times


def enqueued_step_times(engine: Bundle, prompt: list[int]) -> dict[int, float]:
    """Step times of TensorRT without CUDA graphs, as in ``step_times``: the cost if a capture is refused."""
    backend = TensorRTBackend(engine, CompiledEngine.load(engine.folder, check_digests=False), capture=False)
    try:
        return step_times(backend, engine, prompt)
    finally:
        backend.close()


def host_gap(backend: TensorRTBackend, prompt: list[int]) -> float:
    """Milliseconds of a plain step in which the device waits for the host. Submitting a step ahead saves them."""
    backend.reset(0)
    backend.step(len(prompt), {0: prompt})
    for _ in range(WARM_UP):
        backend.step(1)
    started = time.perf_counter()
    for _ in range(REPEATS):
        backend.step(1)
    apart = time.perf_counter() - started
    backend.submit(1)
    started = time.perf_counter()
    for _ in range(REPEATS):
        backend.submit(1)
        backend.collect()
    ahead = time.perf_counter() - started
    backend.collect()
    return 1000 * (apart - ahead) / REPEATS


def transformers_speed(model: Any, prompts: list[list[int]], bundle: Bundle) -> dict[str, Any]:
    """The speed of transformers' ``generate`` on the same prompts and with the bundle's end tokens.

    It runs in fp16 on a GPU if torch can use one, otherwise in fp32 on the CPU.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.set_attn_implementation("sdpa")
    model.generation_config = greedy_config(model, bundle.model.eos_token_ids)
    model.to(device, torch.float16 if device == "cuda" else torch.float32)
    tokens, seconds = 0, 0.0
    for number, prompt in enumerate([prompts[0][:4], *prompts]):  # the first one warms up
        ids = torch.tensor([prompt], device=device)
        started = time.perf_counter()
        output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS)
        taken = time.perf_counter() - started
        if number:
            tokens, seconds = tokens + output.shape[1] - len(prompt), seconds + taken
    return {"device": device, "tokens_per_second": tokens / seconds}


def as_markdown(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    facts = report["machine"]
    gpu = f"{facts['gpu']} ({facts['architecture']}), CUDA driver {facts['driver']}" if facts["gpu"] else "no GPU"
    lines = [f"# GPU check: {gpu}", "", f"{report['bundle']}, fp16, greedy. Versions:", ""]
    lines += [f"- {package} {number or 'not installed'}" for package, number in facts["versions"].items()]
    lines += [
        "", "| backend | agrees with PyTorch | tree size 1, tokens/s | auto (nodes/step) | no lookup | host gap, ms |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    reference = report["transformers"]
    if reference is not None:
        lines.append(f"| transformers, {reference['device']} | | {reference['tokens_per_second']:.1f} | | | |")
    for name, found in report["backends"].items():
        if "refused" in found:
            lines.append(f"| {name} | not run | | | | |")
            continue
        rates, gap = found["tokens_per_second"], found.get("host_gap_ms")
        cells = ["yes" if found["agrees"] else "NO", f"{rates[PLAIN]:.1f}"]
        cells += [f"{rates['auto']:.1f} ({found['nodes_per_step']:.1f})", f"{rates['auto, no lookup']:.1f}"]
        cells.append("" if gap is None else f"{gap:.3f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    for name, found in report["backends"].items():
        lines += ["", f"## {name}", ""]
        if "refused" in found:
            lines.append(f"Refused: {found['refused']}")
            continue
        lines += step_table(found["step_ms"], found.get("enqueued_step_ms"))
        lines += [
            f"- steps of {step['tree_size']} with {step['draws']} draws are not captured: {step['words']}"
            for step in found.get("uncaptured", [])
        ]
        lines += [f"- {note}" for note in found["notes"]]
    return "\n".join(lines) + "\n"


def step_table(replayed: dict[Any, float], enqueued: dict[Any, float] | None) -> list[str]:
    """A table of milliseconds per step by tree size; for TensorRT with and without CUDA graphs."""
    lines = [f"| nodes | {' | '.join(map(str, replayed))} |", "|---" * (len(replayed) + 1) + "|"]
    lines.append(f"| step, ms | {' | '.join(f'{ms:.2f}' for ms in replayed.values())} |")
    if enqueued is not None:
        lines.append(f"| without CUDA graphs, ms | {' | '.join(f'{ms:.2f}' for ms in enqueued.values())} |")
    return [*lines, ""]


if __name__ == "__main__":
    raise SystemExit(main())
