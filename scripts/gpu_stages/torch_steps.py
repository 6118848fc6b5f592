"""Stage ``torch-steps``: step times of the PyTorch step at the sizes of a 7B model, with random weights in fp16."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from gpu_stages.context import Context, Stopwatch
from medusa_export.heads.modules import MedusaHeads
from medusa_export.step.attention import ATTENTION_NAME
from medusa_export.step.fused import FUSED
from medusa_export.step.replay import ReplayedSteps
from medusa_export.step.step import MedusaStep
from medusa_export.trees.named import load_tree
from medusa_export.trees.prior import rank_accuracy
from medusa_runtime.bundles.tree import RankPath, Tree

SIZES = (1, 2, 4, 8, 16, 32, 64, 96, 128)
# Sizes that are also run without CUDA graphs, and with the host reading each step.
CHOSEN = (1, 16, 64)
CONTEXT, SLOTS, NUM_HEADS, TOP_K = 512, 2048, 4, 10
REPEATS, BATCHES = 20, 5
_SEVEN_B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
_SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}


def run(context: Context) -> None:
    """Measures step times by tree size: as CUDA graphs, without them, and with the host reading each step."""
    torch.set_grad_enabled(False)
    small = context.is_dry
    slots, repeats = (512, 2) if small else (SLOTS, REPEATS)
    with Stopwatch() as made:
        step = random_step(context.device, small=small)
    weights = sum(parameter.nbytes for parameter in {*step.parameters()})
    context.note(weight_bytes=weights, context_tokens=min(CONTEXT, slots // 4), slots=slots, made_seconds=made.seconds)
    if not small:
        bandwidth = copy_bandwidth(context.device)
        context.note(copy_bytes_per_second=bandwidth, least_ms=1000 * weights / bandwidth)
    prompt = [(7 * place) % 100 for place in range(min(CONTEXT, slots // 4))]
    try:
        _measure_graphs(context, ReplayedSteps(step, slots), prompt, repeats)
    except RuntimeError as error:  # steps without graphs are measured all the same
        context.note(capture_refused=f"{type(error).__name__}: {error}")
    gc.collect()
    launched = ReplayedSteps(step, slots, capture=False)
    launched.prefill(prompt)
    plain: dict[int, float] = {}
    for size in CHOSEN:
        plain[size] = step_ms(launched, size, len(prompt), repeats=repeats)
        context.note(launched_step_ms=plain)
    if "capture_refused" in context.report:
        raise RuntimeError(f"No CUDA graphs: {context.report['capture_refused']}")


def _measure_graphs(context: Context, steps: ReplayedSteps, prompt: list[int], repeats: int) -> None:
    """Notes the times of steps that are CUDA graphs, and what the host's reading adds to them."""
    steps.prefill(prompt)
    times: dict[int, float] = {}
    for size in SIZES:
        times[size] = step_ms(steps, size, len(prompt), repeats=repeats)
        context.note(step_ms=times, overhead={nodes: ms / times[1] for nodes, ms in times.items()})
    gaps = {}
    for size in CHOSEN:
        gaps[size] = host_gap(steps, size, len(prompt), repeats=repeats)
        context.note(host_gap=gaps)


def random_step(device: torch.device, *, small: bool) -> MedusaStep:
    """A step of a Llama with random weights in fp16 (fp32 on a CPU), four heads and a tree of 128 nodes."""
    config = AutoConfig.for_model("llama", **(_SMALL if small else _SEVEN_B), vocab_size=500 if small else 32000)
    dtype = torch.float32 if small else torch.float16
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=ATTENTION_NAME).eval()
        heads = MedusaHeads.fresh(NUM_HEADS, model.get_output_embeddings(), conditioned=True).to(dtype)
        step = MedusaStep(model, heads, largest_tree(max(SIZES)), sampling=False).eval()
    step.requires_grad_(False)
    step.to(device)
    step.kernels = FUSED
    return step


def largest_tree(size: int) -> Tree:
    """A tree of the most likely nodes for the acceptance estimates of untried heads, after MEDUSA's own first ones."""
    paths: list[RankPath] = list(load_tree("default", num_heads=NUM_HEADS, top_k=TOP_K).tree.paths)
    known = {(), *paths}
    values: dict[RankPath, float] = {(): 1.0}
    for path in paths:
        values[path] = values[path[:-1]] * rank_accuracy(len(path) - 1, path[-1])
    while len(paths) + 1 < size:
        children = (
            (values[path] * rank_accuracy(len(path), rank), (*path, rank))
            for path in known
            if len(path) < NUM_HEADS
            for rank in range(TOP_K)
        )
        value, best = max(child for child in children if child[1] not in known)
        paths.append(best)
        known.add(best)
        values[best] = value
    return Tree.from_paths(paths[: size - 1])


def step_ms(steps: ReplayedSteps, size: int, length: int, *, repeats: int) -> float:
    """The median milliseconds of a step on the device, the host reading nothing.

    Args:
        steps: The steps.
        size: Nodes of a step.
        length: Committed entries at the start of each measurement.
        repeats: Steps in one measurement.
    """
    steps.run(size)  # captures it
    return 1000 * statistics.median(_timed(steps, lambda: steps.run(size), length, repeats) for _ in range(BATCHES))


def host_gap(steps: ReplayedSteps, size: int, length: int, *, repeats: int) -> dict[str, float]:
    """The time of a step that the host reads before it launches the next one, and the share of it beyond the device's.

    Args:
        steps: The steps.
        size: Nodes of a step.
        length: Committed entries at the start of each measurement.
        repeats: Steps in one measurement.
    """

    def run_and_read() -> None:
        steps.run(size)
        steps.read()

    apart, ahead = [], []
    for _ in range(BATCHES):
        apart.append(_timed(steps, run_and_read, length, repeats))
        ahead.append(_timed(steps, lambda: steps.run(size), length, repeats))
    read, device = statistics.median(apart), statistics.median(ahead)
    return {"read_step_ms": 1000 * read, "device_step_ms": 1000 * device, "share": (read - device) / read}


def _timed(steps: ReplayedSteps, once: Callable[[], Any], length: int, repeats: int) -> float:
    """Seconds of a step, as the mean over ``repeats`` of them."""
    steps.lengths.fill_(length)
    steps.wait()
    started = time.perf_counter()
    for _ in range(repeats):
        once()
    steps.wait()
    return (time.perf_counter() - started) / repeats


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second that a large copy within the GPU's memory reads and writes."""
    source = torch.empty(2**30, dtype=torch.float32, device=device).normal_()
    target = torch.empty_like(source)
    seconds = []
    for _ in range(6):
        torch.cuda.synchronize(device)
        started = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return 2 * source.nbytes / statistics.median(seconds[1:])
