"""Steps of bundles with weights or caches in integers: each row has the same bits for any tree, chunk and batch."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray

from medusa_export.common.dtypes import KvCacheType
from medusa_export.graph.export import build_graph
from medusa_export.models.weight_types import WeightTypes
from medusa_export.targets.onnxruntime.row_exact_attention import MakeAttentionRowExact
from medusa_export.training.activations import measured
from medusa_export.training.conversations import Sample
from medusa_runtime import Bundle, MedusaEngine, MedusaService, SamplingParams, Tree
from medusa_runtime.backends.base import StepResult
from medusa_runtime.backends.onnxruntime import backend as backend_module
from medusa_runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from medusa_runtime.backends.onnxruntime.binding import Binding
from medusa_runtime.backends.onnxruntime.row_rules import RowRule, row_rule
from medusa_runtime.bundles.bundle import ONNXRUNTIME_BATCH_GRAPH, ONNXRUNTIME_GRAPH
from medusa_runtime.bundles.slots import PANEL
from medusa_runtime.decoding.runner import StepRunner
from medusa_runtime.decoding.tree_choice import TreeChoice, TreeSizes
from support.decoding import export, make_step, random_heads
from support.stock import Stock
from support.tiny_models import tiny_model

# Sixteen nodes, with gaps between the nodes of most paths.
TREE = Tree.from_paths(
    [
        [0],
        [0, 0],
        [1],
        [0, 1],
        [0, 0, 0],
        [1, 0],
        [2],
        [0, 0, 1],
        [0, 1, 0],
        [1, 0, 0],
        [3],
        [0, 0, 2],
        [1, 1],
        [2, 0],
        [4],
    ]
)
NODES: list[tuple[int, ...]] = [(), *(tuple(path) for path in TREE.paths)]


@dataclass(frozen=True)
class Kind:
    """A kind of bundle: a model, and how weights and caches are stored; in fp32 if None. Products may round inputs."""

    family: str = "llama"
    overrides: Mapping[str, object] = field(default_factory=dict)
    weights: WeightTypes | None = None
    rounds_inputs: bool = False
    kv_cache: KvCacheType | None = None


KINDS = {
    "grouped": Kind(),
    "ungrouped": Kind(overrides={"num_key_value_heads": 4}),
    "one_group": Kind(overrides={"num_key_value_heads": 1}),
    "soft_cap": Kind("gemma2"),
    "int4": Kind(weights=WeightTypes.all("int4", block_size=16)),
    "int4_asymmetric": Kind(weights=WeightTypes.all("int4", block_size=32, symmetric=False)),
    "int4_64": Kind(weights=WeightTypes.all("int4", block_size=64)),
    "integer_products": Kind(weights=WeightTypes.all("int8"), rounds_inputs=True),
    "integer_caches": Kind(kv_cache="int8"),
    "integer_caches_int4": Kind(weights=WeightTypes.all("int4", block_size=16), kv_cache="int8"),
    "int8": Kind(overrides={"num_key_value_heads": 4}, weights=WeightTypes.all("int8", block_size=32)),
}
# Each kind is an export.
QUICK = ("grouped",)
PARAMETERS = [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
# Around the ends of panels: the first new entry is in slot margin + length.
LENGTHS = (5, 57, 60, 61, 62, 64, 100, 124, 125, 127, 190)
SIZES = (2, 3, 4, 8, 16)


def exported(stock: Stock, kind: str) -> Bundle:
    """A bundle whose attention is that of bundles with weights in integers, also where weights are fp32."""
    made = KINDS[kind]

    def fill(folder: Path) -> None:
        model = tiny_model(made.family, **made.overrides)
        step = make_step(model, random_heads(model), TREE, kv_cache=made.kv_cache)
        step.sampling = False  # such a graph is traced faster
        texts = [Sample(np.random.default_rng(0).integers(1, step.vocab_size, 60).tolist(), [True] * 60)]
        ranges = measured(tiny_model(made.family, **made.overrides), texts) if made.rounds_inputs else None
        graph = build_graph(step, types=made.weights, activations=ranges)
        if made.kv_cache is None:
            facts = replace(graph.step, weights=made.weights or WeightTypes.all("int8"))
            graph = replace(graph, step=facts)
        export(step, folder, graph=graph)

    bundle = Bundle.load(stock.folder(f"row_exact-{kind}", fill))
    if made.weights is not None and row_rule(onnxruntime, bundle) is RowRule.NONE:
        pytest.skip("Products with integers depend on the number of rows on this processor.")
    return bundle


class Logits:
    """Runs steps of a graph, and gives out the logits of their tokens."""

    def __init__(self, bundle: Bundle, graph: str, *, rows: int = 1, threads: int = 1) -> None:
        model = onnx.load(bundle.folder / graph, load_external_data=False)
        model.graph.output.append(onnx.helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, None))
        self.backend = OnnxRuntimeBackend(
            bundle, rows=rows, threads=threads, graph=model.SerializeToString(), extra_outputs=("logits",)
        )

    def take_in(self, tokens: Sequence[int], row: int = 0) -> NDArray[np.float32]:
        """Takes in a chunk of a prompt. Gives the logits of its last token."""
        self.backend.step(len(tokens), {row: tokens}, [row])
        return self._bits()[0, 0]

    def verify(self, lengths: Sequence[int], trees: NDArray[np.int64], size: int) -> NDArray[np.float32]:
        """Verifies a tree in each row, and gives the logits of its nodes, [rows, size, V]. Commits nothing."""
        self.backend.lengths[:] = lengths
        self.backend.drafts[...] = trees
        self.backend.step(size)
        logits = self._bits()
        self.backend.lengths[:] = lengths
        return logits

    def plain(self, length: int, tree: NDArray[np.int64], path: tuple[int, ...]) -> NDArray[np.float32]:
        """Takes plain steps along a path, and gives the logits of the last."""
        self.backend.lengths[:] = length
        for depth in range(len(path) + 1):
            self.backend.drafts[0, 0] = tree[NODES.index(path[:depth])]
            self.backend.step(1)
        return self._bits()[0, 0]

    def _bits(self) -> NDArray[np.float32]:
        return self.backend.extra_output("logits").copy()


def random_tokens(bundle: Bundle, *shape: int, seed: int = 0) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(1, bundle.model.vocab_size, shape)


def differing(first: NDArray[np.float32], second: NDArray[np.float32]) -> int:
    """The number of values whose bits differ."""
    return int((first.view(np.int32) != second.view(np.int32)).sum())


def ways() -> list[Any]:
    """Each kind with each graph. Seven threads share the work in other parts: of fp32, integers and 8-bit caches."""
    threads = {ONNXRUNTIME_GRAPH: 1, ONNXRUNTIME_BATCH_GRAPH: 2}
    found = [
        pytest.param(kind, graph, number, marks=() if kind in QUICK else pytest.mark.slow)
        for graph, number in threads.items()
        for kind in KINDS
    ]
    for kind in KINDS:
        mark = pytest.mark.slow if kind in ("grouped", "integer_caches_int4") else pytest.mark.exhaustive
        found.append(pytest.param(kind, ONNXRUNTIME_GRAPH, 7, marks=mark))
    return found


@pytest.mark.parametrize(("kind", "graph", "threads"), ways())
def test_each_node_of_a_tree_has_the_bits_of_plain_decoding(kind: str, graph: str, threads: int, stock: Stock) -> None:
    bundle = exported(stock, kind)
    steps = Logits(bundle, graph, threads=threads)
    for length in LENGTHS:
        steps.backend.reset(0)
        steps.take_in(random_tokens(bundle, length).tolist())
        tree = random_tokens(bundle, len(NODES), seed=length)
        expected = np.stack([steps.plain(length, tree, path) for path in NODES])
        for size in {bundle.slots.size_within_panel(length, size, PANEL) for size in SIZES}:
            verified = steps.verify([length], tree[None], size)
            computed = verified.shape[1]  # fewer than asked for, where steps are of an even number of rows
            assert computed >= size - 1
            assert differing(verified[0], expected[:computed]) == 0, (length, size)


@pytest.mark.parametrize("kind", PARAMETERS)
def test_a_chunk_of_a_prompt_has_the_bits_of_single_steps(kind: str, stock: Stock) -> None:
    """Chunks need no limit at the ends of panels: the entries of a prompt are in the same slots whatever the chunks."""
    bundle = exported(stock, kind)
    steps = Logits(bundle, ONNXRUNTIME_GRAPH, threads=2)
    tokens = random_tokens(bundle, 150).tolist()
    expected = [steps.take_in([token]) for token in tokens]
    for chunk in (7, 64, 150):
        steps.backend.reset(0)
        for start in range(0, len(tokens), chunk):
            part = tokens[start : start + chunk]
            assert differing(steps.take_in(part), expected[start + len(part) - 1]) == 0, (chunk, start)


@pytest.mark.parametrize("kind", PARAMETERS)
def test_a_row_of_a_batch_has_the_bits_of_the_row_alone(kind: str, stock: Stock) -> None:
    bundle = exported(stock, kind)
    lengths, size = (5, 130, 61), 3
    together, alone = (Logits(bundle, ONNXRUNTIME_BATCH_GRAPH, rows=rows, threads=2) for rows in (3, 1))
    single = Logits(bundle, ONNXRUNTIME_GRAPH, threads=1)
    prompts = [random_tokens(bundle, length, seed=length).tolist() for length in lengths]
    trees = random_tokens(bundle, 3, len(NODES))
    for row, prompt in enumerate(prompts):
        together.take_in(prompt, row)
    verified = together.verify(lengths, trees, size)
    for row, prompt in enumerate(prompts):
        for steps in (alone, single):
            steps.backend.reset(0)
            steps.take_in(prompt)
            computed = steps.verify(lengths[row : row + 1], trees[row : row + 1], size)[0]
            both = min(len(computed), verified.shape[1])
            assert differing(computed[:both], verified[row, :both]) == 0


def test_a_tree_across_panels_differs_without_the_rule(stock: Stock) -> None:
    """If it does not, the rule is of no use, or the tests above can't see what it is for."""
    bundle = exported(stock, "grouped")
    steps = Logits(bundle, ONNXRUNTIME_GRAPH)
    length = 2 * PANEL - bundle.slots.margin - 4
    steps.take_in(random_tokens(bundle, length).tolist())
    tree = random_tokens(bundle, len(NODES))
    expected = np.stack([steps.plain(length, tree, path) for path in NODES])
    assert differing(steps.verify([length], tree[None], 16)[0], expected) > 0


