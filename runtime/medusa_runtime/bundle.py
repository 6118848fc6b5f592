"""A bundle: the folder that ``medusa-export onnx`` writes, described by its ``medusa.json``."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from medusa_runtime.contract import CONTRACT_VERSION, TensorSpec, step_inputs, step_outputs
from medusa_runtime.errors import BundleError, TreeError
from medusa_runtime.tree import Tree

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
DTYPES = ("float32", "float16", "bfloat16")

T = TypeVar("T")


@dataclass(frozen=True)
class ModelFacts:
    """What a runtime has to know of the base model."""

    name: str
    model_type: str
    num_layers: int
    num_key_value_heads: int
    head_dim: int
    hidden_size: int
    vocab_size: int
    max_positions: int
    eos_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class HeadFacts:
    """What is known of the heads.

    Attributes:
        num_heads: K, after dropping those deeper than the tree.
        variant: Their kind in words.
        trained: False for heads that ``--init-heads`` made.
    """

    num_heads: int
    variant: str
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

    source: str
    node_values: tuple[float, ...]
    guessed_values: tuple[float, ...] = ()
    guess_share: float = 0.0

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
class FileFacts:
    """Size in bytes and SHA-256 of a file of the bundle."""

    size: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> FileFacts:
        """Reads a file for its facts."""
        with path.open("rb") as file:
            return cls(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


@dataclass(frozen=True)
class Bundle:
    """A bundle's description, and where it lies.

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

    @property
    def graph(self) -> Path:
        """The ONNX file."""
        return self.folder / GRAPH

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
        text = _read_description(folder)
        try:
            data = json.loads(text)
        except ValueError as error:
            raise BundleError(
                f"{folder / DESCRIPTION} is not valid JSON ({error}). Export the bundle again."
            ) from error
        reader = JsonReader(data, folder / DESCRIPTION)
        version = reader.get("contract_version", int)
        if version > CONTRACT_VERSION:
            raise BundleError(
                f"The bundle {folder} follows contract version {version}, but this runtime knows versions up to "
                f"{CONTRACT_VERSION}. Update medusa-export, or export the model again with this version."
            )
        bundle = _parse(reader, folder)
        _check_files(bundle, check_digests)
        return bundle


class JsonReader:
    """Typed access to a JSON object; what is missing or of another type is a ``BundleError``."""

    def __init__(self, data: object, where: object, remedy: str = REEXPORT) -> None:
        if not isinstance(data, dict):
            raise BundleError(f"{where} must hold a JSON object, but holds {type(data).__name__}.")
        self.data: dict[str, Any] = data
        self.where = where
        self.remedy = remedy

    def get(self, key: str, kind: type[T]) -> T:
        value = self.data.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and kind is float:
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            got = "is missing" if key not in self.data else f"is {value!r}"
            raise BundleError(f"In {self.where}, {key!r} {got}: expected {kind.__name__}. {self.remedy}")
        return value

    def object(self, key: str) -> JsonReader:
        return JsonReader(self.data.get(key), f"{self.where}: {key}", self.remedy)

    def list_of(self, key: str, kind: type[T]) -> list[T]:
        values = self.get(key, list)
        return [JsonReader({key: value}, self.where, self.remedy).get(key, kind) for value in values]


