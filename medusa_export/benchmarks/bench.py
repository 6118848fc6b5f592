"""Decoding speed told honestly: everything in turns, on the same prompts, against plain decoding in the same engine.

Each repeat every contestant answers every prompt, in an order drawn anew each time (from a fixed seed): whoever always
came after the same neighbour would always have that one's threads and caches to deal with. Speeds are totals over
prompts, ratios are taken within a repeat, and medians over repeats.
"""

from __future__ import annotations

import json
import platform
import random
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import Any

import psutil

from medusa_export.common.errors import CheckpointError, DatasetError
from medusa_runtime import MedusaEngine
from medusa_runtime.request import TreeSize

LLAMA_CPP = "llama.cpp"
AUTO = "auto"


@dataclass(frozen=True)
class BenchPrompt:
    """A prompt, and what kind of request it is."""

    category: str
    prompt: str


@dataclass(frozen=True)
class Generation:
    """One answer.

    Attributes:
        token_ids: All of it.
        prefill_seconds: Until the first token.
        decode_seconds: From there to the last.
        steps: After the first token.
        nodes_per_step: Tokens that each of them verified, on average.
    """

    token_ids: tuple[int, ...]
    prefill_seconds: float
    decode_seconds: float
    steps: int
    nodes_per_step: float = 1.0


# Answers token ids with at most so many tokens, greedily.
Contestant = Callable[[list[int], int], Generation]


@dataclass(frozen=True)
class Speed:
    """What a contestant came to; medians over repeats.

    Attributes:
        tokens_per_second: After the first token.
        spread: The slowest and the fastest repeat.
        tokens_per_step: Tokens that a step emitted on average.
        nodes_per_step: Nodes that it verified.
        speedup: Tokens per second against the baseline's, within a repeat.
        overhead: Seconds per step against the baseline's.
        first_token_seconds: Median over prompts, too.
        identical: The tokens are the baseline's.
        memory_mib: What loading it, and a first answer, added to this process; None if it wasn't looked at. Tree sizes
            share one engine.
    """

    tokens_per_second: float
    spread: tuple[float, float]
    tokens_per_step: float
    nodes_per_step: float
    speedup: float
    overhead: float
    first_token_seconds: float
    identical: bool
    memory_mib: int | None = None


def bench_prompts(path: Path | None = None) -> list[BenchPrompt]:
    """The fixed prompts that come with the package, or those of a file: JSON lines of ``category`` and ``prompt``.

    Raises:
        DatasetError: The file can't be read.
    """
    source: Any = path if path is not None else files("medusa_export") / "data" / "bench_prompts.jsonl"
    try:
        rows = [json.loads(line) for line in source.read_text(encoding="utf-8").split("\n") if line.strip()]
        found = [BenchPrompt(str(row.get("category", "")), str(row["prompt"])) for row in rows]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DatasetError(f"{source} can't be read as JSON lines of category and prompt ({error!r}).") from error
    if not found:
        raise DatasetError(f"{source} holds no prompts.")
    return found


def engine_contestant(engine: MedusaEngine, tree_size: TreeSize, *, lookup: bool = True) -> Contestant:
    """An engine at one tree size, with or without guesses from the text."""
    # What it learns of the heads' guesses is its own: others meet other steps.
    own = MedusaEngine(engine.bundle, engine.backend, engine.tokenizer)
    if tree_size == "auto":
        own.measure()

    def answer(prompt: list[int], max_new_tokens: int) -> Generation:
        own.evict()  # each answer pays for its prompt
        result = own.generate(prompt, max_new_tokens=max_new_tokens, tree_size=tree_size, lookup=lookup)
        stats = result.stats
        return Generation(
            result.token_ids, stats.prefill_seconds, stats.decode_seconds, stats.steps, stats.nodes_per_step
        )

    return answer


