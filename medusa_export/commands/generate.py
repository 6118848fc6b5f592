"""``medusa-export generate``: answer a prompt with a bundle, streaming."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from medusa_export.commands.options import extra


def _tree_size(_: click.Context, __: click.Parameter, value: str) -> int | str:
    if value == "auto":
        return value
    try:
        return int(value)
    except ValueError:
        raise click.BadParameter(f"{value!r} is neither a number nor 'auto'.") from None


@click.command("generate")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("prompt")
@click.option("--chat", is_flag=True, help="Give the prompt as a user's message, through the chat template.")
@click.option("--system", metavar="TEXT", help="A system message before it; implies --chat.")
@click.option("--ids", is_flag=True, help="PROMPT is token ids, separated by commas or spaces.")
@click.option("-n", "--max-new-tokens", type=click.IntRange(1), default=128, show_default=True)
@click.option("--tree-size", callback=_tree_size, default="auto", show_default=True, help="Nodes per step, or 'auto'.")
@click.option("--stop", multiple=True, metavar="TEXT", help="End before this text; may be given several times.")
@click.option(
    "--stop-token-id",
    "stop_token_ids",
    multiple=True,
    type=click.IntRange(0),
    metavar="ID",
    help="End at this token too; may be given several times.",
)
@click.option("--temperature", type=float, help="Sample at this temperature; greedy without any of these options.")
@click.option("--top-k", type=int, help="Sample from so many of the best tokens.")
@click.option("--top-p", type=float, help="Sample from the best tokens that together have this probability.")
@click.option("--min-p", type=float, help="Sample from tokens with this part of the best one's probability.")
@click.option("--seed", type=int, help="The same seed samples the same tokens.")
@click.option("--typical", is_flag=True, help="Sample with typical acceptance: fewer steps, another distribution.")
@click.option("--logprobs", is_flag=True, help="Add the tokens' log probabilities to --json.")
@click.option(
    "--lookup/--no-lookup", default=True, show_default=True, help="Also guess what followed before in the text."
)
@click.option("--backend", default="auto", show_default=True)
@click.option("--threads", type=click.IntRange(1), help="CPU threads; by default all.")
@click.option("--json", "as_json", is_flag=True, help="Print the result and its statistics as JSON instead.")
def command(
    bundle: Path,
    prompt: str,
    chat: bool,
    system: str | None,
    ids: bool,
    max_new_tokens: int,
    tree_size: int | str,
    stop: tuple[str, ...],
    stop_token_ids: tuple[int, ...],
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    seed: int | None,
    typical: bool,
    logprobs: bool,
    lookup: bool,
    backend: str,
    threads: int | None,
    as_json: bool,
) -> None:
    """Answer PROMPT with BUNDLE; '-' reads the prompt from standard input."""
    with extra("cpu"):
        from medusa_runtime.engine import MedusaEngine
        from medusa_runtime.sampling import SamplingParams

    asked: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "seed": seed}
    asked |= {"acceptance": "typical" if typical else None}
    given: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    text = _read_prompt() if prompt == "-" else prompt
    request: Any = _token_ids(text) if ids else text
    if ids and (chat or system is not None):
        raise click.UsageError("--ids gives the whole prompt: drop it, or drop --chat and --system.")
    if chat or system is not None:
        request = [{"role": "system", "content": system}] if system is not None else []
        request.append({"role": "user", "content": text})
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "tree_size": tree_size, "stop": stop}
    options |= {"stop_token_ids": stop_token_ids}
    options |= {"sampling": SamplingParams(**given) if given else None, "logprobs": logprobs, "lookup": lookup}
    with MedusaEngine.load(bundle, backend, threads=threads) as engine:
        stream = engine.stream(request, **options)
        for chunk in stream:
            if not as_json:
                click.echo(chunk.text if engine.tokenizer else " ".join(map(str, chunk.token_ids)) + " ", nl=False)
        result = stream.result()
    stats = result.stats
    if as_json:
        figures = {
            "text": result.text,
            "token_ids": result.token_ids,
            **({"logprobs": result.logprobs} if logprobs else {}),
            "finish_reason": result.finish_reason,
            "stats": {
                "prompt_tokens": stats.prompt_tokens,
                "completion_tokens": stats.completion_tokens,
                "steps": stats.steps,
                "tokens_per_step": stats.tokens_per_step,
                "tokens_per_second": stats.tokens_per_second,
                "accepted_lengths": dict(sorted(stats.accepted_lengths.items())),
                "prefill_seconds": stats.prefill_seconds,
                "decode_seconds": stats.decode_seconds,
                "nodes_per_step": stats.nodes_per_step,
            },
        }
        click.echo(json.dumps(figures, indent=1, ensure_ascii=False))
        return
    click.echo()
    click.echo(
        f"[{stats.completion_tokens} tokens, {stats.tokens_per_second:.1f} tokens/s, "
        f"{stats.tokens_per_step:.2f} tokens/step with {stats.nodes_per_step:.2g} nodes]",
        err=True,
    )


def _token_ids(text: str) -> list[int]:
    parts = text.replace(",", " ").split()
    wrong = next((part for part in parts if not (part.isascii() and part.isdigit() and len(part) < 20)), None)
    if wrong is not None:
        raise click.UsageError(f"{wrong!r} is no token id: give whole numbers, separated by commas or spaces.")
    return [int(part) for part in parts]


def _read_prompt() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise click.UsageError(f"The prompt on standard input is not valid UTF-8 (byte {error.start}).") from error
