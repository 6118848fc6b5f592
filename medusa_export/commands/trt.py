"""``medusa-export trt``: compile a bundle to a TensorRT engine."""

from __future__ import annotations

from pathlib import Path

import click

from medusa_export.commands.options import Progress, extra

FLAVORS = ("auto", "tensorrt", "tensorrt-rtx")


@click.command("trt")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder to write the engine to.")
@click.option(
    "--flavor", type=click.Choice(FLAVORS), default="auto", show_default=True, help="By default what is installed."
)
@click.option(
    "--target",
    metavar="LIST",
    help="Architectures to build for ahead of time, such as sm86,sm89; by default this machine's GPU.",
)
@click.option("--max-batch", type=click.IntRange(1), default=4, show_default=True, help="Sequences at a time.")
@click.option(
    "--max-seq-len",
    type=click.IntRange(1),
    help="Slots per sequence in the caches: prompt, answer, and those for the tree in flight. By default what the "
    "model's positions need, at most 4096.",
)
@click.option("--max-prefill", type=click.IntRange(1), help="Tokens of a prompt per step; by default at most 512.")
@click.option("--opt-level", type=click.IntRange(0, 5), default=3, show_default=True, help="Of the builder.")
@click.option(
    "--timing-cache",
    type=click.Path(path_type=Path),
    help="Keep here, for later builds, what was measured on this GPU; tensorrt only.",
)
@click.option("--overwrite", is_flag=True, help="Replace an engine that is there.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
def command(
    bundle: Path,
    output: Path,
    flavor: str,
    target: str | None,
    max_batch: int,
    max_seq_len: int | None,
    max_prefill: int | None,
    opt_level: int,
    timing_cache: Path | None,
    overwrite: bool,
    quiet: bool,
) -> None:
    """Compile BUNDLE to a TensorRT engine, in a folder that the runtime loads like a bundle.

    With --target this needs no GPU. The caches have the bundle's dtype: export with --dtype fp16.
    """
    progress = Progress(quiet=quiet)
    progress("starting")
    with extra("export"):
        from medusa_export.common.progress import progress_bar
        from medusa_export.targets.tensorrt.build import BuildOptions, choose_limits, parse_targets, write_engine
        from medusa_runtime.backends.tensorrt.library import import_tensorrt
        from medusa_runtime.bundles.bundle import Bundle
        from medusa_runtime.bundles.compiled import require_bundle

    library = import_tensorrt(flavor)
    targets = parse_targets(library, target) if target is not None else ()
    require_bundle(bundle)
    opened = Bundle.load(bundle)
    if opened.dtype == "float32":
        progress("weights and caches will be fp32, as the bundle's: export it with --dtype fp16 for half of the memory")
    limits = choose_limits(opened, max_batch=max_batch, max_seq_len=max_seq_len, max_prefill=max_prefill)
    options = BuildOptions(limits, targets, opt_level, timing_cache)
    with progress_bar(f"{library.flavor} {library.version}", 100, quiet=quiet) as bar:
        engine = write_engine(
            library,
            opened,
            options,
            output,
            replace_existing=overwrite,
            progress=progress,
            fraction=lambda part: bar.reach(int(100 * part)),
        )
    longest = limits.longest_sequence(opened.tree.size, opened.tree.max_depth)
    progress(
        f"done: {engine.files['model.engine'].size / 2**20:,.0f} MiB from {sum(engine.layers.values()):,} layers, "
        f"for {', '.join(engine.targets)}; up to {limits.max_batch} sequences of {longest:,} tokens"
    )