def transformers_contestant(
    model_path: str, threads: int | None, end_tokens: Sequence[int] | None = None
) -> Contestant:
    """transformers' greedy ``generate``, in fp32.

    Args:
        model_path: The model.
        threads: CPU threads; by default torch's own choice.
        end_tokens: Ids of the tokens that end an answer, as a bundle has them; the model's own if None.
    """
    import torch  # noqa: PLC0415  # slow to import, and not always wanted

    from medusa_export.models.checkpoints import load_model  # noqa: PLC0415
    from medusa_export.verification.reference import greedy_config  # noqa: PLC0415

    if threads:
        torch.set_num_threads(threads)
    model: Any = load_model(model_path, dtype=torch.float32)
    model.generation_config = greedy_config(model, end_tokens)

    def timed(ids: Any, count: int) -> tuple[float, Any]:
        started = time.perf_counter()
        output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count)
        return time.perf_counter() - started, output[0, ids.shape[1] :].tolist()

    def answer(prompt: list[int], max_new_tokens: int) -> Generation:
        ids = torch.tensor([prompt])
        first, _ = timed(ids, 1)
        whole, tokens = timed(ids, max_new_tokens)
        return Generation(tuple(tokens), first, whole - first, len(tokens) - 1)

    return answer


def genai_contestant(folder: Path, threads: int | None) -> Contestant:
    """onnxruntime-genai with a model of the same weights.

    Raises:
        CheckpointError: It can't be loaded.
    """
    import onnxruntime_genai as og  # noqa: PLC0415  # optional

    try:
        config = og.Config(str(folder))
        config.clear_providers()
        if threads:
            config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
        model = og.Model(config)
    except RuntimeError as error:
        raise CheckpointError(f"onnxruntime-genai can't load a model from {folder}: {error}.") from error

    def answer(prompt: list[int], max_new_tokens: int) -> Generation:
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=len(prompt) + max_new_tokens, do_sample=False)
        generator = og.Generator(model, params)
        # Not from its `get_sequence`, which leaves out the token that ends an answer.
        tokens: list[int] = []
        started = time.perf_counter()
        generator.append_tokens(prompt)
        generator.generate_next_token()
        first = time.perf_counter()
        tokens.append(int(generator.get_next_tokens()[0]))
        while not generator.is_done():
            generator.generate_next_token()
            tokens.append(int(generator.get_next_tokens()[0]))
        done = time.perf_counter()
        return Generation(tuple(tokens), first - started, done - first, len(tokens) - 1)

    return answer


def llama_cpp_contestant(gguf: Path, threads: int | None) -> Contestant:
    """llama.cpp with a GGUF file, as it is: a quantized one stays so, and may well say other tokens.

    Raises:
        CheckpointError: It can't be loaded.
    """
    from llama_cpp import Llama  # noqa: PLC0415  # optional

    try:
        llama = Llama(str(gguf), n_ctx=4096, n_threads=threads, n_threads_batch=threads, verbose=False)
    except (ValueError, RuntimeError) as error:
        raise CheckpointError(f"llama.cpp can't load {gguf}: {error}.") from error
    stop = llama.token_eos()

    def answer(prompt: list[int], max_new_tokens: int) -> Generation:
        tokens: list[int] = []
        llama.reset()  # or else it takes over what this prompt and the last one begin with
        started = first = time.perf_counter()
        for token in llama.generate(prompt, temp=0.0, repeat_penalty=1.0):
            if not tokens:
                first = time.perf_counter()
            tokens.append(int(token))
            if token == stop or len(tokens) == max_new_tokens:
                break
        return Generation(tuple(tokens), first - started, time.perf_counter() - first, len(tokens) - 1)

    return answer


class Paddock:
    """Where contestants are made ready: loaded and warmed up one after another, and weighed.

    Args:
        prompt: What each answers to warm up.
        max_new_tokens: Of that answer.

    Attributes:
        contestants: Those that are ready, by name.
        memory: What each added to this process, in bytes.
    """

    def __init__(self, prompt: list[int], max_new_tokens: int) -> None:
        self._prompt, self._max_new_tokens = prompt, max_new_tokens
        self.contestants: dict[str, Contestant] = {}
        self.memory: dict[str, int] = {}

    def add(self, name: str, load: Callable[[], Contestant], *, since: int | None = None) -> None:
        """Makes one ready.

        Args:
            name: What to call it.
            load: Loads it.
            since: Memory of the process before any of it was loaded, as ``resident`` told; now if None.
        """
        before = resident() if since is None else since
        contestant = load()
        contestant(self._prompt, self._max_new_tokens)
        self.memory[name] = resident() - before
        self.contestants[name] = contestant


def resident() -> int:
    """Memory of this process, in bytes."""
    rss: int = psutil.Process().memory_info().rss
    return rss