def test_other_bundles_keep_the_fused_attention(stock: Stock) -> None:
    bundle = stock.export("llama").bundle
    assert bundle.panel is None
    for name in (ONNXRUNTIME_GRAPH, ONNXRUNTIME_BATCH_GRAPH):
        assert bundle.graphs[name].rewrites[MakeAttentionRowExact.name] == 0


def test_chunks_are_shorter_in_long_texts(stock: Stock) -> None:
    """Attention keeps a score for each token of a chunk and each slot."""
    for bundle, limits in (
        (exported(stock, "grouped"), [512, 512, 244, 64, 40]),
        (stock.export("llama").bundle, [512, 512, 512, 512, 40]),
    ):
        backend = OnnxRuntimeBackend(bundle, threads=1)
        runner = StepRunner(bundle, backend, TreeSizes(1, TreeChoice(bundle.acceptance, bundle.tree, {})))
        given = [(512, 0), (512, 1536), (512, 3784), (512, 100_000), (40, 100_000)]
        assert [runner.chunk_limit(wanted, length) for wanted, length in given] == limits


class Watched(OnnxRuntimeBackend):
    """Keeps the trees whose nodes behind the root are in two panels, and the sizes of all trees."""

    def __init__(self, bundle: Bundle, rows: int) -> None:
        super().__init__(bundle, rows=rows, threads=1)
        self.sizes: set[int] = set()
        self.across: list[tuple[int, int]] = []

    def step(
        self, size: int, prompts: Mapping[int, Sequence[int]] | None = None, rows: Sequence[int] | None = None
    ) -> StepResult:
        if not prompts:
            self.sizes.add(size)
            first = [self._bundle.slots.slot(int(self.lengths[row])) for row in rows or range(self.rows)]
            self.across += [
                (slot, size) for slot in first if size > 1 and (slot + 1) // PANEL != (slot + size - 1) // PANEL
            ]
        return super().step(size, prompts, rows)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("kind", ["grouped", pytest.param("int4", marks=pytest.mark.slow)])
