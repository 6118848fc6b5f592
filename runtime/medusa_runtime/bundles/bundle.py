"""A bundle: the folder that ``medusa-export onnx`` writes, described by its ``medusa.json``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from medusa_runtime.bundles.contract import CONTRACT_VERSION, TensorSpec, step_inputs, step_outputs
from medusa_runtime.bundles.description import description_text, read_description
from medusa_runtime.bundles.facts import Acceptance, EndToken, GraphFacts, HeadFacts, WeightFacts
from medusa_runtime.bundles.json_file import Name, brief
from medusa_runtime.bundles.listed_folder import FileFacts, FileTable, ListedFolder
from medusa_runtime.bundles.matrices import MatrixFacts
from medusa_runtime.bundles.model_facts import REEXPORT, AnyModelFacts, ModelFacts, States, states_of
from medusa_runtime.bundles.slots import SlotLayout
from medusa_runtime.bundles.states import State, StateGroup, groups_of
from medusa_runtime.bundles.tree import MAX_NODES, RankPath, Tree
from medusa_runtime.errors import BundleError, TreeError

DESCRIPTION = "medusa.json"
GRAPH = "model.onnx"
WEIGHTS = f"{GRAPH}.data"
# Derived graphs, which share the weights: for one row and for several rows on a CPU, and for CUDA.
ONNXRUNTIME_GRAPH = "model.onnxruntime.onnx"
ONNXRUNTIME_BATCH_GRAPH = "model.onnxruntime.batch.onnx"
ONNXRUNTIME_CUDA_GRAPH = "model.onnxruntime.cuda.onnx"
GRAPHS = (GRAPH, ONNXRUNTIME_GRAPH, ONNXRUNTIME_BATCH_GRAPH, ONNXRUNTIME_CUDA_GRAPH)
# A folder with this file beside medusa.json holds a compiled engine in place of the graphs.
ENGINE_DESCRIPTION = "engine.json"
Dtype = Literal["float32", "float16", "bfloat16"]
_ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}


@dataclass(frozen=True)
class Bundle:
    """A bundle's folder, and the content of its description.

    It never changes: threads, event loops and children made by ``fork`` may share it.

    Attributes:
        folder: The folder that holds ``medusa.json``.
        model: The base model.
        states: The model's states, in the order of the graph's inputs.
        dtype: The type that the graph computes in. Weights and states have this type, unless they name another one.
        tree: The draft tree.
        acceptance: Acceptance estimates of the tree's nodes.
        heads: The heads; None without heads.
        sampling: True if requests may sample and ask for log probabilities. Otherwise all requests are greedy.
        constraints: True if requests may have biases, penalties and grammars.
        top_logprobs: True if requests may ask for the most likely tokens of each place.
        tree_name: The tree's name.
        files: Size and digest of each of the bundle's files, by name.
        producer: Versions of the software that made the bundle, by name.
        end_tokens: The model's end tokens and the source of each; empty in older bundles.
        generation: The values that the model's generation config sets; empty in older bundles.
        acceptance_rules: The names of the graph's acceptance rules. Rules other than ``exact`` and ``typical`` may
            accept drafts of any request that the base model has not chosen.
        graphs: Facts about each graph, by file name; empty in older bundles.
        weights: The storage types that the export was asked for.
        matrices: The storage types of the matrices that the bundle has, by part; empty in older bundles. They differ
            from ``weights`` where a file's own blocks are kept, or where no block size divides the columns.
        fused_attention: The export was asked for ONNX Runtime's attention operators, though the weights are integers.
            Steps are faster, and answers may differ between tree sizes.
        digests_checked: True if the files were compared with their digests.
    """

    folder: Path
    model: ModelFacts
    states: tuple[State, ...]
    dtype: str
    tree: Tree
    acceptance: Acceptance
    heads: HeadFacts | None = None
    sampling: bool = True
    constraints: bool = True
    top_logprobs: bool = True
    tree_name: str = ""
    files: Mapping[str, FileFacts] = field(default_factory=dict)
    producer: Mapping[str, str] = field(default_factory=dict)
    end_tokens: tuple[EndToken, ...] = ()
    generation: Mapping[str, Any] = field(default_factory=dict)
    acceptance_rules: tuple[str, ...] = ("exact", "typical")
    graphs: Mapping[str, GraphFacts] = field(default_factory=dict)
    weights: WeightFacts = field(default_factory=WeightFacts)
    matrices: tuple[MatrixFacts, ...] = ()
    fused_attention: bool = False
    digests_checked: bool = field(default=True, compare=False)

    @property
    def graph(self) -> Path:
        """Path of the graph's ONNX file."""
        return self.folder / GRAPH

    @property
    def notes(self) -> list[str]:
        """A sentence about each derived graph that the bundle does not have."""
        return [f"{name} is left out. {facts.left_out}" for name, facts in self.graphs.items() if facts.left_out]

    @property
    def listed(self) -> ListedFolder:
        """The bundle's folder, of which only the listed files are read."""
        return ListedFolder(self.folder, self.files, self.digests_checked, DESCRIPTION, "bundle")

    @cached_property
    def slots(self) -> SlotLayout:
        """The arithmetic of slots in the caches, for this tree."""
        return SlotLayout(self.tree.max_depth)

    @cached_property
    def state_groups(self) -> tuple[StateGroup, ...]:
        """The states, grouped by shape and type."""
        return groups_of(self.states)

    @property
    def kv_cache(self) -> Literal["int8"] | None:
        """The type that keys and values are stored in; None for the bundle's."""
        return "int8" if any(state.dtype == "int8" for state in self.states) else None

    @property
    def entry_bytes(self) -> int:
        """Bytes of the entries of one token in all states."""
        return sum(_ITEM_BYTES[state.dtype or self.dtype] * state.entry_size for state in self.states)

    @property
    def panel(self) -> int | None:
        """The smallest panel of a graph (see ``GraphFacts``), which trees keep to; None if there is none."""
        return min((facts.panel for facts in self.graphs.values() if facts.panel is not None), default=None)

    @property
    def has_exact_rows(self) -> bool:
        """True if rows of a derived graph have the same bits whatever the tree size, as far as products allow it."""
        return any(facts.panel is not None and not facts.rows_differ for facts in self.graphs.values())

    @property
    def drafting_size(self) -> int:
        """Tokens that a step needs so that all heads draft: a step of S tokens drafts at most S - 1 deep."""
        return 1 + (self.heads.num_heads if self.heads is not None else 0)

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The graph's inputs according to the contract."""
        return step_inputs(
            self.states,
            vocab_size=self.model.vocab_size,
            dtype=self.dtype,
            sampling=self.sampling,
            constraints=self.constraints,
            top_logprobs=self.top_logprobs,
            takes_long=self.model.short_positions is not None,
        )

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The graph's outputs according to the contract."""
        tree = self.tree
        return step_outputs(
            self.states,
            tree_depth=tree.max_depth,
            tree_size=tree.size,
            vocab_size=self.model.vocab_size,
            dtype=self.dtype,
            sampling=self.sampling,
            top_logprobs=self.top_logprobs,
        )

    def to_json(self) -> str:
        """The text of ``medusa.json``."""
        data = {
            "producer": dict(self.producer),
            "model": asdict(self.model),
            "states": [asdict(state) for state in self.states],
            "end_tokens": [asdict(token) for token in self.end_tokens],
            "generation": dict(self.generation),
            "dtype": self.dtype,
            "weights": asdict(self.weights),
            "matrices": [asdict(facts) for facts in self.matrices],
            "fused_attention": self.fused_attention,
            "heads": asdict(self.heads) if self.heads else None,
            "sampling": self.sampling,
            "constraints": self.constraints,
            "top_logprobs": self.top_logprobs,
            "acceptance_rules": list(self.acceptance_rules),
            "tree": {"name": self.tree_name, "paths": self.tree.paths},
            "acceptance": msgspec.to_builtins(self.acceptance),
            "graphs": {name: asdict(facts) for name, facts in self.graphs.items()},
            "inputs": [asdict(spec) for spec in self.inputs],
            "outputs": [asdict(spec) for spec in self.outputs],
        }
        return description_text(data, self.files)

    @classmethod
    def load(cls, folder: str | Path, *, check_digests: bool = True) -> Bundle:
        """Reads and checks a bundle.

        Args:
            folder: The folder that holds ``medusa.json``.
            check_digests: True to compare every file with its digest. Sizes are always compared.

        Raises:
            BundleError: A file is missing or altered, or the bundle follows a newer contract version.
        """
        folder = Path(folder)
        description = read_description(
            folder, DESCRIPTION, _Description, noun="bundle", remedy=REEXPORT, check_digests=check_digests
        )
        if description is None:
            raise BundleError(_no_bundle(folder))
        bundle = _bundle(folder, description, check_digests)
        _check_files(bundle)
        return bundle


