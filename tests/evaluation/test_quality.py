"""The quality of bundles: a bundle of the model itself, and a quantized one with heads."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import medusa_export
from medusa_export import OptionError, VerificationError
from medusa_export.evaluation.texts import samples_of
from medusa_export.heads.writer import save_heads
from medusa_runtime import Bundle
from support.cli import run
from support.decoding import random_heads
from support.tiny_models import tiny_model


@pytest.mark.slow
def test_a_bundle_of_the_model_itself_is_as_close_as_rounding_allows(
    untrained_bundle: Bundle, tiny_model_folder: Path, data: Path
) -> None:
    found = medusa_export.quality([untrained_bundle.folder], tiny_model_folder, data=[data], limit=5)
    close = found.bundles[0].closeness
    assert found.texts == 5
    assert close.divergence < 1e-8
    assert close.perplexity_ratio == pytest.approx(1, abs=1e-5)
    assert close.same_choice == 1
    assert found.bundles[0].heads is None

    options = {"limit": 5, "text_only": False, "on_progress": lambda _: None}
    samples = samples_of(str(tiny_model_folder), [data], [], max_length=512, **options)
    model, losses = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32), []
    for sample in samples:
        ids, answer = torch.tensor([sample.input_ids]), torch.tensor([sample.is_label])
        with torch.no_grad():
            loss = model(ids, labels=torch.where(answer, ids, -100)).loss
        losses.append((float(loss), sum(sample.is_label)))
    tokens = sum(count for _, count in losses)
    assert close.tokens == tokens
    expected = math.exp(sum(loss * count for loss, count in losses) / tokens)
    assert close.reference_perplexity == pytest.approx(expected, rel=1e-5)


def test_plain_text_is_cut_into_pieces_whose_tokens_count_all(tiny_model_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("A very good text about prompts. " * 9, encoding="utf-8")
    options = {"limit": None, "text_only": False, "on_progress": lambda _: None}
    samples = samples_of(str(tiny_model_folder), [], [path], max_length=16, **options)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    assert [token for sample in samples for token in sample.input_ids] == tokenizer(path.read_text())["input_ids"]
    assert all(sample.is_label == [False] + [True] * (len(sample.is_label) - 1) for sample in samples)
    assert {len(sample.input_ids) for sample in samples[:-1]} == {16}


def test_another_model_is_refused(
    untrained_bundle: Bundle, data: Path, tmp_path: Path, tiny_model_folder: Path
) -> None:
    with pytest.raises(OptionError, match="No bundles"):
        medusa_export.quality([], tiny_model_folder)
    other = tmp_path / "other"
    tiny_model("llama", vocab_size=160).save_pretrained(other)
    AutoTokenizer.from_pretrained(tiny_model_folder).save_pretrained(other)
    with pytest.raises(VerificationError, match="vocabulary of"):
        medusa_export.quality([untrained_bundle.folder], other, data=[data])


@pytest.mark.slow
def test_the_command_measures_a_quantized_bundle_and_its_heads(
    tiny_model_folder: Path, data: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)
    save_heads(random_heads(model), tmp_path / "heads", base_model_name_or_path="tiny")
    heads = tmp_path / "heads"
    bundles = [tmp_path / "int8", tmp_path / "int4"]
    for folder in bundles:
        medusa_export.export(tiny_model_folder, folder, heads=heads, top_k=2, sampling=False, weights=folder.name)
    given = ["--model", tiny_model_folder, "--heads", heads, "--data", data, "--max-length", 64, "-q"]
    report, plot = tmp_path / "quality.json", tmp_path / "quality.png"
    code, output = run("quality", *bundles, *given, "--json", report, "--plot", plot)
    assert code == 0, output
    assert "perplexity" in output and "unquantized" in output
    assert plot.read_bytes().startswith(b"\x89PNG")
    int8, int4 = json.loads(report.read_text())["bundles"]
    assert 0 < int8["closeness"]["divergence"] < int4["closeness"]["divergence"]
    assert int8["megabytes"] > int4["megabytes"]
    assert int4["heads"]["accuracies"] != int4["heads_before"]["accuracies"]
    assert int4["heads_before"] == int8["heads_before"]

    # The same figures come from 'calibrate'.
    calibration = tmp_path / "calibration.json"
    code, output = run(
        "calibrate", tiny_model_folder, "--heads", heads, "--data", data, "--bundle", bundles[1], "--max-length", 64,
        "-o", calibration, "-q",
    )  # fmt: skip
    assert code == 0, output
    measured = json.loads(calibration.read_text())["accuracies"]
    assert measured == [[round(value, 6) for value in head] for head in int4["heads"]["accuracies"]]
    assert medusa_export.search_tree(calibration, 5).size == 5
