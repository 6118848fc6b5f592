"""Exports of quantized checkpoints: integers are stored as they are, or the export says that they aren't."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
from click.testing import CliRunner
from gguf import GGMLQuantizationType as Kind

import medusa_export
from medusa_export.cli import main
from medusa_export.common.errors import MedusaWarning
from medusa_export.targets.onnxruntime.block_sums import SumBlocks
from medusa_export.verification.stored_matrices import CHECK, stored_matrices
from medusa_runtime.bundles.bundle import ONNXRUNTIME_BATCH_GRAPH, ONNXRUNTIME_GRAPH, Bundle
from support.gguf_files import write_gguf
from support.packed_models import write_gptq
from support.tiny_models import tiny_model


def export(source: Path, output: Path, weights: str | None) -> list[str]:
    """Exports a model, and returns the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", MedusaWarning)
        medusa_export.export(str(source), output, with_tokenizer=False, sampling=False, weights=weights)
    return [str(warning.message) for warning in caught if issubclass(warning.category, MedusaWarning)]


@pytest.mark.slow
def test_integers_of_the_checkpoint_are_stored_without_a_word(tmp_path: Path) -> None:
    source, _ = write_gptq(tmp_path / "model")
    assert not [words for words in export(source, tmp_path / "bundle", "int4") if "dequantized" in words]
    verified = medusa_export.verify(tmp_path / "bundle", source, max_new_tokens=8)
    assert verified.passed, [check for check in verified.checks if check.mismatches]


@pytest.mark.slow
def test_blocks_with_minima_are_stored_exactly(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "model.gguf", tiny_model("llama", vocab_size=300), kind=Kind.Q4_1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", MedusaWarning)
        bundle = medusa_export.export(
            source, tmp_path / "bundle", init_heads=2, top_k=2, with_tokenizer=False, weights="int4"
        )
    assert [str(warning.message).partition(" The bundle")[0] for warning in caught] == [
        "1 matrices of model are dequantized: GGUF Q4_1 (1)."  # the embeddings, which are looked up in 8-bit rows
    ]
    matrices = list(stored_matrices(bundle))
    assert sum(matrix.blocks.offsets is not None for matrix in matrices if not matrix.is_table) == 9
    inputs = 4 * bundle.model.num_layers + 2  # four per layer, and those of lm_head for the model and for the heads
    for name in (ONNXRUNTIME_GRAPH, ONNXRUNTIME_BATCH_GRAPH):
        assert bundle.graphs[name].rewrites[SumBlocks.name] == inputs
    verified = medusa_export.verify(bundle, source, max_new_tokens=24)
    assert verified.passed, [check for check in verified.checks if check.mismatches]
    assert next(check for check in verified.checks if check.name == CHECK).figures["largest_error"] < 0.02


@pytest.mark.slow
@pytest.mark.parametrize(
    ("desc_act", "weights", "kind"),
    [(True, "int4", " with desc_act"), (False, None, "")],
)
def test_matrices_that_are_dequantized_are_counted(
    desc_act: bool, weights: str | None, kind: str, tmp_path: Path
) -> None:
    source, _ = write_gptq(tmp_path / "model", desc_act=desc_act)
    notes = [words for words in export(source, tmp_path / "bundle", weights) if "dequantized" in words]
    assert [note.partition(" The bundle")[0] for note in notes] == [
        f"14 matrices of model are dequantized: GPTQ of 4 bits{kind} (14)."
    ]


@pytest.mark.slow
def test_matrices_that_stay_in_eight_bits_are_counted(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "model.gguf", tiny_model("llama", vocab_size=300), kind=Kind.Q8_0)
    out = str(tmp_path / "bundle")
    arguments = ["onnx", str(source), "--no-heads", "-o", out, "--weights", "int4", "--no-tokenizer", "--greedy-only"]
    kept = CliRunner().invoke(main, arguments)
    assert kept.exit_code == 0
    assert "hold in 8 bits are stored so, not in int4: layers (8), lm_head (1)." in kept.output
    assert "--lm-head-weights int4 rounds the lm_head." in kept.output
    narrowed = CliRunner().invoke(main, [*arguments, "--overwrite", "--lm-head-weights", "int4"])
    assert "not in int4: layers (8).\n" in narrowed.output
    assert [str(facts) for facts in Bundle.load(out).matrices if facts.part == "lm_head"] == [
        "1 int4, blocks of 32 with scales"
    ]
