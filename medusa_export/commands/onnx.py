"""``medusa-export onnx``: compile a model with heads to a bundle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from medusa_export.commands.command import Command
from medusa_export.commands.options import (
    COUNT,
    PATH,
    option_with_default,
    output_option,
    overwrite_option,
    quiet_option,
    refuse_without_effect,
    text_only_option,
)
from medusa_export.commands.progress import shown_progress
from medusa_export.common import defaults
from medusa_export.common.dtypes import DTYPES, KV_CACHE_TYPES, WEIGHT_TYPES, Dtype, KvCacheType, WeightType
from medusa_runtime.common.collection import collection_paused

if TYPE_CHECKING:
    from medusa_export import WeightTypes

# The value of an option that leaves weights in the type of --dtype.
_UNCHANGED = "dtype"
_OWN_TYPE = click.Choice((_UNCHANGED, *WEIGHT_TYPES))


@click.command("onnx", cls=Command)
@click.argument("model")
@click.option("--heads", metavar="PATH", help="Trained heads: a file, a folder or a hub id, in any published format.")
@click.option(
    "--init-heads", type=click.IntRange(1, 16), metavar="K", help="Attach K untrained heads, to try the pipeline."
)
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
    "--dtype",
    kind=click.Choice(DTYPES),
    default=defaults.EXPORT_DTYPE,
    text="Type that the bundle computes in.",
)
@click.option(
    "--weights",
    type=click.Choice(WEIGHT_TYPES),
    help="Storage type of the matrices. int8, int4: integers with a scale per block, and embeddings as int8. fp16, "
    "bf16: cast to fp32 when the bundle is loaded. fp8: e4m3 with a scale per row, for engines. "
    "[default: the type of --dtype]",
)
@click.option(
    "--lm-head-weights",
    type=_OWN_TYPE,
    help="Storage type of the output projection; dtype is the type of --dtype. int4 also rounds a projection that the "
    "file holds in 8 bits, which --weights int4 alone keeps. [default: as --weights]",
)
@click.option(
    "--head-weights", type=_OWN_TYPE, help="Storage type of the projections of the heads. [default: as --weights]"
)
@click.option(
    "--embedding-weights",
    type=click.Choice((_UNCHANGED, "int8", *DTYPES)),
    help="Storage type of the input embeddings. [default: int8 with --weights int8 or int4; dtype with fp8]",
)
@option_with_default(
    "--block-size",
    kind=click.Choice(("16", "32", "64", "128")),
    default=str(defaults.BLOCK_SIZE),
    text="Columns of a matrix of integers that share a scale.",
)
@click.option(
    "--activations",
    type=PATH,
    help="A file of 'activations'. Products with int8 matrices then round their inputs to 8 bits, too.",
)
@click.option(
    "--symmetric/--asymmetric",
    default=None,
    help="--asymmetric gives each rounded block of int4 a zero point, which is more exact, and slower. --symmetric "
    "stores no zero points and offsets: blocks of a file that have some are rounded again. [default: keep the blocks "
    "of a file as they are, and round all others without zero points]",
)
@click.option(
    "--kv-cache",
    type=click.Choice(KV_CACHE_TYPES),
    help="Store keys and values as 8-bit integers with a scale per token and head. They take a quarter of the memory. "
    "Needs --dtype fp32. [default: the type of --dtype]",
)
@click.option(
    "--fused-attention",
    is_flag=True,
    help="Use ONNX Runtime's attention operators in a bundle with int8 or int4 weights. On CPUs steps are up to a "
    "quarter shorter, and answers may differ between tree sizes. 'verify' counts and bounds the differences.",
)
@click.option("--no-tokenizer", is_flag=True, help="Leave out the tokenizer. The bundle takes and gives token ids.")
@text_only_option
@output_option("The folder to write.")
@overwrite_option("a bundle")
@quiet_option
@click.pass_context
@collection_paused()  # what an export makes lives until it ends: collections would take a tenth of its time
def command(
    context: click.Context,
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
    weights: WeightType | None,
    lm_head_weights: str | None,
    head_weights: str | None,
    embedding_weights: str | None,
    block_size: str,
    activations: Path | None,
    symmetric: bool | None,
    kv_cache: KvCacheType | None,
    fused_attention: bool,
    no_tokenizer: bool,
    text_only: bool,
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
    own = {"lm_head": lm_head_weights, "heads": head_weights, "embeddings": embedding_weights}
    has_integers = not {weights, *own.values()}.isdisjoint(("int8", "int4"))
    refuse_without_effect(context, "top_k", needs="--heads or --init-heads", given=not no_heads)
    searches = calibration is not None and tree == defaults.TREE
    refuse_without_effect(context, "tree_size", needs="--calibration and the default tree", given=searches)
    for name in ("block_size", "symmetric", "fused_attention"):
        refuse_without_effect(context, name, needs="weights in int8 or int4", given=has_integers)
    from medusa_export import export

    with shown_progress(quiet=quiet) as on_progress:
        export(
            model,
            output,
            heads=heads,
            init_heads=init_heads,
            with_tokenizer=not no_tokenizer,
            text_only=text_only,
            tree=tree,
            calibration=calibration,
            tree_size=tree_size,
            top_k=top_k,
            sampling=not greedy_only,
            acceptance_rules=(*defaults.ACCEPTANCE_RULES, *rules),
            dtype=dtype,
            weights=_weight_types(weights, own, int(block_size), symmetric),
            activations=activations,
            kv_cache=kv_cache,
            fused_attention=fused_attention,
            overwrite=overwrite,
            on_progress=on_progress,
        )


def _weight_types(
    weights: WeightType | None, own: Mapping[str, str | None], block_size: int, symmetric: bool | None
) -> WeightTypes:
    """Returns the types of weights that the options ask for.

    Args:
        weights: The type of all matrices; None for the bundle's dtype.
        own: The types that parts have instead, by part; None for parts without an option.
        block_size: Columns that share a scale.
        symmetric: The flag ``--symmetric``; None if it is not given.
    """
    from medusa_export import WeightTypes

    types = WeightTypes.all(
        weights, block_size=block_size, symmetric=symmetric is not False, keep_zero_points=symmetric is not True
    )
    chosen: dict[str, Any] = {part: None if kind == _UNCHANGED else kind for part, kind in own.items() if kind}
    if own["lm_head"] == "int4":
        chosen["narrowed"] = frozenset({"lm_head"})
    return replace(types, **chosen)
