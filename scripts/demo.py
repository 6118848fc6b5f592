"""Answers a prompt with a bundle, then compares tree and plain decoding with transformers' greedy ``generate``."""

from __future__ import annotations

import sys

from rich import box
from rich.console import Console
from rich.table import Table

from medusa_export.benchmarks.bench import transformers_contestant
from medusa_runtime import GenerationResult, MedusaEngine

MAX_NEW_TOKENS = 96


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
        for size in (1, "auto"):
            result = engine.generate(messages, max_new_tokens=MAX_NEW_TOKENS, tree_size=size)
            name = f"auto, {result.stats.nodes_per_step:.1f} nodes/step" if size == "auto" else "plain, tree size 1"
            results[name] = result
        transformers = transformers_contestant(model_path, None, engine.bundle.model.eos_token_ids)
        reference = transformers(engine.tokenizer.encode_chat(messages), MAX_NEW_TOKENS)
    expected = reference.token_ids
    speed = reference.steps / reference.decode_seconds

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
