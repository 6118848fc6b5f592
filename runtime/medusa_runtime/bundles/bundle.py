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
from medusa_runtime.bundles.json_file import Name, Share, brief
from medusa_runtime.bundles.listed_folder import FileFacts, FileTable, ListedFolder
from medusa_runtime.bundles.matrices import MatrixFacts
from medusa_runtime.bundles.model_facts import REEXPORT, AnyModelFacts, ModelFacts, States, TokenId, states_of
from medusa_runtime.bundles.slots import SlotLayout
from medusa_runtime.bundles.states import State, StateGroup, groups_of
from medusa_runtime.bundles.tree import MAX_NODES, RankPath, Tree
from medusa_runtime.errors import BundleError, TreeError

DESCRIPTION = "medusa.json"
GRAPH = "model.onnx"
WEIGHTS = f"{GRAPH}.data"
# Derived graphs, which share the weights: for one row, and for several rows.
ONNXRUNTIME_GRAPH = "model.onnxruntime.onnx"
ONNXRUNTIME_BATCH_GRAPH = "model.onnxruntime.batch.onnx"
GRAPHS = (GRAPH, ONNXRUNTIME_GRAPH, ONNXRUNTIME_BATCH_GRAPH)
# A folder with this file beside medusa.json holds a compiled engine in place of the graphs.
ENGINE_DESCRIPTION = "engine.json"
Dtype = Literal["float32", "float16", "bfloat16"]
StorageType = Literal["int8", "int4", "fp8", "fp32", "fp16", "bf16"]

Reason = Annotated[str, Meta(min_length=1, max_length=4096)]
Panel = Annotated[int, Meta(ge=1, le=2**16)]
NumHeads = Annotated[int, Meta(ge=0, le=64)]


@dataclass(frozen=True)
class EndToken:
    """A token that ends an answer.

    Attributes:
        id: The token's id.
        text: The token's name in the tokenizer; None without a tokenizer.
        sources: The parts of the model that name it: ``generation config``, ``config``, ``tokenizer`` or
            ``chat template``.
    """

    id: TokenId
    text: Name | None
    sources: tuple[Name, ...]

    def __str__(self) -> str:
        return f"{self.text} ({self.id})" if self.text is not None else f"token {self.id}"


@dataclass(frozen=True)
class HeadFacts:
    """Number and kind of the heads.

    Attributes:
        num_heads: K, without the heads that are deeper than the tree.
        variant: The kind of head, in words.
        trained: False for heads that ``--init-heads`` made.
    """

    num_heads: NumHeads
    variant: Name
    trained: bool


class Acceptance(msgspec.Struct, frozen=True):
    """Acceptance estimates: the probability that each node of the tree is accepted.

    Attributes:
        source: ``calibrated`` (measured for these heads), ``prior`` (typical of MEDUSA heads) or ``untrained``.
        node_values: The probability of each node, [T]; 1 for the root. If ``hit_values`` is given, these hold for
            steps without a lookup hit; otherwise for all steps.
        hit_values: The same for steps with a lookup hit, [T]; empty if both kinds of steps share ``node_values``.
        hit_share: Share of the steps that have a lookup hit.
    """

    source: Name
    node_values: tuple[Share, ...]
    hit_values: tuple[Share, ...] = msgspec.field(default=(), name="guessed_values")
    hit_share: Share = msgspec.field(default=0.0, name="guess_share")

    def values(self, *, hit: bool) -> tuple[float, ...]:
        """The probability of each node, [T], in steps with or without a lookup hit."""
        return self.hit_values if hit and self.hit_values else self.node_values

    @property
    def drafts_are_useless(self) -> bool:
        """True if no draft is expected to be accepted: the heads are untrained, or the tree has one node."""
        return self.expected_tokens(len(self.node_values)) <= 1.0

    def expected_tokens(self, size: int) -> float:
        """Expected tokens per step with the first ``size`` nodes [2.3.3], over steps with and without a lookup hit."""
        with_hit, without = (sum(self.values(hit=hit)[:size]) for hit in (True, False))
        return self.hit_share * with_hit + (1 - self.hit_share) * without


@dataclass(frozen=True)
class GraphFacts:
    """Facts about a graph of a bundle.

    Attributes:
        rewrites: Number of places that each rewrite changed, by the rewrite's name, in the order in which they ran.
        left_out: Why the bundle does not have the graph; None if it has.
        panel: Slots that attention sums together, in a graph whose rows have the same bits whatever the tree size (see
            ``SlotLayout.size_within_panel``); None in other graphs, and in older bundles.
    """

    rewrites: Mapping[Name, Annotated[int, Meta(ge=0)]] = field(default_factory=dict)
    left_out: Reason | None = None
    panel: Panel | None = None


