"""Answers a prompt with a bundle, then compares tree and plain decoding with transformers' greedy ``generate``."""

from __future__ import annotations

import sys
import time

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from medusa_export.checkpoints import load_model
from medusa_runtime import GenerationResult, MedusaEngine

MAX_NEW_TOKENS = 96


def reference(model_path: str, prompt_ids: list[int]) -> tuple[tuple[int, ...], float]:
    """transformers' greedy tokens, and how many a second it generates."""
    model = load_model(model_path, dtype=torch.float32)
    model.generation_config.update(temperature=None, top_p=None, top_k=None)
    prompt = torch.tensor([prompt_ids])
    taken = []
    for new_tokens in (1, MAX_NEW_TOKENS):  # the first is the price of the prompt
        started = time.perf_counter()
        output = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=new_tokens
        )
        taken.append(time.perf_counter() - started)
    tokens = tuple(output[0, len(prompt_ids) :].tolist())
    return tokens, (len(tokens) - 1) / (taken[1] - taken[0])


def main(bundle: str, model_path: str, prompt: str) -> None:
    """Streams an answer and prints the table."""
    console = Console()
    with MedusaEngine.load(bundle) as engine:
        assert engine.tokenizer is not None
        messages = [{"role": "user", "content": prompt}]
        console.print(f"\n[bold]{prompt}[/bold]\n")
        for chunk in engine.stream(messages, max_new_tokens=MAX_NEW_TOKENS):
            console.out(chunk.text, end="", highlight=False)
        console.print("\n")
        results: dict[str, GenerationResult] = {}
        chosen = engine.generate(messages, max_new_tokens=1).stats.tree_size  # what 'auto' comes to on this machine
        for size in sorted({1, chosen}):
            name = f"tree of {size} nodes" if size > 1 else "plain, tree size 1"
            results[name] = engine.generate(messages, max_new_tokens=MAX_NEW_TOKENS, tree_size=size)
        expected, speed = reference(model_path, engine.tokenizer.encode_chat(messages))

    table = Table(
        "", "tokens/s", "tokens/step", "same tokens", box=box.SIMPLE_HEAD, title=f"{len(expected)} tokens, greedy, fp32"
    )
    table.add_row("transformers generate", f"{speed:.1f}", "1.00", "(reference)")
    for name, result in results.items():
        stats = result.stats
        same = "yes" if result.token_ids == expected else "NO"
        table.add_row(f"bundle, {name}", f"{stats.tokens_per_second:.1f}", f"{stats.tokens_per_step:.2f}", same)
    console.print(table)
    if any(result.token_ids != expected for result in results.values()):
        sys.exit(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
