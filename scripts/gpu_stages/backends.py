"""Stages of the runtime's backends: an export, and for each backend its parity, step times and tokens per second."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from gpu_stages.context import Context, Stopwatch
from medusa_export import export
from medusa_export.benchmarks.captured_steps import captured_step_ms
from medusa_export.benchmarks.contestants import engine_contestant
from medusa_export.benchmarks.placement import nodes_elsewhere
from medusa_export.benchmarks.speeds import race, speeds
from medusa_export.step.reference import load_reference, prompt_ids
from medusa_export.targets.tensorrt.build import write_engine
from medusa_export.targets.tensorrt.options import BuildOptions, choose_limits
from medusa_export.verification.backend import verify_backend
from medusa_export.verification.reference import greedy_config
from medusa_runtime import BackendError, Bundle, MedusaEngine
from medusa_runtime.backends.base import Backend
from medusa_runtime.backends.onnxruntime.session import CPU, CUDA
from medusa_runtime.backends.tensorrt.backend import TensorRTBackend
from medusa_runtime.backends.tensorrt.library import import_tensorrt
from medusa_runtime.bundles.compiled import CompiledEngine

PLAIN = "tree size 1"
SIZES = (1, 2, 4, 8, 16, 32, 64)
PROMPTS = (
    "Explain in a few sentences why the sky is blue.",
    "Write a short story about a clockmaker.",
    "List the planets of the solar system with one fact about each.",
    "Translate to French: The weather is lovely today.",
)
TOKENS, DRY_TOKENS, WARM_UP, REPEATS = 128, 12, 5, 30
# What each backend is replaced by where there is no GPU; None if nothing can take its place.
_DRY = {"onnxruntime-cuda": "onnxruntime", "tensorrt-rtx": None, "tensorrt": None}


def run_export(context: Context) -> None:
    """Exports the base model in fp16 (fp32 in a dry run), for the stages after it; once more as greedy only."""
    with Stopwatch() as watch:
        bundle = bundle_of(context)
    with Stopwatch() as again:
        bundle_of(context, greedy_only=True)
    context.note(
        seconds=watch.seconds,
        greedy_only_seconds=again.seconds,
        bytes=sum(facts.size for facts in bundle.files.values()),
        nodes=bundle.tree.size,
        name=bundle.model.name,
    )


def run_onnxruntime(context: Context) -> None:
    """Checks ONNX Runtime's CUDA provider."""
    _run(context, "onnxruntime-cuda")


def run_tensorrt_rtx(context: Context) -> None:
    """Builds an engine with TensorRT-RTX, and checks it."""
    _run(context, "tensorrt-rtx")


def run_tensorrt(context: Context) -> None:
    """Builds an engine with TensorRT, and checks it."""
    _run(context, "tensorrt")


def bundle_of(context: Context, *, greedy_only: bool = False) -> Bundle:
    """The given bundle, or one of the base model, which is exported once.

    Args:
        context: The stage's context.
        greedy_only: Export without sampling.
    """
    if context.bundle is not None:
        return Bundle.load(context.bundle)
    folder = context.folder / ("greedy-bundle" if greedy_only else "bundle")
    if (folder / "medusa.json").exists():
        return Bundle.load(folder, check_digests=False)
    small = context.is_dry and context.model is None
    return export(
        context.base_model(),
        folder,
        heads=context.heads,
        init_heads=4 if context.heads is None else None,
        tree_size=8 if small else 64,
        sampling=not greedy_only,
        dtype="fp32" if context.is_dry else "fp16",
        overwrite=True,
    )


def _run(context: Context, name: str) -> None:
    backend = _DRY[name] if context.is_dry else name
    if backend is None:
        try:
            library = import_tensorrt(name)
            context.note(refused="A dry run has no GPU to run an engine on.", library=library.version)
        except BackendError as error:
            context.note(refused=str(error))
        return
    try:
        check(context, backend, bundle_of(context))
    except BackendError as error:
        context.note(refused=str(error))


