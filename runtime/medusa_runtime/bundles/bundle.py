"""A bundle: the folder that ``medusa-export onnx`` writes, described by its ``medusa.json``."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from medusa_runtime.bundles.contract import CONTRACT_VERSION, TensorSpec, step_inputs, step_outputs
from medusa_runtime.bundles.json_file import Name, Share, brief, parse_json
from medusa_runtime.bundles.listed_folder import FileFacts, FileTable, ListedFolder, read_file
from medusa_runtime.bundles.slots import SlotLayout
from medusa_runtime.bundles.tree import MAX_NODES, RankPath, Tree
from medusa_runtime.errors import BundleError, TreeError

DESCRIPTION = "medusa.json"
GRAPH = "model.onnx"
WEIGHTS = f"{GRAPH}.data"
# Derived from the graph, of the same weights: for one row, and for several.
ONNXRUNTIME_GRAPH = "model.onnxruntime.onnx"
ONNXRUNTIME_BATCH_GRAPH = "model.onnxruntime.batch.onnx"
GRAPHS = (GRAPH, ONNXRUNTIME_GRAPH, ONNXRUNTIME_BATCH_GRAPH)
# Beside a bundle's description, this one says that the folder holds a compiled engine in place of the graphs.
ENGINE_DESCRIPTION = "engine.json"
REEXPORT = "Export the bundle again."
Dtype = Literal["float32", "float16", "bfloat16"]

# A description is mostly inputs and outputs: about 200 bytes for each of two caches of a layer.
MAX_DESCRIPTION_BYTES = 2**22
# Ten times what the largest published models have, and more.
Layers = Annotated[int, Meta(ge=1, le=1024)]
Width = Annotated[int, Meta(ge=1, le=2**20)]
VocabSize = Annotated[int, Meta(ge=1, le=2**24)]
Positions = Annotated[int, Meta(ge=1, le=2**40)]
TokenId = Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)]
NumHeads = Annotated[int, Meta(ge=0, le=64)]


@dataclass(frozen=True)
class ModelFacts:
    """What a runtime has to know of the base model."""

    name: Name
    model_type: Name
    num_layers: Layers
    num_key_value_heads: Width
    head_dim: Width
    hidden_size: Width
    vocab_size: VocabSize
    max_positions: Positions
    eos_token_ids: tuple[TokenId, ...] = ()


@dataclass(frozen=True)
class EndToken:
    """A token that ends an answer.

    Attributes:
        id: The token's id.
        text: The token's name in the tokenizer, None without a tokenizer.
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
    """What is known of the heads.

    Attributes:
        num_heads: K, after dropping those deeper than the tree.
        variant: Their kind in words.
        trained: False for heads that ``--init-heads`` made.
    """

    num_heads: NumHeads
    variant: Name
    trained: bool


@dataclass(frozen=True)
class Acceptance:
    """How likely each node of the tree is to be accepted.

    Attributes:
        source: ``calibrated`` (measured for these heads), ``prior`` (typical of MEDUSA heads) or ``untrained``.
        node_values: For each node its chance, [T]; 1 for the root.
        guessed_values: The same for steps that have a guess from the text; empty if that is not known apart.
        guess_share: Of all steps so many do.
    """

    source: Name
    node_values: tuple[Share, ...]
    guessed_values: tuple[Share, ...] = ()
    guess_share: Share = 0.0

    def values(self, *, guessed: bool) -> tuple[float, ...]:
        """The chance of each node, [T], in steps with or without a guess from the text."""
        return self.guessed_values if guessed and self.guessed_values else self.node_values

    @property
    def hopeless(self) -> bool:
        """Whether there is nothing to gain: untrained heads, or a tree of one node."""
        return self.expected_tokens(len(self.node_values)) <= 1.0

    def expected_tokens(self, size: int) -> float:
        """Expected tokens per step with the first ``size`` nodes [2.3.3], over steps of both kinds."""
        with_guess, without = (sum(self.values(guessed=guessed)[:size]) for guessed in (True, False))
        return self.guess_share * with_guess + (1 - self.guess_share) * without


