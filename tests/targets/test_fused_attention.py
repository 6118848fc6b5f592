"""Bundles with weights in integers and ONNX Runtime's own attention: faster, and not the same for every tree size."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import medusa_export
from medusa_export.common.errors import OptionError
from medusa_export.targets.onnxruntime.group_query_attention import FuseGroupQueryAttention
from medusa_export.targets.onnxruntime.row_exact_attention import MakeAttentionRowExact
from medusa_export.verification import generation
from medusa_export.verification.verify import PROMPTS
from medusa_runtime import Bundle, MedusaEngine
from medusa_runtime.backends.base import rows_differ
from medusa_runtime.backends.onnxruntime import backend as backend_module
from medusa_runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from medusa_runtime.backends.onnxruntime.row_rules import RowRule
from medusa_runtime.bundles.bundle import ONNXRUNTIME_BATCH_GRAPH, ONNXRUNTIME_GRAPH
from medusa_runtime.request import GenerationResult
from support.stock import Stock


@pytest.fixture(scope="module")
def fused(tiny_model_folder: Path, stock: Stock) -> Bundle:
    def fill(folder: Path) -> None:
        options: dict[str, Any] = {"init_heads": 2, "top_k": 3, "with_tokenizer": False, "sampling": False}
        medusa_export.export(tiny_model_folder, folder, weights="int4", fused_attention=True, overwrite=True, **options)

    return Bundle.load(stock.folder("fused_attention", fill))


def test_attention_is_one_operator_and_the_bundle_says_so(fused: Bundle) -> None:
    assert fused.fused_attention
    assert fused.panel is None
    assert fused.graphs[ONNXRUNTIME_GRAPH].rewrites[FuseGroupQueryAttention.name] == fused.model.num_layers
    for name in (ONNXRUNTIME_GRAPH, ONNXRUNTIME_BATCH_GRAPH):
        assert fused.graphs[name].rewrites[MakeAttentionRowExact.name] == 0


def test_the_backend_says_it_without_a_warning(
    fused: Bundle, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = logging.Logger("test")
    log.addHandler(caplog.handler)
    monkeypatch.setattr(backend_module, "_log", log)
    backend = OnnxRuntimeBackend(fused, threads=1)
    assert rows_differ(backend)
    assert backend.exact_rows is RowRule.NONE
    assert not caplog.records


def test_bundles_in_fp32_are_no_such_bundles(stock: Stock) -> None:
    assert not rows_differ(OnnxRuntimeBackend(stock.export("llama").bundle, threads=1))


def wrong_from(place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes answers with trees end otherwise, from some token on."""
    generate = MedusaEngine.generate

    def other(engine: MedusaEngine, *arguments: Any, **options: Any) -> GenerationResult:
        result = generate(engine, *arguments, **options)
        if options["tree_size"] == 1:
            return result
        tokens = result.token_ids
        return replace(result, token_ids=tokens[:place] + tuple(token ^ 1 for token in tokens[place:]))

    monkeypatch.setattr(MedusaEngine, "generate", other)


def checks(bundle: Bundle, source: Path) -> dict[str, medusa_export.Check]:
    outcome = medusa_export.verify(bundle, source, prompts=None, max_new_tokens=12, tree_sizes=[4], prefill_chunks=[64])
    return {check.name: check for check in outcome.checks}


def test_verify_counts_other_tokens_and_bounds_them(
    fused: Bundle, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong_from(4, monkeypatch)
    far = checks(fused, tiny_model_folder)["tokens, tree size 4"]
    assert far.mismatches > 0
    assert not far.passed
    logits = generation.reference_logits
    monkeypatch.setattr(generation, "reference_logits", lambda *arguments: logits(*arguments) * 0.01)
    near = checks(fused, tiny_model_folder)["tokens, tree size 4"]
    assert near.passed
    assert near.figures["ties"] == len(PROMPTS)
    assert 0 < near.figures["largest_tie_margin"] < 1.5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weights": "int4", "kv_cache": "int8"}, "leave `kv_cache` or `fused_attention` out"),
        ({}, "Attention is fused already"),
        ({"weights": "int4", "dtype": "fp16"}, "Attention is fused already"),
    ],
)
def test_it_is_refused_where_it_has_no_effect(
    options: dict[str, Any], words: str, tiny_model_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(OptionError, match=words):
        medusa_export.export(
            tiny_model_folder, tmp_path / "bundle", with_tokenizer=False, fused_attention=True, **options
        )
    assert not (tmp_path / "bundle").exists()