@dataclass(frozen=True)
class WeightFacts:
    """Storage types of a bundle's weights. None is its dtype; ``int8`` and ``int4`` are blocks of integers.

    ``fp8`` are 8-bit floating-point numbers (e4m3) with a scale per row. ``fp16`` and ``bf16`` are cast to the bundle's
    dtype before they are used.

    Attributes:
        layers: The matrices of the decoder layers.
        lm_head: The output projection.
        heads: The projections of the heads.
        embeddings: The input embeddings.
        block_size: Columns of a matrix that share a scale; fewer where it does not divide them.
        symmetric: Blocks have no zero points.
        activations: The inputs of products with matrices of int8 are rounded to ``int8`` too, in ranges that are known
            beforehand, except those that would lose too much.
    """

    layers: StorageType | None = None
    lm_head: StorageType | None = None
    heads: StorageType | None = None
    embeddings: StorageType | None = None
    block_size: Annotated[int, Meta(ge=1)] = 32
    symmetric: bool = True
    activations: Literal["int8"] | None = None

    @property
    def has_integers(self) -> bool:
        """True if any matrix is stored as integers."""
        return any(kind in ("int8", "int4") for kind in self._kinds)

    @property
    def is_quantized(self) -> bool:
        """True if any matrix is stored in another type than the bundle's dtype."""
        return any(self._kinds)

    @property
    def _kinds(self) -> tuple[StorageType | None, ...]:
        return self.layers, self.lm_head, self.heads, self.embeddings


@dataclass(frozen=True)
class Bundle:
    """A bundle's folder, and the content of its description.

    It never changes: threads, event loops and children made by ``fork`` may share it.

    Attributes:
        folder: The folder that holds ``medusa.json``.
        model: The base model.
        states: The model's states, in the order of the graph's inputs.
        dtype: Type of weights and caches.
        tree: The draft tree.
        acceptance: Acceptance estimates of the tree's nodes.
        heads: The heads; None without heads.
        sampling: True if requests may sample and ask for log probabilities. Otherwise all requests are greedy.
        constraints: True if requests may have biases, penalties and grammars.
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
    tree_name: str = ""
    files: Mapping[str, FileFacts] = field(default_factory=dict)
    producer: Mapping[str, str] = field(default_factory=dict)
    end_tokens: tuple[EndToken, ...] = ()
    generation: Mapping[str, Any] = field(default_factory=dict)
    acceptance_rules: tuple[str, ...] = ("exact", "typical")
    graphs: Mapping[str, GraphFacts] = field(default_factory=dict)
    weights: WeightFacts = field(default_factory=WeightFacts)
    matrices: tuple[MatrixFacts, ...] = ()
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
        """The states, grouped by shape."""
        return groups_of(self.states)

    @property
    def entry_bytes(self) -> int:
        """Bytes of the entries of one token in all states."""
        itemsize = 4 if self.dtype == "float32" else 2
        return itemsize * sum(state.entry_size for state in self.states)

    @property
    def panel(self) -> int | None:
        """The smallest panel of a graph (see ``GraphFacts``), which trees keep to; None if there is none."""
        return min((facts.panel for facts in self.graphs.values() if facts.panel is not None), default=None)

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
            takes_long=self.model.short_positions is not None,
        )

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The graph's outputs according to the contract."""
        tree = self.tree
        return step_outputs(
            self.states, tree_depth=tree.max_depth, tree_size=tree.size, dtype=self.dtype, sampling=self.sampling
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
            "heads": asdict(self.heads) if self.heads else None,
            "sampling": self.sampling,
            "constraints": self.constraints,
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
    end_tokens: tuple[EndToken, ...] = ()
    generation: dict[Name, Any] = msgspec.field(default_factory=dict)
    acceptance_rules: tuple[Name, ...] = ("exact", "typical")
    graphs: dict[Name, GraphFacts] = msgspec.field(default_factory=dict)
    weights: WeightFacts = msgspec.field(default_factory=WeightFacts)
    matrices: tuple[MatrixFacts, ...] = ()


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
        tree_name=description.tree.name,
        files=description.files,
        producer=description.producer,
        end_tokens=description.end_tokens,
        generation=description.generation,
        acceptance_rules=description.acceptance_rules,
        graphs=description.graphs,
        weights=description.weights,
        matrices=description.matrices,
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
