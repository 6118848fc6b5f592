"""``medusa-export inspect``: show what is in a bundle."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from medusa_export.commands.command import Command
from medusa_export.common.extras import extra
from medusa_runtime.errors import BundleError

if TYPE_CHECKING:
    from rich.table import Table

    from medusa_runtime.bundles.bundle import Bundle
    from medusa_runtime.bundles.compiled import CompiledEngine
    from medusa_runtime.bundles.contract import TensorSpec


@click.command("inspect", cls=Command)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead.")
def command(bundle: Path, as_json: bool) -> None:
    """Show what is in BUNDLE, or in a compiled engine: model, heads, tree, inputs and outputs, size, operators."""
    with extra("export"):
        from onnx import load
        from rich.console import Console

        from medusa_runtime.bundles.bundle import ENGINE_DESCRIPTION, GRAPHS, Bundle
        from medusa_runtime.bundles.compiled import ENGINE, CompiledEngine, is_engine

        opened = Bundle.load(bundle, check_digests=False)
        engine = CompiledEngine.load(bundle, check_digests=False) if is_engine(bundle) else None
        ops = {name: _operators(bundle / name, load) for name in GRAPHS if name in opened.files and engine is None}
    if as_json:
        description = json.loads(opened.to_json())
        description["operators"] = {name: dict(counts.most_common()) for name, counts in ops.items()}
        if engine is not None:
            description["engine"] = json.loads((bundle / ENGINE_DESCRIPTION).read_text(encoding="utf-8"))
        click.echo(json.dumps(description, indent=1))
        return
    console = Console()
    console.print(_facts(opened, engine))
    console.print("\n[bold]Tree[/bold] (rank among the head's candidates, #node)\n")
    console.print(opened.tree.draw(), highlight=False)
    console.print(_tensors(opened))
    for line in _graphs(opened, ops):
        console.print(line, highlight=False)
    if engine is not None and engine.rewrites:
        console.print(f"[bold]{ENGINE}[/bold]: rewrites: {_applied(engine.rewrites)}", highlight=False)


def _facts(bundle: Bundle, engine: CompiledEngine | None) -> Table:
    """Returns a table about the model, the heads, the tree, the files and the engine."""
    from rich.table import Table
    from rich.text import Text

    from medusa_runtime.backends.tensorrt.memory import DeviceMemory

    model, heads, tree = bundle.model, bundle.heads, bundle.tree
    facts = Table.grid(padding=(0, 2))
    facts.add_row("model", f"{model.name} ({model.model_type}), {bundle.dtype}")
    facts.add_row("", f"{model.num_layers} layers, {_states(bundle)}; {bundle.entry_bytes / 1024:,.1f} KiB per token")
    facts.add_row("", f"vocabulary {model.vocab_size:,}, up to {model.max_positions:,} positions")
    for name, text in _stored(bundle):
        facts.add_row(name, Text(text))
    for name, text in _answering(bundle):
        facts.add_row(name, Text(text))
    if heads is None:
        facts.add_row("heads", "none: plain decoding")
    else:
        facts.add_row("heads", f"{heads.num_heads}, {heads.variant}, {'trained' if heads.trained else 'untrained'}")
    facts.add_row("tree", f"{bundle.tree_name}: {tree.size} nodes, {tree.max_depth} deep, ranks below {tree.top_k}")
    expected = bundle.acceptance.expected_tokens(tree.size)
    facts.add_row("", f"expected tokens per step {expected:.2f} ({bundle.acceptance.source})")
    files = bundle.files if engine is None else engine.files
    facts.add_row("files", f"{len(files)}, {sum(file.size for file in files.values()) / 2**20:,.1f} MiB")
    if engine is not None:
        limits = engine.limits
        longest = limits.longest_sequence(tree)
        facts.add_row("engine", f"{engine.backend_name}, of {sum(engine.layers.values()):,} network layers")
        facts.add_row("", f"up to {limits.max_batch} sequences of {longest:,} tokens, {limits.max_prefill:,} per step")
        memory = DeviceMemory.of(bundle, engine)
        facts.add_row("GPU memory", f"{memory.words(limits.max_batch)}; scratch memory besides")
    facts.add_row("made by", ", ".join(f"{name} {version}" for name, version in bundle.producer.items()))
    return facts


def _states(bundle: Bundle) -> str:
    """Returns the shapes of the states in words."""
    groups = [group for group in bundle.state_groups if group.states[0].kind != "scale"]
    stored = f", stored in {bundle.kv_cache}" if bundle.kv_cache else ""
    if len(groups) == 1:
        heads, size = groups[0].shape
        return f"{heads} KV heads of {size}{stored}"
    listed = [f"{len(group.states)} of {group.shape[0]} heads of {group.shape[1]}" for group in groups]
    return f"{sum(len(group.states) for group in groups)} K/V caches{stored}: {', '.join(listed)}"


def _stored(bundle: Bundle) -> list[tuple[str, str]]:
    """Returns rows about the storage types of the matrices, if any is stored in another type than the bundle's."""
    weights = bundle.weights
    if not weights.is_quantized:
        return []
    if bundle.matrices:
        by_part: dict[str, list[str]] = {}
        for facts in bundle.matrices:
            by_part.setdefault(facts.part, []).append(str(facts))
        rows = [f"{part}: {'; '.join(texts)}" for part, texts in by_part.items()]
    else:
        kinds = ("layers", "lm_head", "heads", "embeddings")
        asked = ", ".join(f"{kind} {getattr(weights, kind) or bundle.dtype}" for kind in kinds)
        rows = [f"{asked}, where no file's own blocks were kept"]
    products = sum(facts.rewrites.get("quantize_products", 0) for facts in bundle.graphs.values())
    rounded = [f"{products} products round their inputs to {weights.activations}"] if weights.activations else []
    exactness = _exactness(bundle) if weights.has_integers else []
    return [("matrices" if not index else "", row) for index, row in enumerate([*rows, *rounded, *exactness])]


