"""Other programs that run the same model: transformers, onnxruntime-genai and llama.cpp."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from medusa_export.benchmarks.contestants import Contestant, Contestants, Generation, engine_contestant
from medusa_export.benchmarks.peer_weights import (
    StoredWeights,
    bundle_weights,
    genai_weights,
    gguf_weights,
    unquantized_weights,
)
from medusa_export.common.errors import CheckpointError
from medusa_export.common.extras import extra
from medusa_runtime import Bundle, MedusaEngine


@dataclass(frozen=True)
class BenchPeers:
    """Other programs to measure beside a bundle; those that are not named are left out.

    Attributes:
        plain: A bundle of the same model without heads.
        model: The model to run with transformers: a folder, a hub id or a ``.gguf`` file.
        genai: Folders of models for onnxruntime-genai, such as one in fp32 and one in int4.
        llama_cpp: GGUF files for llama.cpp.
    """

    plain: Path | None = None
    model: str | None = None
    genai: Sequence[Path] = ()
    llama_cpp: Sequence[Path] = ()

    def add_to(self, contestants: Contestants, bundle: Bundle, threads: int) -> None:
        """Loads the peers.

        Args:
            contestants: Receives them.
            bundle: The bundle that they are compared with.
            threads: CPU threads of each.

        Raises:
            BundleError: The bundle without heads can't be read.
            CheckpointError: A model can't be loaded.
            MissingExtraError: A package is not installed.
        """

        def add(name: str, load: Callable[[], Contestant], weights: StoredWeights) -> None:
            known = name in contestants.by_name
            contestants.add(f"{name} {len(contestants.by_name)}" if known else name, load, weights)

        if self.plain is not None:
            engine = MedusaEngine.load(self.plain, threads=threads)
            weights = bundle_weights(engine.bundle)
            same = weights == bundle_weights(bundle)
            add("without heads", lambda: engine_contestant(engine, 1), StoredWeights(weights.kind, same=same))
        for folder in self.genai:
            weights = genai_weights(folder, bundle)
            add(f"onnxruntime-genai, {_short(weights)}", partial(genai_contestant, folder, threads), weights)
        for file in self.llama_cpp:
            weights = gguf_weights(file, bundle)
            add(f"llama.cpp, {_short(weights)}", partial(llama_cpp_contestant, file, threads), weights)
        if self.model is not None:
            model, ends = self.model, bundle.model.eos_token_ids
            weights = unquantized_weights("fp32", bundle)
            add("transformers", lambda: transformers_contestant(model, threads, ends), weights)


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
        # The last token may be an end token.
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count - 1
        )
        return time.perf_counter() - started, output[0, ids.shape[1] :].tolist()

    def answer(prompt: list[int], count: int) -> Generation:
        ids = torch.tensor([prompt])
        first, _ = timed(ids, 1)
        whole, tokens = timed(ids, count)
        return Generation(tuple(tokens), first, whole - first, len(tokens) - 1)

    return answer


def genai_contestant(folder: Path, threads: int | None) -> Contestant:
    """Returns a contestant for onnxruntime-genai.

    Args:
        folder: The folder of its model.
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

    def answer(prompt: list[int], count: int) -> Generation:
        params, length = og.GeneratorParams(model), len(prompt) + count
        # The last token may be an end token.
        params.set_search_options(max_length=length, min_length=length - 1, do_sample=False)
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

    def answer(prompt: list[int], count: int) -> Generation:
        tokens: list[int] = []
        llama.reset()  # without it, a prefix of the last prompt would be reused
        started = first = time.perf_counter()
        for token in llama.generate(prompt, temp=0.0, repeat_penalty=1.0):
            if not tokens:
                first = time.perf_counter()
            tokens.append(int(token))
            if len(tokens) == count:
                break
        return Generation(tuple(tokens), first - started, time.perf_counter() - first, len(tokens) - 1)

    return answer


def llama_cpp_build() -> str | None:
    """Returns the instructions that the loaded llama.cpp was built for, as it names them; None if it is not loaded."""
    library = sys.modules.get("llama_cpp")
    return None if library is None else library.llama_print_system_info().decode().strip(" |")


def _short(weights: StoredWeights) -> str:
    return weights.kind.partition(",")[0]