def _read_description(folder: Path) -> str:
    path = folder / DESCRIPTION
    if not folder.is_dir():
        raise BundleError(f"There is no bundle at {folder}: expected the folder that 'medusa-export onnx' wrote.")
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise BundleError(
            f"{folder} is no bundle: it has no {DESCRIPTION}. Make one with 'medusa-export onnx'."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(f"{path} can't be read: {error}.") from error


def _parse(reader: JsonReader, folder: Path) -> Bundle:
    model, tree, acceptance = reader.object("model"), reader.object("tree"), reader.object("acceptance")
    facts = ModelFacts(
        name=model.get("name", str),
        model_type=model.get("model_type", str),
        **{
            key: model.get(key, int)
            for key in (
                "num_layers", "num_key_value_heads", "head_dim", "hidden_size", "vocab_size", "max_positions",
            )
        },
        eos_token_ids=tuple(model.list_of("eos_token_ids", int)),
    )  # fmt: skip
    dtype = reader.get("dtype", str)
    if dtype not in DTYPES:
        raise BundleError(f"In {reader.where}, 'dtype' is {dtype!r}: expected one of {', '.join(DTYPES)}.")
    heads = None
    if reader.data.get("heads") is not None:
        part = reader.object("heads")
        heads = HeadFacts(part.get("num_heads", int), part.get("variant", str), part.get("trained", bool))
    try:
        parsed_tree = Tree.from_paths(tree.get("paths", list), max_depth=heads.num_heads if heads else 0)
    except TreeError as error:
        raise BundleError(f"The tree in {reader.where} can't be used: {error}") from error
    bundle = Bundle(
        folder=folder,
        model=facts,
        dtype=dtype,
        tree=parsed_tree,
        acceptance=_acceptance(acceptance, parsed_tree),
        heads=heads,
        sampling=reader.get("sampling", bool) if "sampling" in reader.data else False,  # not in version 1
        tree_name=tree.get("name", str),
        files=file_table(reader),
        producer=reader.get("producer", dict),
    )
    for key, expected in (("inputs", bundle.inputs), ("outputs", bundle.outputs)):
        listed = [tuple(part.values()) for part in reader.list_of(key, dict)]
        if listed != [(spec.name, spec.dtype, list(spec.shape)) for spec in expected]:
            raise BundleError(
                f"In {reader.where}, {key!r} don't follow contract version {CONTRACT_VERSION} for this model and tree. "
                "Export the bundle again."
            )
    return bundle


def _acceptance(reader: JsonReader, tree: Tree) -> Acceptance:
    """Bundles made before guesses were told apart have one list of values."""
    found = {key: tuple(reader.list_of(key, float)) if key in reader.data else ()
             for key in ("node_values", "guessed_values")}  # fmt: skip
    for key, values in found.items():
        if len(values) != tree.size and (values or key == "node_values"):
            raise BundleError(f"In {reader.where}, {key!r} holds {len(values)} values for a tree of {tree.size} nodes.")
    share = reader.get("guess_share", float) if "guess_share" in reader.data else 0.0
    return Acceptance(reader.get("source", str), found["node_values"], found["guessed_values"], share)


def _check_files(bundle: Bundle, check_digests: bool) -> None:
    if GRAPH not in bundle.files:
        raise BundleError(f"{bundle.folder / DESCRIPTION} lists no {GRAPH}. {REEXPORT}")
    files = bundle.files
    if (bundle.folder / ENGINE_DESCRIPTION).is_file():
        files = {name: facts for name, facts in files.items() if name not in (*GRAPHS, WEIGHTS)}
    check_files(bundle.folder, files, DESCRIPTION, "bundle", check_digests=check_digests)


def description_text(data: Mapping[str, Any], files: Mapping[str, FileFacts]) -> str:
    """The text of a folder's description: contract version, what it says, and the facts of its files."""
    table = {name: asdict(facts) for name, facts in sorted(files.items())}
    return json.dumps({"contract_version": CONTRACT_VERSION, **data, "files": table}, indent=1) + "\n"


def file_table(reader: JsonReader) -> dict[str, FileFacts]:
    """The facts of files by name, from the entry ``files``."""
    parts = {name: JsonReader(part, f"{reader.where}: files: {name}", reader.remedy)
             for name, part in reader.get("files", dict).items()}  # fmt: skip
    return {name: FileFacts(part.get("size", int), part.get("sha256", str)) for name, part in parts.items()}


def check_files(
    folder: Path, files: Mapping[str, FileFacts], description: str, noun: str, *, check_digests: bool
) -> None:
    """Holds the files in a folder against what a description says of them.

    Args:
        folder: The folder.
        files: What they should be.
        description: The name of the file that says so.
        noun: What the folder is.
        check_digests: Compare digests, not sizes alone.

    Raises:
        BundleError: A file is missing, altered, cut off or lies elsewhere.
    """
    root = folder.resolve()
    for name, facts in files.items():
        path = folder / name
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\\" in name:
            raise BundleError(f"The {noun} {folder} lists the file {name!r}, which lies outside of it: refused.")
        if not path.is_file():
            raise BundleError(f"The {noun} {folder} lacks its file {name}. Copy it whole, or make it again.")
        if not path.resolve().is_relative_to(root):
            raise BundleError(f"The file {name} of the {noun} {folder} is a link that leads outside: refused.")
        size = path.stat().st_size
        if size != facts.size:
            raise BundleError(
                f"{path} has {size} bytes, but {description} says {facts.size}: it was altered or cut off. "
                f"Copy the {noun} again, or make it again."
            )
        if check_digests and FileFacts.of(path).sha256 != facts.sha256:
            raise BundleError(
                f"{path} does not match the digest in {description}: it was altered. "
                f"Copy the {noun} again, or make it again."
            )