def test_engine_and_service_keep_trees_within_a_panel(rows: int, kind: str, stock: Stock) -> None:
    bundle = exported(stock, kind)
    prompts = [random_tokens(bundle, length, seed=length).tolist() for length in (9, 30, 50, 100)]
    answers = []
    for size in (1, 16):
        backend = Watched(bundle, rows)
        with MedusaService(bundle, backend, None, tree_size=size) as service:
            handles = [service.submit(prompt, max_new_tokens=90) for prompt in prompts]
            answers.append([handle.result(60).token_ids for handle in handles])
        assert backend.across == []
        assert size in backend.sizes and (size == 1 or len(backend.sizes) > 1)
    assert answers[0] == answers[1]
    with MedusaEngine(bundle, Watched(bundle, 1), None) as engine:
        for prompt, answer in zip(prompts, answers[0], strict=True):
            assert engine.generate(prompt, max_new_tokens=90, tree_size=9).token_ids == answer
        assert engine.backend.across == []


class Capacities(OnnxRuntimeBackend):
    """Keeps the capacity of each step."""

    def __init__(self, bundle: Bundle) -> None:
        super().__init__(bundle, threads=1)
        self.of_steps: list[int] = []

    def _run(self, binding: Binding, order: list[int], size: int, capacity: int) -> None:
        self.of_steps.append(capacity)
        super()._run(binding, order, size, capacity)


