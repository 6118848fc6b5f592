"""``medusa-export heads``: files of heads."""

from __future__ import annotations

from pathlib import Path

import click

from medusa_export.commands.options import DTYPES, Progress, extra


@click.group("heads")
def command() -> None:
    """Files of heads."""


@command.command("convert")
@click.argument("model")
@click.option(
    "--heads", metavar="PATH", required=True, help="Heads in any published format: a file, a folder or a hub id."
)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The folder to write.")
@click.option(
    "--format",
    "layout",
    type=click.Choice(["own", "v0.1", "v2", "vllm"]),
    default="own",
    show_default=True,
    help="own: the smallest that holds all; the reference implementation's 0.1 or 2; or that of vLLM.",
)
@click.option("--dtype", type=click.Choice(list(DTYPES)), help="Of the file. [default: as it was]")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
def convert(model: str, heads: str, output: Path, layout: str, dtype: str | None, quiet: bool) -> None:
    """Write the heads of MODEL in another format."""
    progress = Progress(quiet=quiet)
    with extra("export"):
        import torch

        from medusa_export.heads.files import load_heads, stored_dtype
        from medusa_export.heads.writer import save_heads
        from medusa_export.models.checkpoints import load_model

    kind = stored_dtype(heads) if dtype is None else getattr(torch, DTYPES[dtype])
    progress(f"loading {model}")
    base = load_model(model, dtype=torch.float32)
    save_heads(
        load_heads(heads, base),
        output,
        base_model_name_or_path=model,
        dtype=kind,
        lm_head=base.get_output_embeddings(),
        layout=layout,
    )
    progress("done")
