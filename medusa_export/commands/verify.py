"""``medusa-export verify``: check a bundle against PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from medusa_export.commands.command import Command, Failure, NotRun
from medusa_export.commands.options import (
    PATH,
    option_with_default,
    quiet_option,
    sizes,
    sizes_or_full,
    text_only_option,
)
from medusa_export.commands.progress import shown_progress
from medusa_export.common import defaults

if TYPE_CHECKING:
    from medusa_export import Verification
    from medusa_export.verification.checks import Tolerances


@click.command("verify", cls=Command)
@click.argument("bundle", type=PATH)
@click.option("--model", required=True, help="The folder, hub id or .gguf file that the bundle was exported from.")
@click.option("--heads", metavar="PATH", help="The trained heads that the bundle was exported with.")
@text_only_option
@click.option("--prompts", type=PATH, help="A file of prompts, one per line. [default: built-in ones]")
@option_with_default(
    "-n",
    "--max-new-tokens",
    kind=click.IntRange(2),
    default=defaults.VERIFIED_TOKENS,
    text="Tokens to generate per prompt.",
)
@click.option(
    "--tree-sizes",
    callback=sizes_or_full,
    help="Tree sizes to decode with, such as 1,4,full. [default: 1, a middle one and full]",
)
@click.option(
    "--prefill-chunks",
    callback=sizes,
    default=",".join(map(str, defaults.PREFILL_CHUNKS)),
    show_default=True,
    help="Chunk sizes to take prompts in with, in tokens per step.",
)
@click.option(
    "--margin", type=click.FloatRange(0), help="Largest difference of two logits that is a tie. [default: by dtype]"
)
@click.option(
    "--backend",
    help="Check this backend instead of ONNX Runtime on the CPU: onnxruntime-cuda, or tensorrt or tensorrt-rtx if "
    "BUNDLE is a compiled engine.",
)
@click.option(
    "--offload",
    type=PATH,
    metavar="FOLDER",
    help="Keep the reference's weights in this folder, in four bytes each, while the check runs: for models that don't "
    "fit in memory.",
)
@click.option("--json", "json_path", type=PATH, help="Write a JSON report to this file.")
@click.option("--junit", "junit_path", type=PATH, help="Write a JUnit report to this file.")
@quiet_option
def command(
    bundle: Path,
    model: str,
    heads: str | None,
    text_only: bool,
    prompts: Path | None,
    max_new_tokens: int,
    tree_sizes: tuple[int | Literal["full"], ...] | None,
    prefill_chunks: tuple[int, ...],
    margin: float | None,
    backend: str | None,
    offload: Path | None,
    json_path: Path | None,
    junit_path: Path | None,
    quiet: bool,
) -> None:
    """Check BUNDLE against PyTorch: logits, every integer of a step, and whole generations.

    PyTorch's weights are compared with the files that they were read from.

    The exit code is 1 if anything differs by more than rounding explains, or if nothing was compared. It is 3 if this
    machine can't run --backend, for example because it has no GPU.
    """
    with shown_progress(quiet=quiet) as on_progress:
        from medusa_export import verify
        from medusa_export.common.files import check_files, write_text
        from medusa_export.verification.report import as_json, as_junit
        from medusa_export.verification.verify import read_prompts

        check_files(json_path, junit_path)
        outcome = verify(
            bundle,
            model,
            heads=heads,
            text_only=text_only,
            prompts=None if prompts is None else read_prompts(prompts),
            max_new_tokens=max_new_tokens,
            tree_sizes=tree_sizes,
            prefill_chunks=prefill_chunks,
            margin=margin,
            backend=backend,
            offload=offload,
            on_progress=on_progress,
        )
    if json_path is not None:
        write_text(json_path, as_json(outcome))
    if junit_path is not None:
        write_text(junit_path, as_junit(outcome))
    if outcome.not_run is not None:
        raise NotRun(outcome.not_run)
    _print(outcome)
    if not outcome.passed:
        raise Failure(f"{bundle} differs from its reference: see the checks marked FAIL.")


def _print(outcome: Verification) -> None:
    from rich.console import Console

    from medusa_export.verification.report import as_table

    console = Console()
    console.print(as_table(outcome))
    for check in outcome.checks:
        for note in check.notes:
            console.print(f"{check.name}: {note}", highlight=False)
    console.print(f"Tolerances: {_words(outcome.tolerances)}.", highlight=False)
    if outcome.rounded is not None:
        console.print(f"Where products may round their inputs to 8 bits: {_words(outcome.rounded)}.", highlight=False)


def _words(limits: Tolerances) -> str:
    outliers = f", for all but {limits.outliers:.0%} of the tokens" if limits.outliers else ""
    return (
        f"max abs {limits.max_abs:g}, cosine {limits.cosine:g}, norm ratio ±{limits.norm_ratio:g}{outliers}; choices "
        f"between logits within {limits.margin:g} are ties"
    )
