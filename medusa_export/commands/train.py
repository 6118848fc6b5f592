"""``medusa-export train``: train heads on what a model wrote."""

from __future__ import annotations

import json
from pathlib import Path

import click

from medusa_export.cli import DTYPES, Progress, extra


@click.command("train")
@click.argument("model")
@click.option(
    "--data", type=click.Path(path_type=Path), required=True, help="What 'distill' wrote, or a file of conversations."
)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder of the heads.")
@click.option("--recipe", type=click.Choice(["medusa1"]), default="medusa1", show_default=True)
@click.option("--num-heads", type=click.IntRange(1, 16), default=4, show_default=True)
@click.option("--num-layers", type=click.IntRange(1), default=1, show_default=True, help="Residual blocks per head.")
@click.option(
    "--conditioned/--plain",
    default=True,
    show_default=True,
    help="Give heads the token that the base model has just chosen, or the hidden state alone as in the paper.",
)
@click.option("--draft-vocab", type=click.IntRange(1), help="Let heads propose only so many tokens, the most frequent.")
@click.option("--own-projections", is_flag=True, help="A trained output projection per head, as in the paper.")
@click.option("--epochs", type=click.FloatRange(0, min_open=True), default=5.0, show_default=True)
@click.option("--learning-rate", type=click.FloatRange(0, min_open=True), default=2e-3, show_default=True)
@click.option(
    "--soft",
    type=click.FloatRange(0, 1),
    default=0.0,
    show_default=True,
    help="How much of the loss asks for the base model's distribution instead of its token alone.",
)
@click.option("--batch-size", type=click.IntRange(1), default=2048, show_default=True, help="Positions per step.")
@click.option("--max-length", type=click.IntRange(3), default=2048, show_default=True, help="Tokens of a conversation.")
@click.option("--limit", type=click.IntRange(1), help="Conversations to train on, at most.")
@click.option("--heldout", type=click.FloatRange(0, 1), default=0.05, show_default=True, help="If --data is a file.")
@click.option("--save-dtype", type=click.Choice(list(DTYPES)), default="fp16", show_default=True, help="Of the file.")
@click.option("--dtype", type=click.Choice(list(DTYPES)), help="Of the base model. [default: bf16 on a GPU, else fp32]")
@click.option("--bf16/--no-bf16", default=None, help="Matrix products of the training in bf16. [default: on a GPU]")
@click.option("--seed", default=0, show_default=True)
@click.option("--device", help="Such as cuda:1. [default: the GPU, if there is one]")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
def command(
    model: str,
    data: Path,
    output: Path,
    recipe: str,
    num_heads: int,
    num_layers: int,
    conditioned: bool,
    draft_vocab: int | None,
    own_projections: bool,
    epochs: float,
    learning_rate: float,
    soft: float,
    batch_size: int,
    max_length: int,
    limit: int | None,
    heldout: float,
    save_dtype: str,
    dtype: str | None,
    bf16: bool | None,
    seed: int,
    device: str | None,
    quiet: bool,
) -> None:
    """Train heads for MODEL.

    Interrupted, the same command goes on from the last checkpoint in OUTPUT. The heads load with
    'medusa-export onnx --heads OUTPUT'.
    """
    progress = Progress(quiet=quiet)
    with extra("train"):
        import torch
        from rich.console import Console

        from medusa_export.checkpoints import load_model
        from medusa_export.files import write_text
        from medusa_export.head_files import save_heads
        from medusa_export.heads import MedusaHeads
        from medusa_export.plots import plot_training
        from medusa_export.training.conversations import load_chat_tokenizer
        from medusa_export.training.dataset import load_splits
        from medusa_export.training.features import FeatureKey, compute_features, frequent_tokens
        from medusa_export.training.medusa1 import Recipe, train_medusa1
        from medusa_export.training.report import accuracy_table, held_out

    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    kind = DTYPES[dtype or ("bf16" if place.type == "cuda" else "fp32")]
    splits = load_splits(data, heldout=heldout, limit=limit)
    progress(f"loading {model}")
    tokenizer = load_chat_tokenizer(model)
    base = load_model(model, dtype=getattr(torch, kind)).to(place)
    features = {
        split.name: compute_features(
            base,
            split.samples(tokenizer),
            output / "features" / split.name,
            FeatureKey(Path(model).name, split.sha256, num_heads, kind, max_length),
            name=split.name,
            quiet=quiet,
        )
        for split in splits
    }
    base = base.float()
    lm_head = base.get_output_embeddings()
    token_map = None
    if draft_vocab is not None:
        token_map = frequent_tokens(features["train"], draft_vocab, lm_head.out_features)
    heads = MedusaHeads.fresh(
        num_heads,
        lm_head,
        num_layers=num_layers,
        conditioned=conditioned,
        token_map=token_map,
        own_projections=own_projections,
    )
    if heads.projections is not None and not own_projections:
        heads.projections.requires_grad_(False)
    settings = Recipe(
        epochs=epochs,
        learning_rate=learning_rate,
        batch_size=batch_size,
        soft=soft,
        seed=seed,
        bf16=place.type == "cuda" if bf16 is None else bf16,
    )
    progress(f"training on {len(features['train']):,} positions, {len(features['heldout']):,} held out")
    history = train_medusa1(
        heads.to(place),
        base.get_input_embeddings(),
        lm_head,
        features["train"],
        features["heldout"],
        settings,
        output / "checkpoints",
        device=place,
        quiet=quiet,
    )
    save_heads(heads, output, base_model_name_or_path=model, dtype=getattr(torch, DTYPES[save_dtype]), lm_head=lm_head)
    write_text(output / "training.json", json.dumps({"recipe": recipe, "history": history}, indent=1) + "\n")
    plot_training(history, num_heads, output / "training.png")
    progress("done")
    Console().print(accuracy_table(held_out(history)[-1], num_heads))
