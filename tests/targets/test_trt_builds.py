"""Real builds by TensorRT-RTX, ahead of time: random models of every family, and SmolLM2."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx
from polygraphy.comparator import Comparator, CompareFunc

import medusa_export
from medusa_export import WeightTypes
from medusa_export.common.errors import EngineBuildError
from medusa_export.graph.export import build_graph
from medusa_export.targets.tensorrt.builder import EngineBuilder
from medusa_export.targets.tensorrt.network import updated_in_place
from medusa_export.targets.tensorrt.options import BuildOptions, check_weights, choose_limits
from medusa_export.targets.tensorrt.profiles import profiles_for
from medusa_export.targets.tensorrt.rewrites.pipeline import TENSORRT, graph_for_tensorrt
from medusa_runtime import Bundle, Tree
from medusa_runtime.backends.tensorrt.library import import_tensorrt
from medusa_runtime.bundles.compiled import EngineLimits
from medusa_runtime.bundles.facts import WeightFacts
from medusa_runtime.sampling import GREEDY, SamplingParams
from support.decoding import TREE, export, make_step, random_heads
from support.stock import Stock
from support.tiny_models import FORMS, SUPPORTED_FAMILIES, families, tiny_model

LIMITS = EngineLimits(max_batch=4, capacity=96, max_prefill=32)
TARGETS = ("sm80", "sm89", "sm120")
# Layers that the parser makes of the tiny llama with its tree; more of them means that a rewrite no longer applies.
MOST_LAYERS = {"float32": 438, "float16": 453}
SAMPLING_LAYERS = 517  # with constraints, and with 11 that rank tokens
# Built in fp32: a window and biases, soft caps, learned positions, experts, and sinks. What one of these lacks is like
# one of them, or one of those below.
BUILT = ("qwen2", "gemma2", "gpt2", "mixtral", "gpt_oss")
REFUSED = "jetmoe"  # TensorRT-RTX's parser refuses it
# Built in fp16, from bundles of their own: one without experts, windows or latent caches, and one with each of them.
HALF = ("llama", "glm4_moe", "gemma3_text", "deepseek_v3")


def builds() -> list[Any]:
    """Pairs of a family and the type of its weights. The bundles in fp32 are those that other tests decode with."""
    wide, rare = pytest.mark.slow, pytest.mark.exhaustive
    return [
        *(pytest.param(family, "float16", marks=[] if family == "llama" else wide) for family in HALF),
        *(pytest.param(family, "float32", marks=wide) for family in BUILT),
        *(
            pytest.param(family, "float16", marks=rare)
            for family in sorted({*SUPPORTED_FAMILIES, *FORMS} - {*HALF, REFUSED})
        ),
    ]


@pytest.mark.parametrize(("family", "dtype"), builds())
def test_families_build_for_several_targets(family: str, dtype: str, stock: Stock) -> None:
    """For three architectures at once; ``parse`` holds the network against ``medusa.json``."""
    half = dtype == "float16"
    bundle = (stock.export(family, dtype=dtype, sampling=family == "llama") if half else stock.family(family)).bundle
    builder = EngineBuilder(import_tensorrt("tensorrt-rtx"), bundle, BuildOptions(LIMITS, TARGETS, opt_level=0))
    reached: list[float] = []
    built = builder.build(reached.append)
    assert built.data.nbytes > 100_000
    assert built.targets == TARGETS
    assert reached == sorted(reached) and reached[-2] > 0.8 and reached[-1] == 1.0
    trt, network = builder.library.trt, builder.network
    inputs = {network.get_input(i).name: network.get_input(i) for i in range(network.num_inputs)}
    assert list(inputs) == [spec.name for spec in bundle.inputs]
    heads, size = bundle.states[0].shape
    assert tuple(inputs["past_key_0"].shape) == (-1, heads, 96, size)
    assert inputs["past_key_0"].dtype == getattr(trt, dtype)
    assert inputs["input_ids"].dtype == trt.int64
    assert inputs["is_prefill"].dtype == trt.bool
    pairs = updated_in_place(trt, network)
    assert pairs == {name: name.replace("present", "past") for name in pairs}
    assert len(pairs) == len(bundle.states) == built.layers["KV_CACHE_UPDATE"]


@pytest.mark.parametrize(
    ("dtype", "sampling"),
    [
        ("float32", False),
        ("float16", True),
        pytest.param("float32", True, marks=pytest.mark.slow),
        pytest.param("float16", False, marks=pytest.mark.slow),
    ],
)
def test_the_graph_stays_small(stock: Stock, dtype: str, sampling: bool) -> None:
    """Its greedy part, and what sampling adds, which is the same for all models."""
    bundle = stock.export(dtype=dtype, sampling=sampling).bundle
    builder = EngineBuilder(import_tensorrt("tensorrt-rtx"), bundle, BuildOptions(LIMITS, TARGETS))
    builder.parse()
    layers = builder.layer_counts()
    assert sum(layers.values()) == builder.network.num_layers <= MOST_LAYERS[dtype] + sampling * SAMPLING_LAYERS


def test_each_rewrite_takes_place(stock: Stock, caplog: pytest.LogCaptureFixture) -> None:
    """But for those of integers and soft caps, which this model has none of."""
    bundle = stock.export(dtype="float16").bundle
    caplog.clear()
    graph = graph_for_tensorrt(bundle, LIMITS.capacity)
    assert caplog.text == ""  # the graph is complete: every value that has a shape has a type
    assert list(graph.rewrites) == [rewrite.name for rewrite in TENSORRT.rewrites]
    assert [name for name, count in graph.rewrites.items() if count == 0] == [
        "sign_block_weights",
        "spell_out_soft_caps",
    ]
    onnx.load_from_string(graph.data)


@pytest.mark.filterwarnings("ignore:invalid value encountered in divide")  # Polygraphy's figures, of zeros
@pytest.mark.parametrize(
    "family", families("llama", others=("gemma3_text", "gpt_neox", "qwen2", "qwen3", "gemma2", "cohere"))
)
def test_rewrites_change_no_result(family: str, stock: Stock, tmp_path: Path) -> None:
    """The rewritten graph is standard ONNX: ONNX Runtime gives the same for it, caches included."""
    compare_rewritten(stock.family(family).bundle, tmp_path)


@pytest.fixture(scope="module")
def integer_bundle(stock: Stock) -> Bundle:
    """All kinds of matrices in integers: 4 bits with zero points, 8 bits without, and a table."""
    types = WeightTypes("int4", "int8", "int4", "int8", block_size=16, symmetric=False)

    def fill(folder: Path) -> None:
        model = tiny_model("llama")
        step = make_step(model, random_heads(model), TREE)
        step.sampling = False  # such a graph is traced faster
        export(step, folder, graph=build_graph(step, types=types))

    return Bundle.load(stock.folder("integers-for-tensorrt", fill))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:invalid value encountered in divide")  # Polygraphy's figures, of zeros
def test_signed_integers_change_no_result(integer_bundle: Bundle, tmp_path: Path) -> None:
    compare_rewritten(integer_bundle, tmp_path)
    graph = onnx.load(tmp_path / "bundle" / "for-tensorrt.onnx", load_external_data=False).graph
    kinds = {onnx.TensorProto.DataType.Name(tensor.data_type) for tensor in graph.initializer}
    assert "INT4" in kinds and not kinds & {"UINT4", "UINT8", "INT8"}


@pytest.mark.slow
def test_integers_build_for_gpus_that_have_them(integer_bundle: Bundle) -> None:
    library = import_tensorrt("tensorrt-rtx")
    builder = EngineBuilder(library, integer_bundle, BuildOptions(LIMITS, TARGETS, opt_level=0))
    built = builder.build()
    assert built.rewrites["sign_block_weights"] == built.layers["DEQUANTIZE"] + 2  # lm_head and the table
    assert b"ReplCastMulCastFc" in bytes(built.data)  # kernels of products read integers
    check_weights(integer_bundle, TARGETS)
    with pytest.raises(EngineBuildError, match="int4 weights, which TensorRT takes from sm80 on, not for sm75"):
        check_weights(integer_bundle, ("sm75", "sm80"))
    check_weights(replace(integer_bundle, weights=WeightFacts(layers="int8")), ("sm75",))
    with pytest.raises(EngineBuildError, match="rounds activations to 8 bits"):
        check_weights(replace(integer_bundle, weights=WeightFacts("int8", activations="int8")), TARGETS)


@pytest.mark.slow
def test_engines_hold_4_bit_integers(tmp_path: Path) -> None:
    """An engine is smaller than one with fp16 weights by about what its integers and scales take less."""
    sizes = {}
    for name, weights in (("fp16", None), ("int4", WeightTypes("int4", "int4"))):
        model = tiny_model("llama", hidden_size=512, intermediate_size=2048, vocab_size=2000).half()
        step = make_step(model, None, Tree())
        step.sampling = False
        export(step, tmp_path / name, graph=build_graph(step, types=weights))
        bundle = Bundle.load(tmp_path / name)
        builder = EngineBuilder(import_tensorrt("tensorrt-rtx"), bundle, BuildOptions(LIMITS, ("sm89",), opt_level=0))
        sizes[name] = builder.build().data.nbytes
    matrices = [weight for weight in model.parameters() if weight.ndim == 2]
    count = sum(map(torch.Tensor.numel, matrices)) - model.get_input_embeddings().weight.numel()
    expected = count * (16 - 4 - 16 / 32) / 8
    assert 0.9 * expected < sizes["fp16"] - sizes["int4"] < expected  # kernels have more source


def compare_rewritten(exported: Bundle, tmp_path: Path) -> None:
    """Runs the standard graph of a bundle and the one for TensorRT on the same inputs."""
    bundle = Bundle.load(Path(shutil.copytree(exported.folder, tmp_path / "bundle")))
    rewritten = tmp_path / "bundle" / "for-tensorrt.onnx"
    graph = graph_for_tensorrt(bundle, LIMITS.capacity)
    assert not graph.made  # such a small model has no large constants
    rewritten.write_bytes(graph.data)
    onnx.checker.check_model(str(rewritten))
    feeds = [random_inputs(bundle, size, draws) for size in (1, 4, TREE.size, 20) for draws in (0, size)]
    runners = [OnnxrtRunner(SessionFromOnnx(str(graph))) for graph in (bundle.graph, rewritten)]
    results = Comparator.run(runners, data_loader=feeds)
    # integers differ by 1 at least
    (outcome,) = Comparator.compare_accuracy(results, compare_func=CompareFunc.simple(atol=1e-4, rtol=0))
    assert outcome
    (compared,) = outcome.values()
    assert [set(outputs) for outputs in compared] == [{spec.name for spec in bundle.outputs}] * len(feeds)


def random_inputs(bundle: Bundle, size: int, draws: int) -> dict[str, np.ndarray]:
    """Inputs of a step of two rows, of which one prefills, or both do beyond the tree; so many numbers to draw with."""
    rng = np.random.default_rng(size)
    edits, masks, ranked = (9, min(size, TREE.size), min(size, TREE.max_depth + 1)) if draws else (0, 0, 0)
    sizes = {
        "batch": 2, "capacity": LIMITS.capacity, "sequence": size,
        "draws": draws, "edits": edits, "masks": masks, "ranked": ranked,
    }  # fmt: skip
    feed = {}
    for spec in bundle.inputs:
        shape = [part if isinstance(part, int) else sizes[part] for part in spec.shape]
        feed[spec.name] = (
            rng.standard_normal(shape, np.float32) if spec.dtype == "float32" else rng.integers(0, 101, shape)
        )
    feed["num_tokens"] = np.array([size, max(size - 1, 1)])
    feed["is_prefill"] = np.array([size > TREE.size, True])
    feed["cache_lengths"] = np.array([30, 7])
    if "exponentials" not in feed:
        return feed
    feed["exponentials"] = rng.standard_exponential(feed["exponentials"].shape, np.float32)
    feed["ranked_places"][:] = np.arange(ranked)
    feed["edit_tokens"][:] = rng.permutation(101)[:edits]
    feed["edit_count"] = rng.integers(0, 3, feed["edit_count"].shape).astype(np.float32)
    feed["edit_seen"] = np.minimum(feed["edit_count"], 1)
    feed["repetition_penalty"] = np.full((2, 1, 1), 1.3, np.float32)
    feed["allowed_tokens"] = rng.integers(0, 256, feed["allowed_tokens"].shape, np.uint8)
    rows = [SamplingParams(temperature=0.8, top_k=20, top_p=0.9).row_inputs(), GREEDY.row_inputs()]
    feed |= {name: np.array([row[name] for row in rows], feed[name].dtype) for name in rows[0]}
    return feed


@pytest.mark.slow
def test_plain_decoding_and_one_row_build(stock: Stock) -> None:
    bundle = stock.export(heads=False).bundle
    limits = choose_limits(bundle, max_batch=1, max_seq_len=64)
    assert limits == EngineLimits(1, 64, 64)
    assert profiles_for(bundle, limits)[0].sequence == (1, 1, 1)
    options = BuildOptions(limits, ("sm86",), opt_level=0)
    assert EngineBuilder(import_tensorrt("tensorrt-rtx"), bundle, options).build().data.nbytes > 100_000


@pytest.mark.slow
def test_the_network_of_smollm2_is_within_its_bound(smollm2_bundle: Path) -> None:
    """In fp32, without a build. It has 30 layers, so each layer of the model may grow by three at most."""
    bundle = Bundle.load(smollm2_bundle)
    limits = choose_limits(bundle, max_batch=4, max_seq_len=2048)
    builder = EngineBuilder(import_tensorrt("tensorrt-rtx"), bundle, BuildOptions(limits, TARGETS))
    builder.parse()
    assert builder.network.num_layers < 2650


@pytest.mark.exhaustive
@pytest.mark.parametrize(("sampling", "most"), [(True, 1.18), (False, 1.11)])
def test_smollm2_is_built_within_its_bounds(
    smollm2_gguf: str, smollm2_heads: Path, tmp_path: Path, sampling: bool, most: float
) -> None:
    """Layers, and bytes per byte of weights; docs/gpu.md says what comes on top of these."""
    bundle = medusa_export.export(
        smollm2_gguf,
        tmp_path / "bundle",
        heads=smollm2_heads,
        calibration=smollm2_heads / "calibration.json",
        dtype="fp16",
        sampling=sampling,
    )
    limits = choose_limits(bundle, max_batch=4, max_seq_len=2048)
    built = EngineBuilder(import_tensorrt("tensorrt-rtx"), bundle, BuildOptions(limits, TARGETS)).build()
    assert sum(built.layers.values()) < 2750
    assert built.data.nbytes < most * bundle.files["model.onnx.data"].size
