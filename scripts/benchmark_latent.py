"""Times steps of a model with latent caches: the standard graph expands them, the derived graph does not.

The model is random. Its attention has the sizes of DeepSeek V2 Lite; it has two layers, and small MLPs. Graphs
take turns.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import medusa_export
from medusa_runtime import Bundle
from medusa_runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from medusa_runtime.bundles.bundle import GRAPH, ONNXRUNTIME_GRAPH

CHUNK = 128
TREE_SIZES = (1, 3, 9)
SIZES: dict[str, object] = {
    "vocab_size": 2000,
    "hidden_size": 2048,
    "intermediate_size": 1408,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "first_k_dense_replace": 2,
    "max_position_embeddings": 8192,
    "eos_token_id": None,
}


def fill(backend: OnnxRuntimeBackend, length: int) -> None:
    """Takes in a prompt of random tokens."""
    rng = np.random.default_rng(0)
    backend.reserve(length + 2 * CHUNK)
    backend.reset(0)
    for start in range(0, length, CHUNK):
        count = min(CHUNK, length - start)
        backend.step(count, {0: rng.integers(2, 2000, count).tolist()})


def step_time(backend: OnnxRuntimeBackend, tokens: int, length: int) -> float:
    """Processor time of one step, in seconds. The row keeps its length."""
    begin = time.process_time()
    backend.step(tokens, {} if tokens in TREE_SIZES else {0: [2] * tokens})
    taken = time.process_time() - begin
    backend.truncate(0, length)
    return taken


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[300, 2000])
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("deepseek_v3", **SIZES))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "bundle"
        medusa_export.export(model, out, init_heads=3, tree_size=max(TREE_SIZES), sampling=False)
        bundle = Bundle.load(out)
        backends = [
            OnnxRuntimeBackend(bundle, threads=1, graph=bundle.folder / graph) for graph in (GRAPH, ONNXRUNTIME_GRAPH)
        ]
        for length in options.lengths:
            for backend in backends:
                fill(backend, length)
            for tokens in (*TREE_SIZES, CHUNK):
                times = [[step_time(each, tokens, length) for each in backends] for _ in range(options.rounds)]
                standard, derived = (1000 * float(np.quantile(column, 0.25)) for column in zip(*times, strict=True))
                print(
                    f"{length} entries, {tokens} tokens: standard {standard:.1f} ms, derived {derived:.1f} ms, "
                    f"ratio {standard / derived:.1f}"
                )


if __name__ == "__main__":
    main()
