"""``medusa-export onnx``: compile a model with heads to a bundle."""

from __future__ import annotations

from pathlib import Path

import click

from medusa_export.commands.command import Command
from medusa_export.commands.options import (
    COUNT,
    PATH,
    option_with_default,
    output_option,
    overwrite_option,
    quiet_option,
)
from medusa_export.commands.progress import shown_progress
from medusa_export.common import defaults
from medusa_export.common.dtypes import DTYPES, Dtype


@click.command("onnx", cls=Command)
@click.argument("model")
@click.option("--heads", metavar="PATH", help="Trained heads: a file, a folder or a hub id, in any published format.")
@click.option("--init-heads", type=click.IntRange(1, 16), metavar="K", help="Attach K fresh, untrained heads.")
@click.option("--no-heads", is_flag=True, help="Decode plainly, with a tree of one node.")
@click.option(
    "--tree",
    default=defaults.TREE,
    show_default=True,
    help="The draft tree: the name of a reference tree, or a JSON file of rank paths.",
)
@click.option(
    "--calibration",
    type=PATH,
    help="A file of 'calibrate'. The default tree is then the best one for these heads, and the runtime gets measured "
    "acceptance estimates.",
)
@option_with_default(
    "--tree-size", kind=COUNT, default=defaults.TREE_SIZE, text="Nodes of the tree that is searched with --calibration."
)
@option_with_default("--top-k", kind=COUNT, default=defaults.TOP_K, text="Candidates per head.")
@click.option(
    "--greedy-only", is_flag=True, help="Leave out sampling and log probabilities, which makes the graph smaller."
)
@click.option(
    "--acceptance-rule",
    "rules",
    metavar="NAME",
    multiple=True,
    help="Add an acceptance rule of an installed package to 'exact' and 'typical'. It may change the output.",
)
@option_with_default(
    "--dtype", kind=click.Choice(DTYPES), default=defaults.EXPORT_DTYPE, text="Type of weights and caches."
)
@click.option("--no-tokenizer", is_flag=True, help="Leave out the tokenizer. The bundle takes and gives token ids.")
@output_option("The folder to write.")
@overwrite_option("a bundle")
@quiet_option
def command(
    model: str,
    heads: str | None,
    init_heads: int | None,
    no_heads: bool,
    tree: str,
    calibration: Path | None,
    tree_size: int,
    top_k: int,
    greedy_only: bool,
    rules: tuple[str, ...],
    dtype: Dtype,
    no_tokenizer: bool,
    output: Path,
    overwrite: bool,
    quiet: bool,
) -> None:
    """Compile MODEL to an ONNX bundle.

    MODEL is a Hugging Face folder, a hub id, or a .gguf file. Give exactly one of --heads, --init-heads and --no-heads.
    """
    if sum((heads is not None, init_heads is not None, no_heads)) != 1:
        raise click.UsageError(
            "Give exactly one of: --heads PATH (trained heads; a merged MEDUSA-2 model holds its own, so give its "
            "folder), --init-heads K (fresh heads, to try the pipeline), --no-heads (plain decoding)."
        )
    from medusa_export import export

    with shown_progress(quiet=quiet) as on_progress:
        export(
            model,
            output,
            heads=heads,
            init_heads=init_heads,
            with_tokenizer=not no_tokenizer,
            tree=tree,
            calibration=calibration,
            tree_size=tree_size,
            top_k=top_k,
            sampling=not greedy_only,
            acceptance_rules=(*defaults.ACCEPTANCE_RULES, *rules),
            dtype=dtype,
            overwrite=overwrite,
            on_progress=on_progress,
        )
