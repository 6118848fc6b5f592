"""Exports of quantized checkpoints: integers are stored as they are, or the export says that they aren't."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

import medusa_export
from medusa_export.common.errors import MedusaWarning
from support.packed_models import write_gptq


def export(source: Path, output: Path, weights: str | None) -> list[str]:
    """Exports a model, and returns the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", MedusaWarning)
        medusa_export.export(str(source), output, with_tokenizer=False, sampling=False, weights=weights)
    return [str(warning.message) for warning in caught if issubclass(warning.category, MedusaWarning)]


def test_integers_of_the_checkpoint_are_stored_without_a_word(tmp_path: Path) -> None:
    source, _ = write_gptq(tmp_path / "model")
    assert not [words for words in export(source, tmp_path / "bundle", "int4") if "dequantized" in words]
    verified = medusa_export.verify(tmp_path / "bundle", source, max_new_tokens=8)
    assert verified.passed, [check for check in verified.checks if check.mismatches]


@pytest.mark.parametrize(("desc_act", "weights", "kind"), [(True, "int4", " with desc_act"), (False, None, "")])
def test_matrices_that_are_dequantized_are_counted(
    desc_act: bool, weights: str | None, kind: str, tmp_path: Path
) -> None:
    source, _ = write_gptq(tmp_path / "model", desc_act=desc_act)
    notes = [words for words in export(source, tmp_path / "bundle", weights) if "dequantized" in words]
    assert [note.partition(" The bundle")[0] for note in notes] == [
        f"14 matrices of model are dequantized: GPTQ of 4 bits{kind} (14)."
    ]
