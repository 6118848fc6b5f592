"""``medusa-export bench``: measure what the tree brings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from medusa_export.commands.options import Failure, Progress, extra, sizes

if TYPE_CHECKING:
    from medusa_export.benchmarks.bench import Paddock


@click.command("bench")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--tree-sizes", callback=sizes, help="Such as 4,8,16; by default a few, and what 'auto' chooses.")
@click.option(
    "--prompts", type=click.Path(path_type=Path), help="JSON lines of category and prompt; by default built-in ones."
)
@click.option("-n", "--max-new-tokens", type=click.IntRange(2), default=96, show_default=True)
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True)
@click.option("--threads", type=click.IntRange(1), help="Of every contestant. [default: all]")
@click.option("--plain", type=click.Path(path_type=Path), help="Also a bundle of the same model without heads.")
@click.option("--model", help="Also transformers' generate with this model.")
@click.option("--genai", type=click.Path(path_type=Path), help="Also onnxruntime-genai with the model in this folder.")
@click.option("--llama-cpp", type=click.Path(path_type=Path), help="Also llama.cpp with this GGUF file.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write a report here.")
@click.option("--markdown", type=click.Path(path_type=Path), help="Write tables here.")
@click.option("--plot", type=click.Path(path_type=Path), help="Write a plot of speed against tree size here, as PNG.")
@click.option("--compare", type=click.Path(path_type=Path), help="Fail if it falls behind this earlier report.")
@click.option("--tolerance", type=click.FloatRange(0), default=0.1, show_default=True, help="Of --compare.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
def command(
    bundle: Path,
    tree_sizes: list[int] | None,
    prompts: Path | None,
    max_new_tokens: int,
    repeats: int,
    threads: int | None,
    plain: Path | None,
    model: str | None,
    genai: Path | None,
    llama_cpp: Path | None,
    json_path: Path | None,
    markdown: Path | None,
    plot: Path | None,
    compare: Path | None,
    tolerance: float,
    quiet: bool,
) -> None:
    """Measure what the tree of BUNDLE brings: tokens per second, per step, and the price of a step.

    Everything is measured in turns, against plain decoding (tree size 1) in the same engine.
    """
    progress = Progress(quiet=quiet)
    with extra("export"):
        from rich.console import Console

        from medusa_export.benchmarks import bench as b
        from medusa_export.benchmarks.report import as_markdown, as_table, earlier_report, regressions
        from medusa_export.common.errors import DatasetError
        from medusa_export.common.files import write_text
        from medusa_export.common.progress import progress_bar
        from medusa_runtime.common.cpus import usable_cpus
        from medusa_runtime.engine import MedusaEngine

    if plot is not None:
        with extra("train"):
            from medusa_export.plots import plot_sizes

    threads = threads or usable_cpus()  # for everyone: others take one per physical core by themselves
    asked = b.bench_prompts(prompts)
    earlier = None if compare is None else earlier_report(compare)  # which may be what is written in the end
    progress(f"loading {bundle}")
    empty = b.resident()
    engine = MedusaEngine.load(bundle, threads=threads)
    if engine.tokenizer is None:
        raise DatasetError(f"{bundle} has no tokenizer to read prompts with.")
    tokenizer = engine.tokenizer
    ids = [tokenizer.encode_chat([{"role": "user", "content": p.prompt}]) for p in asked]
    measured_sizes = sorted(
        {1, *(tree_sizes or (s for s in (2, 4, 6, 8, 10, 12, 16, 32, 64) if s <= engine.bundle.tree.size))}
    )
    if measured_sizes[-1] > engine.bundle.tree.size:
        raise click.UsageError(
            f"--tree-sizes holds {measured_sizes[-1]}, but this bundle's tree has {engine.bundle.tree.size} nodes."
        )
    names = {size: f"tree size {size}" for size in measured_sizes}
    paddock = b.Paddock(ids[0], max_new_tokens)
    for size, name in names.items():
        paddock.add(name, partial(b.engine_contestant, engine, size), since=empty)
    paddock.add(b.AUTO, partial(b.engine_contestant, engine, "auto"), since=empty)
    if engine.bundle.tree.size > 1:
        heads_alone = partial(b.engine_contestant, engine, "auto", lookup=False)
        paddock.add(f"{b.AUTO}, no lookup", heads_alone, since=empty)
    _add_peers(
        paddock, threads, engine.bundle.model.eos_token_ids, plain=plain, genai=genai, llama_cpp=llama_cpp, model=model
    )
    with progress_bar("answering", len(ids) * repeats, quiet=quiet) as bar:
        answers = b.race(
            paddock.contestants, names[1], ids, max_new_tokens=max_new_tokens, repeats=repeats, told=bar.finish_piece
        )
    measured = b.speeds(answers, names[1], paddock.memory)
    categories = b.by_category(answers, [p.category for p in asked], b.AUTO, names[1])
    figures = b.report(measured, categories)
    for path, text in (
        (json_path, json.dumps(figures, indent=1) + "\n"),
        (markdown, as_markdown(measured, categories)),
    ):
        if path is not None:
            write_text(path, text)
    if plot is not None:
        plot_sizes({size: measured[name] for size, name in names.items()}, measured[b.AUTO], plot)
    Console().print(as_table(measured))
    click.echo(
        f"'auto' verifies {figures['tree_size']:.2g} nodes/step: {figures['tokens_per_step']:.2f} tokens/step, "
        f"{figures['speedup']:.2f} times the speed of plain decoding in the same engine."
    )
    if earlier is not None and (behind := regressions(figures, earlier, tolerance)):
        raise Failure(f"This falls behind {compare}: {'; '.join(behind)}.")


def _add_peers(
    paddock: Paddock,
    threads: int,
    end_tokens: Sequence[int],
    *,
    plain: Path | None,
    genai: Path | None,
    llama_cpp: Path | None,
    model: str | None,
) -> None:
    """Makes those ready that were asked for besides the bundle itself."""
    from medusa_export.benchmarks import bench as b
    from medusa_runtime.engine import MedusaEngine

    if plain is not None:
        paddock.add("without heads", lambda: b.engine_contestant(MedusaEngine.load(plain, threads=threads), 1))
    if genai is not None:
        with extra("bench"):
            paddock.add("onnxruntime-genai", lambda: b.genai_contestant(genai, threads))
    if llama_cpp is not None:
        with extra("llama-cpp"):
            paddock.add(b.LLAMA_CPP, lambda: b.llama_cpp_contestant(llama_cpp, threads))
    if model is not None:
        paddock.add("transformers", lambda: b.transformers_contestant(model, threads, end_tokens))