def _exactness(bundle: Bundle) -> list[str]:
    """Returns a row that says if answers depend on the tree size on this processor, where ONNX Runtime is installed."""
    from medusa_runtime.backends.onnxruntime.row_rules import RowRule, row_rule
    from medusa_runtime.backends.onnxruntime.session import import_onnxruntime
    from medusa_runtime.errors import BackendError

    try:
        rule = row_rule(import_onnxruntime(), bundle)
    except BackendError:
        return []
    texts = {
        RowRule.ANY: "the same for every tree size",
        RowRule.SEVERAL: "the same for every tree size; a plain step computes two tokens",
        RowRule.EVEN: "the same for every tree size; each step computes an even number of tokens",
        RowRule.NONE: "may differ between tree sizes" + (", as attention is fused" if bundle.fused_attention else ""),
    }
    return [f"answers of ONNX Runtime on this processor: {texts[rule]}"]


def _answering(bundle: Bundle) -> list[tuple[str, str]]:
    """Returns rows about end tokens, and about settings of the generation config."""
    from medusa_export.models.generation_settings import sampling_defaults, unapplied

    ends = [f"{token}, by the {', the '.join(token.sources)}" for token in bundle.end_tokens]
    ends = ends or [f"token {token}, by the model's configuration" for token in bundle.model.eos_token_ids]
    left_out = [f"{key}={json.dumps(value):.80}, of the generation config" for key, value in
                unapplied(bundle.generation).items()]  # fmt: skip
    listed = ", ".join(f"{key}={value}" for key, value in sampling_defaults(bundle.generation).items())
    sampled = [f"{listed}, by the generation config, for requests that ask for it"] if listed else []
    named = (("ends at", ends or ["no token: nothing names one"]), ("not applied", left_out), ("sampling", sampled))
    return [("" if number else name, text) for name, texts in named for number, text in enumerate(texts)]


def _graphs(bundle: Bundle, ops: Mapping[str, Counter[str]]) -> Iterator[str]:
    """Yields lines about the operators and the rewrites of each graph, with rich's markup."""
    from rich.markup import escape

    for name, counts in ops.items():
        yield f"[bold]{name}[/bold]: {sum(counts.values()):,} nodes"
        yield ", ".join(f"{op} {count}" for op, count in counts.most_common())
        if name in bundle.graphs:
            yield f"rewrites: {_applied(bundle.graphs[name].rewrites)}"
    yield from map(escape, bundle.notes)


def _applied(rewrites: Mapping[str, int]) -> str:
    """Returns the rewrites that changed something, with their counts."""
    return ", ".join(f"{rewrite} {count}" for rewrite, count in rewrites.items() if count) or "none"


def _tensors(bundle: Bundle) -> Table:
    """Returns a table of the graph's inputs and outputs."""
    from rich import box
    from rich.table import Table

    table = Table("", "name", "type", "shape", box=box.SIMPLE_HEAD, title="Inputs and outputs", title_justify="left")
    for kind, specs in (("in", bundle.inputs), ("out", bundle.outputs)):
        for row in _grouped(specs):
            table.add_row(kind, *row)
    return table


def _grouped(specs: Sequence[TensorSpec]) -> list[tuple[str, str, str]]:
    """Returns a row per tensor, with one row for all caches of a kind."""
    rows: dict[str, list[TensorSpec]] = {}
    for spec in specs:
        stem, _, index = spec.name.rpartition("_")
        rows.setdefault(stem if index.isdigit() else spec.name, []).append(spec)
    return [
        (
            name if len(group) == 1 and group[0].name == name else f"{name}_0 … {len(group) - 1}",
            group[0].dtype,
            ", ".join(str(size) for size in group[0].shape),
        )
        for name, group in rows.items()
    ]


def _operators(graph: Path, load: Callable[..., Any]) -> Counter[str]:
    """Counts the nodes of a graph by operator."""
    try:
        nodes = load(graph, load_external_data=False).graph.node
    except Exception as error:  # protobuf's own, which is no dependency of this package
        raise BundleError(f"{graph} is damaged ({error}): export the bundle again.") from error
    return Counter(node.op_type for node in nodes)