@dataclass(frozen=True)
class Bundle:
    """A bundle's description, and where it lies.

    It never changes: threads, event loops and children made by ``fork`` may share it.

    Attributes:
        folder: Where it lies.
        model: The base model.
        dtype: Of weights and caches.
        tree: The draft tree.
        acceptance: How likely its nodes are to be accepted.
        heads: The heads; None without.
        sampling: Whether requests may sample and ask for log probabilities; all are greedy otherwise.
        tree_name: What the tree is called.
        files: What belongs to it.
        producer: Versions of what made it.
        end_tokens: Where each of the model's end tokens comes from; empty in older bundles.
        generation: The model's generation config, as far as it is set; empty in older bundles.
        digests_checked: Whether its files were compared with their digests.
    """

    folder: Path
    model: ModelFacts
    dtype: str
    tree: Tree
    acceptance: Acceptance
    heads: HeadFacts | None = None
    sampling: bool = True
    tree_name: str = ""
    files: Mapping[str, FileFacts] = field(default_factory=dict)
    producer: Mapping[str, str] = field(default_factory=dict)
    end_tokens: tuple[EndToken, ...] = ()
    generation: Mapping[str, Any] = field(default_factory=dict)
    digests_checked: bool = field(default=True, compare=False)

    @property
    def graph(self) -> Path:
        """The ONNX file."""
        return self.folder / GRAPH

    @property
    def listed(self) -> ListedFolder:
        """Its files, as far as its description lists them."""
        return ListedFolder(self.folder, self.files, self.digests_checked, DESCRIPTION, "bundle")

    @property
    def slots(self) -> SlotLayout:
        """Where entries are in the caches, and how many slots a step takes."""
        return SlotLayout(self.tree.max_depth)

    @property
    def drafting_size(self) -> int:
        """Tokens of a step in which all heads draft: one of S tokens drafts at most S - 1 deep."""
        return 1 + (self.heads.num_heads if self.heads is not None else 0)

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The graph's inputs by contract."""
        return step_inputs(**self._shape(), vocab_size=self.model.vocab_size, dtype=self.dtype)

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The graph's outputs by contract."""
        return step_outputs(**self._shape(), tree_size=self.tree.size, dtype=self.dtype)

    def _shape(self) -> dict[str, Any]:
        model = self.model
        return {
            "num_layers": model.num_layers,
            "num_key_value_heads": model.num_key_value_heads,
            "head_dim": model.head_dim,
            "tree_depth": self.tree.max_depth,
            "sampling": self.sampling,
        }

    def to_json(self) -> str:
        """The text of ``medusa.json``."""
        data = {
            "producer": dict(self.producer),
            "model": asdict(self.model),
            "end_tokens": [asdict(token) for token in self.end_tokens],
            "generation": dict(self.generation),
            "dtype": self.dtype,
            "heads": asdict(self.heads) if self.heads else None,
            "sampling": self.sampling,
            "tree": {"name": self.tree_name, "paths": self.tree.paths},
            "acceptance": asdict(self.acceptance),
            "inputs": [asdict(spec) for spec in self.inputs],
            "outputs": [asdict(spec) for spec in self.outputs],
        }
        return description_text(data, self.files)

    @classmethod
    def load(cls, folder: str | Path, *, check_digests: bool = True) -> Bundle:
        """Reads and checks a bundle.

        Args:
            folder: Where ``medusa.json`` lies.
            check_digests: Compare every file with its digest, not its size alone.

        Raises:
            BundleError: Something is missing, altered or from a newer contract; the message says what.
        """
        folder = Path(folder)
        where = folder / DESCRIPTION
        data = read_description(folder, DESCRIPTION, check_digests=check_digests)
        if data is None:
            raise BundleError(_no_bundle(folder))
        version = parse_json(data, Versioned, where, remedy=REEXPORT).contract_version
        if version > CONTRACT_VERSION:
            raise BundleError(
                f"The bundle {folder} follows contract version {version}, but this runtime knows versions up to "
                f"{CONTRACT_VERSION}. Update medusa-export, or export the model again with this version."
            )
        bundle = _bundle(folder, parse_json(data, _Description, where, remedy=REEXPORT), check_digests)
        _check_files(bundle)
        return bundle


class Versioned(msgspec.Struct):
    """What is read of a description first: the rest of another version may look different."""

    contract_version: Annotated[int, Meta(ge=1)]


class _TreeFacts(msgspec.Struct):
    name: Name
    paths: Annotated[list[RankPath], Meta(max_length=MAX_NODES)]


class _Description(msgspec.Struct):
    """The schema of ``medusa.json``. Keys with a default may be missing: older bundles lack them."""

    model: ModelFacts
    dtype: Dtype
    tree: _TreeFacts
    acceptance: Acceptance
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    files: FileTable
    producer: dict[Name, Name]
    heads: HeadFacts | None = None
    sampling: bool = False
    end_tokens: tuple[EndToken, ...] = ()
    generation: dict[Name, Any] = msgspec.field(default_factory=dict)


def read_description(folder: Path, name: str, *, check_digests: bool) -> bytes | None:
    """The text of a folder's description; None if there is none.

    With digests it may be a link to anywhere: it is what the caller trusts.

    Raises:
        BundleError: It can't be read, or it is larger than any description.
    """
    if not check_digests:
        return ListedFolder(folder).read(name, at_most=MAX_DESCRIPTION_BYTES)
    if not os.path.lexists(folder / name):
        return None
    return read_file(folder / name, at_most=MAX_DESCRIPTION_BYTES)


def _no_bundle(folder: Path) -> str:
    if not os.path.isdir(folder):  # noqa: PTH112  # Path.is_dir raises for names that no file can have
        return f"There is no bundle at {brief(folder)}: expected the folder that 'medusa-export onnx' wrote."
    return f"{folder} is no bundle: it has no {DESCRIPTION}. Make one with 'medusa-export onnx'."


def _bundle(folder: Path, description: _Description, check_digests: bool) -> Bundle:
    where, heads = folder / DESCRIPTION, description.heads
    try:
        tree = Tree.from_paths(description.tree.paths, max_depth=heads.num_heads if heads else 0)
    except TreeError as error:
        raise BundleError(f"The tree in {where} can't be used: {error}") from error
    for key in ("node_values", "guessed_values"):
        values = getattr(description.acceptance, key)
        if len(values) != tree.size and (values or key == "node_values"):
            raise BundleError(f"In {where}, {key!r} holds {len(values)} values for a tree of {tree.size} nodes.")
    bundle = Bundle(
        folder=folder,
        model=description.model,
        dtype=description.dtype,
        tree=tree,
        acceptance=description.acceptance,
        heads=heads,
        sampling=description.sampling,
        tree_name=description.tree.name,
        files=description.files,
        producer=description.producer,
        end_tokens=description.end_tokens,
        generation=description.generation,
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


def description_text(data: Mapping[str, Any], files: Mapping[str, FileFacts]) -> str:
    """The text of a folder's description: contract version, what it says, and the facts of its files."""
    table = {name: asdict(facts) for name, facts in sorted(files.items())}
    return json.dumps({"contract_version": CONTRACT_VERSION, **data, "files": table}, indent=1) + "\n"