def test_the_caches_of_one_row_grow_with_its_text(stock: Stock) -> None:
    """Attention by panels reads free slots, too. ``GroupQueryAttention`` does not, so its room is made at once."""
    by_panels, fused = exported(stock, "grouped"), stock.export("llama").bundle
    prompts = [random_tokens(by_panels, length).tolist() for length in (20, 150, 30)]
    with MedusaEngine(by_panels, Capacities(by_panels), None) as engine:
        backend = engine.backend
        assert isinstance(backend, Capacities)
        for prompt in prompts:
            backend.of_steps.clear()
            engine.generate(prompt, max_new_tokens=200, tree_size=4)
            assert backend.of_steps == sorted(backend.of_steps)
            assert backend.of_steps[0] < 2 * (len(prompt) + by_panels.slots.margin) + PANEL
            assert backend.of_steps[-1] >= len(prompt) + 200
    with MedusaEngine(fused, Capacities(fused), None) as engine:
        engine.generate(prompts[0], max_new_tokens=200, tree_size=4)
        assert isinstance(engine.backend, Capacities)
        assert len(set(engine.backend.of_steps)) == 1


class Counted(OnnxRuntimeBackend):
    """Keeps the numbers of rows of products, and follows a rule whatever the processor."""

    def __init__(self, bundle: Bundle, rows: int, rule: RowRule) -> None:
        super().__init__(bundle, rows=rows, threads=1)
        self._rule = rule
        self.products: set[int] = set()

    def _run(self, binding: Binding, order: list[int], size: int, capacity: int) -> None:
        self.products.add(len(order) * size)
        super()._run(binding, order, size, capacity)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("rule", [RowRule.SEVERAL, RowRule.EVEN])
def test_steps_keep_to_the_numbers_of_rows_that_are_exact(rule: RowRule, rows: int, stock: Stock) -> None:
    """The answers stay the same: those of fp32, in which every number of rows is exact enough."""
    bundle = stock.export("llama").bundle
    prompts = [random_tokens(bundle, length, seed=length).tolist() for length in (1, 9, 30)]
    sampled = SamplingParams(temperature=1.0, seed=3)
    for size in (1, 3, 4):
        answers = []
        for followed in (RowRule.ANY, rule):
            backend = Counted(bundle, rows, followed)
            with MedusaService(bundle, backend, None, tree_size=size, prefill_chunk=7) as service:
                handles = [
                    service.submit(prompt, max_new_tokens=20, sampling=sampling)
                    for prompt in prompts
                    for sampling in (None, sampled)
                ]
                answers.append([handle.result(60).token_ids for handle in handles])
            assert all(map(followed.allows, backend.products))
        assert answers[0] == answers[1]


def test_a_bundle_whose_steps_are_not_exact_says_so(
    stock: Stock, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = logging.Logger("test")  # whatever other libraries have set for all loggers
    log.addHandler(caplog.handler)
    monkeypatch.setattr(backend_module, "_log", log)
    bundle = exported(stock, "int4")
    caplog.clear()
    OnnxRuntimeBackend(bundle, threads=1).close()
    assert not caplog.records
    fused = replace(bundle, graphs={name: replace(facts, panel=None) for name, facts in bundle.graphs.items()})
    backend = OnnxRuntimeBackend(fused, threads=1)
    assert backend.exact_rows is RowRule.NONE
    assert "Answers of this bundle may differ between tree sizes" in caplog.text