class _TreeFacts(msgspec.Struct):
    name: Name
    paths: Annotated[list[RankPath], Meta(max_length=MAX_NODES)]


class _Description(msgspec.Struct):
    """The schema of ``medusa.json``. Older bundles lack the keys that have a default here."""

    model: AnyModelFacts
    dtype: Dtype
    tree: _TreeFacts
    acceptance: Acceptance
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    files: FileTable
    producer: dict[Name, Name]
    states: States | None = None
    heads: HeadFacts | None = None
    sampling: bool = False
    constraints: bool = False
    top_logprobs: bool = False
    end_tokens: tuple[EndToken, ...] = ()
    generation: dict[Name, Any] = msgspec.field(default_factory=dict)
    acceptance_rules: tuple[Name, ...] = ("exact", "typical")
    graphs: dict[Name, GraphFacts] = msgspec.field(default_factory=dict)
    weights: WeightFacts = msgspec.field(default_factory=WeightFacts)
    matrices: tuple[MatrixFacts, ...] = ()
    fused_attention: bool = False


def _no_bundle(folder: Path) -> str:
    if not os.path.isdir(folder):  # noqa: PTH112  # Path.is_dir raises for names that no file can have
        return f"There is no bundle at {brief(folder)}: expected the folder that 'medusa-export onnx' wrote."
    return f"{folder} is not a bundle: it has no {DESCRIPTION}. Make one with 'medusa-export onnx'."


