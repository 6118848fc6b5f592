"""Attention in all its forms: caches of several shapes, shared and latent ones, sinks, chunks, ALiBi, odd positions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

from medusa_export.compat.transformers import attention_of
from medusa_export.graph.rewrites.rewrite import NotApplicableError, StepFacts
from medusa_export.models.checkpoints import load_model
from medusa_export.models.supported import check_supported, max_positions, short_positions
from medusa_export.models.weight_types import WeightTypes
from medusa_export.step.alibi import bloom_slopes, mpt_slopes
from medusa_export.step.attention import ATTENTION_NAME
from medusa_export.step.eager import EagerBackend
from medusa_export.step.step import MedusaStep
from medusa_export.targets.onnxruntime.latent_attention import AbsorbLatentExpansion
from medusa_export.verification.reference import with_own_attention
from medusa_runtime import MedusaEngine, MedusaService, RequestError, SamplingParams
from medusa_runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from medusa_runtime.bundles.bundle import GRAPH, ONNXRUNTIME_BATCH_GRAPH, ONNXRUNTIME_GRAPH
from medusa_runtime.bundles.states import State
from support.decoding import TREE, decode, greedy, make_step, random_heads
from support.rig import CPU, rig_of
from support.stock import Exported, Stock
from support.tiny_models import FORMS, SEEDS, families, tiny_model

COUNT = 48
PROMPTS = [[(7 * i * i + 3) % 101 for i in range(37)], [(5 * i * i + 11 * i + 1) % 101 for i in range(20)]]
SIZES = (1, 3, 8, 9)
# One form of each kind: shared caches, latent ones, sinks, ALiBi, windows and chunks of layers, experts in attention.
# ``tests/graph/test_every_family.py`` has all forms. Others of these are decoded by the eager step here.
COMPILED = ("gemma4", "deepseek_v2", "gpt_oss", "bloom", "falcon_alibi", "gpt_neo", "llama4", "jetmoe")


@pytest.mark.parametrize("form", families("gemma4", "deepseek_v2", "bloom", others=FORMS))
def test_steps_decode_as_transformers(form: str) -> None:
    model = tiny_model(form, SEEDS.get(form, 0))
    expected = [greedy(model, prompt, COUNT) for prompt in PROMPTS]
    assert len(set(expected[0])) > 5
    step = make_step(model, random_heads(model))
    step.sampling = False
    backend = EagerBackend(step, rows=2)
    for size, chunk in zip(SIZES, (64, 7, 16, 7), strict=True):
        count = 16 if size == 1 else COUNT  # one step per token takes longest
        result = decode(backend, TREE, PROMPTS, expected, size=size, chunk=chunk, count=count)
        assert result.tokens == [tokens[:count] for tokens in expected], (size, chunk)


@pytest.mark.parametrize("form", ["llama_dynamic_rope", "phi3_longrope"])
def test_a_long_text_leaves_no_frequencies_behind(form: str) -> None:
    model = tiny_model(form)
    expected = [greedy(model, PROMPTS[0], COUNT)]
    with torch.no_grad():
        model(torch.arange(200).unsqueeze(0) % 101)
    step = make_step(model, random_heads(model))
    result = decode(EagerBackend(step), TREE, PROMPTS[:1], expected, size=9, chunk=16, count=COUNT)
    assert result.tokens == expected
    model.set_attn_implementation("sdpa")
    assert greedy(model, PROMPTS[0], COUNT) == expected[0]


@pytest.mark.parametrize("form", ["bloom", "mpt", "opt", "falcon_new", "gptj", "gpt_neo", "codegen"])
def test_a_model_from_files_is_the_same(tmp_path: Path, form: str) -> None:
    """Loads a model with our attention, whether or not its layers choose by that. Its own answers stay the same."""
    model = tiny_model(form)
    model.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), dtype=torch.float32, attn_implementation=ATTENTION_NAME)
    check_supported(loaded)
    step = MedusaStep(loaded, None, TREE.prefix(1))
    before = attention_of(loaded)
    with with_own_attention(step):
        assert greedy(loaded, PROMPTS[0], 8) == greedy(model, PROMPTS[0], 8)
    assert attention_of(loaded) == before
    assert step.states == make_step(model, None, TREE.prefix(1)).states


def shapes(states: Sequence[State]) -> list[tuple[str, tuple[int, int], tuple[int, ...]]]:
    return [(state.name, state.shape, state.readers) for state in states if state.name.startswith("key")]


def test_states_are_observed() -> None:
    """Gemma 4 has heads of two sizes, and its last two layers read the caches of the two before."""
    step = make_step(tiny_model("gemma4"), None, TREE.prefix(1))
    assert shapes(step.states) == [
        ("key_0", (2, 16), (0,)),
        ("key_1", (2, 32), (1,)),
        ("key_2", (2, 16), (2, 4)),
        ("key_3", (2, 32), (3, 5)),
    ]
    latent = make_step(tiny_model("deepseek_v3"), None, TREE.prefix(1)).states
    assert [(state.kind, state.shape) for state in latent] == [("latent", (1, 16)), ("latent", (1, 8))] * 2


@pytest.mark.slow
@pytest.mark.parametrize("form", COMPILED)
def test_bundles_decode_as_transformers(stock: Stock, form: str) -> None:
    seed = SEEDS.get(form, 0)
    expected = [greedy(tiny_model(form, seed), prompt, COUNT) for prompt in PROMPTS]
    exported = stock.export(form, seed, sampling=form == "gemma4")
    bundle = exported.bundle
    assert bundle.states == exported.step.states
    for graph, rows in ((GRAPH, 2), (ONNXRUNTIME_GRAPH, 1), (ONNXRUNTIME_BATCH_GRAPH, 2)):
        if graph not in bundle.files:
            assert bundle.graphs[graph].left_out
            continue
        backend = OnnxRuntimeBackend(bundle, rows=rows, threads=1, graph=bundle.folder / graph)
        for size, chunk in zip(SIZES, (64, 7, 16, 7), strict=True):
            result = decode(backend, TREE, PROMPTS[:rows], expected[:rows], size=size, chunk=chunk, count=COUNT)
            assert result.tokens == expected[:rows], (graph, size, chunk)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "one_row", "several_rows"),
    [
        ("granite_swa", ("gather_sinks", "fuse_group_query_attention"), ("write_new_entries_only",)),
        ("deepseek_v2", *[("absorb_latent_expansion",)] * 2),
    ],
)
def test_sinks_and_latent_caches_have_derived_graphs(
    stock: Stock, form: str, one_row: Sequence[str], several_rows: Sequence[str]
) -> None:
    exported = stock.export(form, SEEDS.get(form, 0), sampling=False)
    layers = exported.bundle.model.num_layers
    for graph, names in ((ONNXRUNTIME_GRAPH, one_row), (ONNXRUNTIME_BATCH_GRAPH, several_rows)):
        counts = exported.bundle.graphs[graph].rewrites
        per_layer = 2 if "write_new_entries_only" in names else 1
        assert [counts[name] for name in names] == [per_layer * layers] * len(names)


@pytest.mark.slow
def test_latent_caches_are_expanded_where_weights_are_integers(stock: Stock) -> None:
    exported = stock.export("deepseek_v2", sampling=False)
    facts = StepFacts(margin=exported.step.tree.max_depth, max_positions=512, weights=WeightTypes.all("int8"))
    with pytest.raises(NotApplicableError, match="weights are integers"):
        AbsorbLatentExpansion(facts).requires(ir.load(exported.bundle.graph))


@pytest.fixture
def gemma4(stock: Stock) -> Exported:
    return stock.export("gemma4")


@pytest.mark.slow
def test_a_service_moves_and_copies_states_of_all_shapes(gemma4: Exported) -> None:
    bundle = gemma4.bundle
    expected = greedy(tiny_model("gemma4"), PROMPTS[0], COUNT)
    assert len(bundle.state_groups) == 2
    for graph in (None, bundle.graph):
        backend = OnnxRuntimeBackend(bundle, rows=3, threads=1, graph=graph)
        with MedusaService(bundle, backend, None, prefill_chunk=7) as service:
            for prompt in (PROMPTS[0], PROMPTS[0][:25], PROMPTS[1]):
                service.submit(prompt, max_new_tokens=20)
            again = service.submit([*PROMPTS[0], *expected[:10]], max_new_tokens=20)
            assert list(again.result(60).token_ids) == expected[10:30]


@pytest.mark.slow
def test_sampled_text_is_the_same_for_all_trees(gemma4: Exported) -> None:
    with MedusaEngine.load(gemma4.bundle.folder, threads=1) as engine:
        sampling = SamplingParams(temperature=0.8, top_k=20, seed=3)
        texts = {
            engine.generate(PROMPTS[0], max_new_tokens=24, tree_size=size, sampling=sampling).token_ids
            for size in SIZES
        }
    assert len(texts) == 1


@pytest.mark.slow
def test_long_requests_have_frequencies_of_their_own(stock: Stock, tmp_path: Path) -> None:
    """A prompt beyond the original length is computed with the long frequencies, whole, as transformers does."""
    model = tiny_model("phi3_longrope")
    assert (short_positions(model), max_positions(model)) == (128, 512)
    bundle = stock.export("phi3_longrope", sampling=False).bundle
    short, long = [(3 * i * i + i) % 101 for i in range(127)], [(3 * i * i + i) % 101 for i in range(140)]
    prompts = {91: PROMPTS[0], 1: short, 40: long, 20: [*long[:135], 7]}
    expected = {count: greedy(model, prompt, count) for count, prompt in prompts.items()}
    for kind in (CPU, "stand-in-4"):
        with (
            rig_of(kind, bundle, tmp_path) as rig,
            MedusaService(bundle, rig.backend(), None, prefill_chunk=7) as service,
        ):
            handles = {count: service.submit(prompt, max_new_tokens=count) for count, prompt in prompts.items()}
            assert {count: list(handle.result(60).token_ids) for count, handle in handles.items()} == expected
            again = service.submit(long, max_new_tokens=40).result(60)  # after a short one that begins with it
            assert list(again.token_ids) == expected[40]
            assert service.submit(short, max_new_tokens=1).result(60).stats.cached_tokens < 127
    with MedusaEngine.load(bundle.folder, threads=1) as engine:
        for size in (1, 3, 9):
            assert list(engine.generate(long, max_new_tokens=40, tree_size=size).token_ids) == expected[40]
        with pytest.raises(RequestError, match="cross 128 tokens"):
            engine.generate(PROMPTS[0], max_new_tokens=92)
        with pytest.raises(RequestError, match="exceed the 512 tokens"):
            engine.generate(long, max_new_tokens=400)


def test_steps_of_long_and_short_rows() -> None:
    model = tiny_model("phi3_longrope")
    prompts = [[(3 * i * i + i) % 101 for i in range(140)], PROMPTS[0]]
    expected = [greedy(model, prompt, 24) for prompt in prompts]
    backend = EagerBackend(make_step(model, random_heads(model)), rows=2)
    backend.set_long(0, True)
    for size, chunk in zip(SIZES, (200, 7, 16, 7), strict=True):
        result = decode(backend, TREE, prompts, expected, size=size, chunk=chunk, count=24)
        assert result.tokens == expected, (size, chunk)


@pytest.mark.parametrize("heads", [1, 4, 6, 8, 12])
def test_slopes_of_alibi(heads: int) -> None:
    bloom = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)[:, 0, 1]
    torch.testing.assert_close(torch.tensor(bloom_slopes(heads)), bloom)
    mpt = -build_mpt_alibi_tensor(heads, 2)[:, 0, 0]
    torch.testing.assert_close(torch.tensor(mpt_slopes(heads)), mpt)