def race(
    contestants: Mapping[str, Contestant],
    baseline: str,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    repeats: int,
    told: Callable[[], None] = lambda: None,
) -> dict[str, list[list[Generation]]]:
    """Everyone's answers, [repeat][prompt]."""
    names = [baseline, *(name for name in contestants if name != baseline)]
    answers: dict[str, list[list[Generation]]] = {name: [[] for _ in range(repeats)] for name in names}
    orders = random.Random(0)  # noqa: S311  # no secret
    for repeat in range(repeats):
        for prompt in prompts:
            for name in orders.sample(names, len(names)):
                answers[name][repeat].append(contestants[name](prompt, max_new_tokens))
            told()
    return answers


def speeds(
    answers: Mapping[str, list[list[Generation]]], baseline: str, memory: Mapping[str, int] | None = None
) -> dict[str, Speed]:
    """Speeds of everyone against the baseline; ``memory`` is in bytes, by name."""
    taken = memory or {}
    rates = {name: [_rate(repeat) for repeat in repeats] for name, repeats in answers.items()}
    step_seconds = {name: [_step_seconds(repeat) for repeat in repeats] for name, repeats in answers.items()}
    expected = [answer.token_ids for answer in answers[baseline][0]]
    return {
        name: Speed(
            tokens_per_second=statistics.median(rates[name]),
            spread=(min(rates[name]), max(rates[name])),
            tokens_per_step=statistics.median(_per_step(repeat, _tokens(repeat)) for repeat in repeats),
            nodes_per_step=statistics.median(_per_step(repeat, _nodes(repeat)) for repeat in repeats),
            speedup=_ratio(rates[name], rates[baseline]),
            overhead=_ratio(step_seconds[name], step_seconds[baseline]),
            first_token_seconds=statistics.median(a.prefill_seconds for repeat in repeats for a in repeat),
            identical=all([answer.token_ids for answer in repeat] == expected for repeat in repeats),
            memory_mib=taken[name] >> 20 if name in taken else None,
        )
        for name, repeats in answers.items()
    }


def by_category(
    answers: Mapping[str, list[list[Generation]]], categories: Sequence[str], name: str, baseline: str
) -> dict[str, dict[str, float]]:
    """Speedup and tokens per step of one contestant, by kind of request."""
    figures = {}
    for category in dict.fromkeys(categories):
        part = {
            who: [
                [a for a, kind in zip(repeat, categories, strict=True) if kind == category] for repeat in answers[who]
            ]
            for who in {name, baseline}
        }
        speed = speeds(part, baseline)[name]
        figures[category] = {"speedup": speed.speedup, "tokens_per_step": speed.tokens_per_step}
    return figures


def _tokens(repeat: Sequence[Generation]) -> int:
    """Tokens after the first of each answer."""
    return sum(len(answer.token_ids) - 1 for answer in repeat)


def _rate(repeat: Sequence[Generation]) -> float:
    return _tokens(repeat) / max(sum(answer.decode_seconds for answer in repeat), 1e-9)


def _step_seconds(repeat: Sequence[Generation]) -> float:
    return _per_step(repeat, sum(answer.decode_seconds for answer in repeat))


def _nodes(repeat: Sequence[Generation]) -> float:
    return sum(answer.steps * answer.nodes_per_step for answer in repeat)


def _per_step(repeat: Sequence[Generation], amount: float) -> float:
    return amount / max(sum(answer.steps for answer in repeat), 1)


def _ratio(values: Sequence[float], others: Sequence[float]) -> float:
    return statistics.median(value / max(other, 1e-12) for value, other in zip(values, others, strict=True))


def environment() -> dict[str, Any]:
    """Where a figure was measured."""
    found = {}
    for package in ("medusa-export", "onnxruntime", "onnxruntime-genai", "llama-cpp-python", "torch", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "platform": platform.platform(),
        "versions": found,
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def report(measured: Mapping[str, Speed], categories: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """The figures of a bench as JSON: at the top those of ``auto``, whose tree size is a mean over steps."""
    return {
        "speedup": measured[AUTO].speedup,
        "tokens_per_step": measured[AUTO].tokens_per_step,
        "overhead": measured[AUTO].overhead,
        "tree_size": measured[AUTO].nodes_per_step,
        # llama.cpp calculates with quantized weights in another way, so that its tokens prove nothing.
        "identical": all(speed.identical for name, speed in measured.items() if name != LLAMA_CPP),
        "contestants": {name: asdict(speed) for name, speed in measured.items()},
        "categories": {name: dict(figures) for name, figures in categories.items()},
        "environment": environment(),
    }
