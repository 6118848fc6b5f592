"""``medusa-export onnx``: load a model and heads, trace the step, write a bundle."""

from __future__ import annotations

from pathlib import Path

import click

from medusa_export.commands.options import DTYPES, Progress, extra


@click.command("onnx")
@click.argument("model")
@click.option("--heads", metavar="PATH", help="Heads to attach: a file, a folder or a hub id, in any published format.")
@click.option("--init-heads", type=click.IntRange(1, 16), metavar="K", help="Attach K fresh, untrained heads.")
@click.option("--no-heads", is_flag=True, help="Plain decoding: a tree of one node.")
@click.option(
    "--tree", default="default", show_default=True, help="A reference tree's name, or a JSON file of rank paths."
)
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    help="What 'calibrate' measured: the default tree is then the best one for these heads, and the runtime knows "
    "what to expect of it.",
)
@click.option(
    "--tree-size", type=click.IntRange(1), default=64, show_default=True, help="Of the tree by --calibration."
)
@click.option("--top-k", type=click.IntRange(1), default=10, show_default=True, help="Candidates per head.")
@click.option("--greedy-only", is_flag=True, help="Leave out sampling and log probabilities: a leaner graph.")
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="fp32", show_default=True, help="Weights and cache.")
@click.option("--no-tokenizer", is_flag=True, help="Leave the tokenizer out: the bundle takes and gives token ids.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder to write the bundle to.")
@click.option("--overwrite", is_flag=True, help="Replace a bundle that is there.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
def command(  # noqa: PLR0912, PLR0915  # what it does is a list
    model: str,
    heads: str | None,
    init_heads: int | None,
    no_heads: bool,
    tree: str,
    calibration: Path | None,
    tree_size: int,
    top_k: int,
    greedy_only: bool,
    dtype: str,
    no_tokenizer: bool,
    output: Path,
    overwrite: bool,
    quiet: bool,
) -> None:
    """Compile MODEL to an ONNX bundle.

    MODEL is a Hugging Face folder, a hub id, or a .gguf file. Exactly one of --heads, --init-heads and
    --no-heads says what drafts.
    """
    if sum((heads is not None, init_heads is not None, no_heads)) != 1:
        raise click.UsageError(
            "Say what drafts, with exactly one of: --heads PATH (trained heads; a merged MEDUSA-2 model holds its own: "
            "give its folder), --init-heads K (fresh ones, to try the pipeline), --no-heads (plain decoding)."
        )
    if no_heads and tree != "default":
        raise click.UsageError("--tree needs heads to draft from: drop it, or drop --no-heads.")
    if calibration is not None and heads is None:
        raise click.UsageError("--calibration is of trained heads: give them with --heads.")
    progress = Progress(quiet=quiet)
    progress("starting")
    with extra("export"):
        import torch

        from medusa_export.common.files import check_target
        from medusa_export.graph.export import build_graph
        from medusa_export.heads.base import DraftHeads
        from medusa_export.heads.files import load_heads
        from medusa_export.heads.modules import MedusaHeads
        from medusa_export.models.checkpoints import check_fast, load_model, load_tokenizer
        from medusa_export.models.end_tokens import EndTokens
        from medusa_export.models.files import Place
        from medusa_export.models.generation_settings import kept_settings, settings_warnings
        from medusa_export.models.gguf.cache import gguf_cache
        from medusa_export.models.supported import check_supported
        from medusa_export.step.attention import ATTENTION_NAME
        from medusa_export.step.step import MedusaStep
        from medusa_export.step.weight_range import check_weights
        from medusa_export.targets.bundle_writer import write_bundle
        from medusa_export.trees.calibration import Calibration
        from medusa_export.trees.named import NamedTree, load_tree
        from medusa_export.trees.prior import prior_acceptance
        from medusa_runtime.bundles.tree import Tree

    check_target(output, replace_existing=overwrite)
    measured = Calibration.load(calibration) if calibration is not None else None
    progress(f"loading {model}")
    with gguf_cache():
        base = load_model(model, dtype=getattr(torch, DTYPES[dtype]), attn_implementation=ATTENTION_NAME)
        check_supported(base)
        tokenizer = None if no_tokenizer else load_tokenizer(model)
        if tokenizer is not None:
            check_fast(tokenizer)
        ends = EndTokens(base, tokenizer)
    for warning in (*ends.warnings, *settings_warnings(kept_settings(base.generation_config))):
        click.echo(f"warning: {warning}", err=True)

    attached: DraftHeads | None = None
    if heads is not None:
        progress(f"loading heads from {heads}")
        attached = load_heads(heads, base)
        if measured is not None and len(measured.accuracies) != attached.config.num_heads:
            raise click.UsageError(
                f"{calibration} is of {len(measured.accuracies)} heads, but these are {attached.config.num_heads}: "
                "calibrate these."
            )
    elif init_heads is not None:
        attached = MedusaHeads.fresh(init_heads, base.get_output_embeddings())
    if attached is None:
        chosen = NamedTree("single node", Tree())
    else:
        chosen = load_tree(
            tree,
            num_heads=attached.config.num_heads,
            top_k=min(top_k, attached.config.draft_vocab_size),
            calibration=measured,
            size=tree_size,
        )
        in_use = min(chosen.tree.max_depth, attached.config.num_heads)
        attached = attached.truncated(in_use) if in_use else None
    if measured is not None:
        acceptance = measured.acceptance(chosen.tree)
    else:
        acceptance = prior_acceptance(chosen.tree, trained=heads is not None)

    step = MedusaStep(base, attached, chosen.tree, sampling=not greedy_only).eval()
    progress("checking weights")
    check_weights(step, model)
    graph = build_graph(step, progress)
    progress(f"writing {output}")
    bundle = write_bundle(
        graph,
        step,
        tokenizer,
        output,
        name=Place.of(model).name,
        tree_name=chosen.name,
        acceptance=acceptance,
        trained=heads is not None,
        replace_existing=overwrite,
        end_tokens=ends,
    )
    for note in bundle.notes:
        click.echo(f"note: {note}", err=True)
    progress("done")
