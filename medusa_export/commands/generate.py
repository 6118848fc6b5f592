"""``medusa-export generate``: answer a prompt with a bundle, streaming."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from medusa_export.commands.command import Command
from medusa_export.common.extras import extra
from medusa_runtime.bundles.contract import MAX_TOP_LOGPROBS

if TYPE_CHECKING:
    from medusa_runtime import GenerationResult, SamplingParams

_SAMPLING_OPTIONS = ("temperature", "top_k", "top_p", "min_p", "seed")


def _tree_size(_: click.Context, __: click.Parameter, value: str) -> int | str:
    if value == "auto":
        return value
    try:
        return int(value)
    except ValueError:
        raise click.BadParameter(f"{value!r} is neither a number nor 'auto'.") from None


@click.command("generate", cls=Command)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("prompt")
@click.option("--chat", is_flag=True, help="Give the prompt as a user's message, through the chat template.")
@click.option("--system", metavar="TEXT", help="A system message before the prompt; implies --chat.")
@click.option("--ids", is_flag=True, help="PROMPT is token ids, separated by commas or spaces.")
@click.option(
    "-n",
    "--max-new-tokens",
    type=click.IntRange(1),
    default=128,
    show_default=True,
    help="Largest number of tokens of the answer.",
)
@click.option("--tree-size", callback=_tree_size, default="auto", show_default=True, help="Nodes per step, or 'auto'.")
@click.option("--stop", multiple=True, metavar="TEXT", help="End before this text. May be given more than once.")
@click.option(
    "--stop-token-id",
    "stop_token_ids",
    multiple=True,
    type=click.IntRange(0),
    metavar="ID",
    help="End at this token, too. May be given more than once.",
)
@click.option(
    "--temperature", type=float, help="Sample at this temperature. Without sampling options, decode greedily."
)
@click.option("--top-k", type=int, help="Sample from this number of the most likely tokens.")
@click.option("--top-p", type=float, help="Sample from the most likely tokens that have this probability together.")
@click.option("--min-p", type=float, help="Sample from tokens with at least this share of the best one's probability.")
@click.option("--seed", type=int, help="Seed of sampling. The same seed gives the same tokens.")
@click.option("--typical", is_flag=True, help="Sample with typical acceptance: fewer steps, another distribution.")
@click.option("--logprobs", is_flag=True, help="Add the tokens' log probabilities to --json.")
@click.option(
    "--top-logprobs",
    type=click.IntRange(0, MAX_TOP_LOGPROBS),
    default=0,
    help="With --logprobs, also add this number of the most likely tokens in each place.",
)
@click.option(
    "--lookup/--no-lookup", default=True, show_default=True, help="Also propose tokens by lookup in the text."
)
@click.option("--backend", default="auto", show_default=True, help="The backend that runs BUNDLE.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads. [default: all]")
@click.option("--json", "as_json", is_flag=True, help="Print the result and its statistics as JSON instead.")
def command(
    bundle: Path,
    prompt: str,
    chat: bool,
    system: str | None,
    ids: bool,
    stop: tuple[str, ...],
    typical: bool,
    backend: str,
    threads: int | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Answer PROMPT with BUNDLE. If PROMPT is '-', it is read from standard input."""
    text = _read_prompt() if prompt == "-" else prompt
    request = _request(text, system, chat=chat, ids=ids)
    with extra("cpu"):
        from medusa_runtime import MedusaEngine

        sampling = _sampling({name: options.pop(name) for name in _SAMPLING_OPTIONS}, typical=typical)
        engine = MedusaEngine.load(bundle, backend, threads=threads)
    with engine:
        stream = engine.stream(request, stop=stop, sampling=sampling, **options)
        for chunk in stream:
            if not as_json:
                click.echo(chunk.text if engine.tokenizer else " ".join(map(str, chunk.token_ids)) + " ", nl=False)
        result = stream.result()
    if as_json:
        click.echo(json.dumps(_figures(result), indent=1, ensure_ascii=False))
        return
    stats = result.stats
    click.echo()
    click.echo(
        f"[{stats.completion_tokens} tokens, {stats.tokens_per_second:.1f} tokens/s, "
        f"{stats.tokens_per_step:.2f} tokens/step with {stats.nodes_per_step:.2g} nodes]",
        err=True,
    )


def _request(text: str, system: str | None, *, chat: bool, ids: bool) -> str | list[int] | list[dict[str, str]]:
    """Returns the prompt as the engine takes it: a text, token ids or messages."""
    if ids and (chat or system is not None):
        raise click.UsageError("--ids gives the whole prompt: drop it, or drop --chat and --system.")
    if ids:
        return _token_ids(text)
    if not chat and system is None:
        return text
    messages = [{"role": "system", "content": system}] if system is not None else []
    return [*messages, {"role": "user", "content": text}]


def _sampling(asked: Mapping[str, Any], *, typical: bool) -> SamplingParams | None:
    """Returns sampling parameters from the options that are given; None if none is.

    Args:
        asked: The options of ``_SAMPLING_OPTIONS``; None for one that is not given.
        typical: True for typical acceptance.
    """
    from medusa_runtime import SamplingParams

    given = {name: value for name, value in asked.items() if value is not None}
    if typical:
        given["acceptance"] = "typical"
    return SamplingParams(**given) if given else None


def _figures(result: GenerationResult) -> dict[str, Any]:
    """Returns a result and its statistics for JSON."""
    stats = result.stats
    return {
        "text": result.text,
        "token_ids": result.token_ids,
        **{
            name: values
            for name, values in (("logprobs", result.logprobs), ("top_logprobs", result.top_logprobs))
            if values is not None
        },
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