def check(context: Context, name: str, bundle: Bundle) -> None:
    """Checks one backend: parity, then step times, then speed.

    Raises:
        BackendError: This machine can't run it.
    """
    folder = bundle.folder
    step = load_reference(bundle, context.base_model(), context.heads)
    prompts = prompt_ids(bundle, PROMPTS, chosen=context.model is not None)
    if name.startswith("tensorrt"):
        folder = context.folder / f"{name}-engine"
        limits = choose_limits(bundle, max_batch=4, max_seq_len=min(2048, bundle.model.max_positions))
        engine = write_engine(import_tensorrt(name), bundle, BuildOptions(limits), folder, replace_existing=True)
        context.note(build_seconds=engine.build_seconds, network_layers=sum(engine.layers.values()))
    elif name == "onnxruntime-cuda":
        context.note(not_on_the_gpu=nodes_elsewhere(bundle))
    compiled = Bundle.load(folder, check_digests=False)
    outcome = verify_backend(compiled, name, step, prompts)
    if outcome.not_run is not None:
        raise BackendError(outcome.not_run)
    context.note(
        agrees=outcome.passed,
        compared=sum(part.compared for part in outcome.checks),
        notes=[f"{part.name}: {note}" for part in outcome.checks for note in part.notes],
    )
    with MedusaEngine.load(folder, name, check_digests=False) as opened:
        context.note(name=opened.backend.name, step_ms=step_times(opened.backend, bundle, prompts[0]))
        if name.startswith("onnxruntime"):
            _check_captures(context, bundle_of(context, greedy_only=True), len(prompts[0]))
        if isinstance(opened.backend, TensorRTBackend):
            _check_replays(context, opened.backend, compiled, prompts[0])
        # Without lookup, steps are submitted ahead. With lookup, the host must read each step before the next.
        contestants = {
            PLAIN: engine_contestant(opened, 1),
            "auto, no lookup": engine_contestant(opened, "auto", lookup=False),
            "auto": engine_contestant(opened, "auto"),
        }
        for contestant in contestants.values():
            contestant(prompts[0], 8)  # warms up
        count = DRY_TOKENS if context.is_dry else TOKENS
        found = speeds(race(contestants, PLAIN, prompts, max_new_tokens=count, repeats=1), PLAIN)
        context.note(
            tokens_per_second={key: speed.tokens_per_second for key, speed in found.items()},
            nodes_per_step=found["auto"].nodes_per_step,
        )
    context.note(transformers=transformers_speed(step.model, prompts, bundle, context.device, count=count))


def _check_captures(context: Context, bundle: Bundle, length: int) -> None:
    """Notes what ONNX Runtime's steps of some sizes take as CUDA graphs, or why it refuses them."""
    provider = CPU if context.is_dry else CUDA
    found: dict[int, dict[str, float]] = {}
    capacity = 256 if context.is_dry else 1024
    try:
        for size in (1, min(16, bundle.tree.size), bundle.tree.size):
            found[size] = captured_step_ms(
                bundle,
                size,
                capacity=capacity,
                length=length,
                repeats=3 if context.is_dry else REPEATS,
                provider=provider,
            )
            context.note(fixed_step_ms=found)
    except BackendError as error:
        context.note(capture_refused=str(error))


def _check_replays(context: Context, backend: TensorRTBackend, engine: Bundle, prompt: list[int]) -> None:
    """Notes which steps are no CUDA graphs, what CUDA graphs save, and for how long the device waits for the host."""
    context.note(
        uncaptured=[
            {"tree_size": size, "draws": draws, "words": words} for (size, draws), words in backend.uncaptured.items()
        ],
        host_gap_ms=host_gap(backend, prompt),
        launched_step_ms=launched_step_times(engine, prompt),
    )


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


def launched_step_times(engine: Bundle, prompt: list[int]) -> dict[int, float]:
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


def transformers_speed(
    model: Any, prompts: list[list[int]], bundle: Bundle, device: torch.device, *, count: int
) -> dict[str, Any]:
    """The speed of transformers' ``generate`` on the same prompts and with the bundle's end tokens.

    Args:
        model: The reference's model. It stays on the device, in fp16 on a GPU.
        prompts: Token ids of each prompt.
        bundle: The bundle, for its end tokens.
        device: The device to run on.
        count: Largest number of tokens per prompt.
    """
    model.set_attn_implementation("sdpa")
    model.generation_config = greedy_config(model, bundle.model.eos_token_ids)
    model.to(device, torch.float16 if device.type == "cuda" else torch.float32)
    tokens, seconds = 0, 0.0
    for number, prompt in enumerate([prompts[0][:4], *prompts]):  # the first one warms up
        ids = torch.tensor([prompt], device=device)
        started = time.perf_counter()
        output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count)
        taken = time.perf_counter() - started
        if number:
            tokens, seconds = tokens + output.shape[1] - len(prompt), seconds + taken
    return {"device": device.type, "tokens_per_second": tokens / seconds}
