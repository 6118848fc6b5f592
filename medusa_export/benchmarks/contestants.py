"""Contestants of a bench: engines at several tree sizes, and other programs with the same model."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from medusa_export.common.errors import CheckpointError
from medusa_export.common.extras import extra
from medusa_runtime import MedusaEngine
from medusa_runtime.request import TreeSize


@dataclass(frozen=True)
class Generation:
    """An answer and the time that it took.

    Attributes:
        token_ids: The tokens of the answer.
        prefill_seconds: Time until the first token.
        decode_seconds: Time from the first token to the last.
        steps: Steps after the first token.
        nodes_per_step: Mean number of nodes that these steps verified.
    """

    token_ids: tuple[int, ...]
    prefill_seconds: float
    decode_seconds: float
    steps: int
    nodes_per_step: float = 1.0


# Answers a prompt greedily. Arguments: token ids of the prompt, and the largest number of tokens to generate.
Contestant = Callable[[list[int], int], Generation]


def engine_contestant(engine: MedusaEngine, tree_size: TreeSize, *, lookup: bool = True) -> Contestant:
    """Returns a contestant for an engine.

    Args:
        engine: The engine. Contestants share its backend.
        tree_size: Nodes per step, or ``auto``.
        lookup: Also propose tokens by lookup in the text.
    """
    # Each contestant counts acceptance of its own, because its steps differ from those of others.
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
    """Returns a contestant for transformers' greedy ``generate``, in fp32.

    Args:
        model_path: A folder, a hub id or a ``.gguf`` file.
        threads: CPU threads; PyTorch's own choice if None.
        end_tokens: Ids of the tokens that end an answer; the model's own if None.
    """
    import torch  # noqa: PLC0415  # slow to import, and only needed here

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
    """Returns a contestant for onnxruntime-genai.

    Args:
        folder: The folder of its model, which has the same weights as the bundle.
        threads: CPU threads; its own choice if None.

    Raises:
        CheckpointError: The model can't be loaded.
        MissingExtraError: onnxruntime-genai is not installed.
    """
    with extra("bench"):
        import onnxruntime_genai as og  # noqa: PLC0415

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
        # `get_sequence` would leave out the token that ends an answer.
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
    """Returns a contestant for llama.cpp. It computes with the weights as they are in the file.

    With quantized weights it may well choose other tokens.

    Args:
        gguf: The GGUF file.
        threads: CPU threads; its own choice if None.

    Raises:
        CheckpointError: The file can't be loaded.
        MissingExtraError: llama-cpp-python is not installed.
    """
    with extra("llama-cpp"):
        from llama_cpp import Llama  # noqa: PLC0415

    try:
        llama = Llama(str(gguf), n_ctx=4096, n_threads=threads, n_threads_batch=threads, verbose=False)
    except (ValueError, RuntimeError) as error:
        raise CheckpointError(f"llama.cpp can't load {gguf}: {error}.") from error
    stop = llama.token_eos()

    def answer(prompt: list[int], max_new_tokens: int) -> Generation:
        tokens: list[int] = []
        llama.reset()  # without it, a prefix of the last prompt would be reused
        started = first = time.perf_counter()
        for token in llama.generate(prompt, temp=0.0, repeat_penalty=1.0):
            if not tokens:
                first = time.perf_counter()
            tokens.append(int(token))
            if token == stop or len(tokens) == max_new_tokens:
                break
        return Generation(tuple(tokens), first - started, time.perf_counter() - first, len(tokens) - 1)

    return answer


class Contestants:
    """Contestants that are loaded and warmed up, with the memory that each takes.

    Args:
        prompt: Token ids of the prompt that each answers to warm up.
        max_new_tokens: Largest number of tokens of that answer.

    Attributes:
        by_name: The contestants by name, in the order of ``add``.
        memory: Memory that each added to this process, in bytes, by name.
    """

    def __init__(self, prompt: list[int], max_new_tokens: int) -> None:
        self._prompt, self._max_new_tokens = prompt, max_new_tokens
        self.by_name: dict[str, Contestant] = {}
        self.memory: dict[str, int] = {}

    def add(self, name: str, load: Callable[[], Contestant], *, since: int | None = None) -> None:
        """Loads a contestant and warms it up.

        Args:
            name: Its name.
            load: Loads it.
            since: Memory of the process before a part of it was loaded, in bytes; that of now if None.
        """
        before = resident() if since is None else since
        contestant = load()
        contestant(self._prompt, self._max_new_tokens)
        self.memory[name] = resident() - before
        self.by_name[name] = contestant


def resident() -> int:
    """Returns the memory of this process, in bytes."""
    rss: int = psutil.Process().memory_info().rss
    return rss