def _bundle(folder: Path, description: _Description, check_digests: bool) -> Bundle:
    where, heads = folder / DESCRIPTION, description.heads
    try:
        tree = Tree.from_paths(description.tree.paths, max_depth=heads.num_heads if heads else 0)
    except TreeError as error:
        raise BundleError(f"The tree in {where} can't be used: {error}") from error
    acceptance = description.acceptance
    for key, values in (("node_values", acceptance.node_values), ("guessed_values", acceptance.hit_values)):
        if len(values) != tree.size and (values or key == "node_values"):
            raise BundleError(f"In {where}, {key!r} holds {len(values)} values for a tree of {tree.size} nodes.")
    bundle = Bundle(
        folder=folder,
        model=description.model.known_now,
        states=states_of(where, description.states, description.model, tree.max_depth),
        dtype=description.dtype,
        tree=tree,
        acceptance=acceptance,
        heads=heads,
        sampling=description.sampling,
        constraints=description.constraints,
        top_logprobs=description.top_logprobs,
        tree_name=description.tree.name,
        files=description.files,
        producer=description.producer,
        end_tokens=description.end_tokens,
        generation=description.generation,
        acceptance_rules=description.acceptance_rules,
        graphs=description.graphs,
        weights=description.weights,
        matrices=description.matrices,
        fused_attention=description.fused_attention,
        digests_checked=check_digests,
    )
    if (description.inputs, description.outputs) != (bundle.inputs, bundle.outputs):
        key = "inputs" if description.inputs != bundle.inputs else "outputs"
        raise BundleError(
            f"In {where}, {key!r} don't follow contract version {CONTRACT_VERSION} for this model and tree. {REEXPORT}"
        )
    return bundle


def _check_files(bundle: Bundle) -> None:
    if GRAPH not in bundle.files:
        raise BundleError(f"{bundle.folder / DESCRIPTION} lists no {GRAPH}. {REEXPORT}")
    files = bundle.files
    if os.path.lexists(bundle.folder / ENGINE_DESCRIPTION):
        files = {name: facts for name, facts in files.items() if name not in (*GRAPHS, WEIGHTS)}
    replace(bundle.listed, files=files).check()
