"""``medusa-export verify``: hold a bundle against PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from medusa_export.commands.options import Failure, NotRun, Progress, extra, sizes, sizes_or_full

PROMPTS = (
    "Write a short story about a clockmaker who repairs time itself.",
    "Explain how a vaccine trains the immune system, step by step.",
    'def fibonacci(n):\n    """Return the n-th Fibonacci number."""\n',
    "The three largest cities of Japan are",
    "Translate to French: The weather is lovely today, isn't it?",
    "List the planets of the solar system with one fact about each.",
)


@click.command("verify")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--model", required=True, help="What the bundle was exported from: a folder, a hub id or a .gguf file.")
@click.option("--heads", metavar="PATH", help="The heads that it was exported with, if they were trained.")
@click.option(
    "--prompts",
    type=click.Path(path_type=Path),
    help="A file of prompts, one per line; by default a few built-in ones.",
)
@click.option("-n", "--max-new-tokens", type=click.IntRange(2), default=32, show_default=True)
@click.option("--tree-sizes", callback=sizes_or_full, help="Such as 1,4,full; by default 1, a middle one and all.")
@click.option(
    "--prefill-chunks", callback=sizes, default="512,5", show_default=True, help="Tokens of a prompt per step."
)
@click.option("--margin", type=click.FloatRange(0), help="Logits no further apart are a tie; by default by dtype.")
@click.option(
    "--backend",
    help="Check this backend instead: tensorrt or tensorrt-rtx with a compiled engine for BUNDLE, onnxruntime-cuda.",
)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write a report here.")
@click.option("--junit", "junit_path", type=click.Path(path_type=Path), help="Write a JUnit report here.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
def command(
    bundle: Path,
    model: str,
    heads: str | None,
    prompts: Path | None,
    max_new_tokens: int,
    tree_sizes: list[int | str] | None,
    prefill_chunks: list[int],
    margin: float | None,
    backend: str | None,
    json_path: Path | None,
    junit_path: Path | None,
    quiet: bool,
) -> None:
    """Check BUNDLE against PyTorch: logits, every integer of a step, and whole generations.

    PyTorch's weights are checked against the files that they were read from.

    Exit code 1 if anything differs by more than rounding explains, or if nothing was compared; 3 if --backend can't run
    on this machine, for want of a GPU say.
    """
    progress = Progress(quiet=quiet)
    progress("starting")
    with extra("export"):
        from dataclasses import replace

        from rich.console import Console

        from medusa_export.common.files import write_text
        from medusa_export.step.reference import load_reference, prompt_ids
        from medusa_export.verification.backend import verify_backend
        from medusa_export.verification.bundle import verify_bundle
        from medusa_export.verification.checks import Tolerances
        from medusa_export.verification.report import as_json, as_junit, as_table
        from medusa_export.verification.weights import weights_check
        from medusa_runtime.bundles.bundle import Bundle
        from medusa_runtime.bundles.compiled import require_bundle

    if backend is None:
        require_bundle(bundle)
    opened = Bundle.load(bundle)
    texts = _read_prompts(prompts) if prompts is not None else PROMPTS
    ids = prompt_ids(opened, texts, chosen=prompts is not None)
    progress(f"loading {model}")
    step = load_reference(opened, model, heads)
    tolerances = Tolerances.of(opened.dtype)
    if margin is not None:
        tolerances = replace(tolerances, margin=margin)
    chosen = [opened.tree.size if size == "full" else int(size) for size in tree_sizes] if tree_sizes else None
    for size in chosen or ():
        if size > opened.tree.size:
            raise click.UsageError(f"--tree-sizes holds {size}, but this bundle's tree has {opened.tree.size} nodes.")
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "tree_sizes": chosen,
        "prefill_chunks": prefill_chunks,
        "tolerances": tolerances,
        "progress": progress,
    }
    if backend is None:
        outcome = verify_bundle(opened, step, ids, **options)
    else:
        outcome = verify_backend(opened, backend, step, ids, **options)
    progress("comparing weights with their files")
    outcome = replace(outcome, checks=[weights_check(model, step.model, opened.dtype), *outcome.checks])
    progress("done")
    if json_path is not None:
        write_text(json_path, as_json(outcome))
    if junit_path is not None:
        write_text(junit_path, as_junit(outcome))
    if outcome.not_run is not None:
        raise NotRun(outcome.not_run)
    console = Console()
    console.print(as_table(outcome))
    for check in outcome.checks:
        for note in check.notes:
            console.print(f"{check.name}: {note}", highlight=False)
    limits = outcome.tolerances
    console.print(
        f"Tolerances ({opened.dtype}): max abs {limits.max_abs:g}, cosine {limits.cosine:g}, norm ratio ±"
        f"{limits.norm_ratio:g}; choices between logits within {limits.margin:g} are ties."
    )
    if not outcome.passed:
        raise Failure(f"{bundle} differs from its reference: see the checks marked FAIL.")


def _read_prompts(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise click.UsageError(f"The prompts in {path} can't be read: {error}.") from error
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise click.UsageError(f"{path} holds no prompts: give one per line.")
    return found
