"""Text models out of larger ones: weights, refusals, and the same tokens as the larger model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Llama4ForConditionalGeneration, PreTrainedModel

from medusa_export import export, verify
from medusa_export.common.errors import CheckpointError, ModelNotSupportedError
from medusa_export.models.checkpoints import load_model, open_model
from medusa_export.models.text_model import text_model
from medusa_export.step.attention import ATTENTION_NAME
from medusa_export.step.eager import EagerBackend
from medusa_export.verification.weights import weights_check
from medusa_runtime import MedusaEngine
from support.decoding import TREE, decode, greedy, make_step, random_heads
from support.larger_models import LARGER, larger_model, omni_model
from support.tiny_tokenizer import make_tokenizer

COUNT = 48
PROMPTS = [[(7 * i * i + 3) % 90 for i in range(37)], [(5 * i * i + 11 * i + 1) % 90 for i in range(20)]]


def saved(model: PreTrainedModel, folder: Path) -> str:
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("name", LARGER)
def test_its_text_model_decodes_as_the_whole(tmp_path: Path, name: str) -> None:
    whole = larger_model(name)
    # Llama 4 of images and text fails in transformers 5.24, whatever its input is. Its text model decodes.
    decoder = whole.language_model if isinstance(whole, Llama4ForConditionalGeneration) else whole
    expected = [greedy(decoder, prompt, COUNT) for prompt in PROMPTS]
    assert len(set(expected[0])) > 5
    source = saved(whole, tmp_path / "model")
    text = load_model(source, dtype=torch.float32, attn_implementation=ATTENTION_NAME, text_only=True)
    check = weights_check(source, text, "float32")
    assert check.passed, check.notes
    step = make_step(text, random_heads(text))
    step.sampling = False
    # tests/graph/test_attention_forms.py has the attention of these models with other trees and chunks.
    result = decode(EagerBackend(step, rows=2), TREE, PROMPTS, expected, size=9, chunk=7, count=COUNT)
    assert result.tokens == expected


@pytest.mark.slow
def test_the_part_that_answers_with_text_is_found_in_a_model_that_speaks(tmp_path: Path) -> None:
    whole = omni_model()
    expected = [greedy(whole.thinker, prompt, COUNT) for prompt in PROMPTS]
    source = saved(whole, tmp_path / "model")
    torch.save({}, tmp_path / "model" / "spk_dict.pt")  # the voices
    text = load_model(source, dtype=torch.float32, attn_implementation=ATTENTION_NAME, text_only=True)
    backend = EagerBackend(make_step(text, random_heads(text)), rows=2)
    result = decode(backend, TREE, PROMPTS, expected, size=9, chunk=7, count=COUNT)
    assert result.tokens == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param("gemma3", marks=pytest.mark.exhaustive), "qwen2_5_vl"])
def test_its_bundle_passes_verification(tmp_path: Path, name: str) -> None:
    """The reference is the larger model, and each weight of the text model is found in the files."""
    source = saved(larger_model(name), tmp_path / "model")
    export(source, tmp_path / "bundle", init_heads=2, text_only=True)
    assert (tmp_path / "bundle" / "tokenizer.json").exists()
    outcome = verify(tmp_path / "bundle", source, text_only=True, max_new_tokens=8, prefill_chunks=(7,))
    assert outcome.passed, [(check.name, check.notes) for check in outcome.checks if not check.passed]


@pytest.mark.slow
def test_a_loaded_larger_model_is_left_as_it_was(tmp_path: Path) -> None:
    whole = larger_model("smolvlm")
    before = greedy(whole, PROMPTS[0], COUNT)
    names = list(whole.state_dict())
    export(whole, tmp_path, init_heads=2, text_only=True)
    with MedusaEngine.load(tmp_path) as engine:
        assert list(engine.generate(PROMPTS[0], max_new_tokens=COUNT).token_ids) == before
    assert greedy(whole, PROMPTS[0], COUNT) == before
    assert list(whole.state_dict()) == names


def test_weights_of_other_parts_stay_in_their_files(tmp_path: Path) -> None:
    whole = larger_model("qwen2_5_vl")
    opened = open_model(saved(whole, tmp_path), dtype=torch.float32, attn_implementation=ATTENTION_NAME, text_only=True)
    text = text_model(whole)
    expected = dict(text.named_parameters())
    assert set(opened.readers) == set(expected)
    assert not any("visual" in name for name in opened.readers)
    assert all(torch.equal(read(), expected[name]) for name, read in opened.readers.items())


def test_a_tensor_without_a_place_in_the_whole_is_refused(tmp_path: Path) -> None:
    source = saved(larger_model("qwen2_5_vl"), tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({**load_file(file), "model.language_model.layers.0.extra.weight": torch.zeros(2)}, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.0\.extra"):
        load_model(source, dtype=torch.float32, text_only=True)


def test_the_whole_is_refused_with_the_name_of_the_option(tmp_path: Path) -> None:
    source = saved(larger_model("qwen2_5_vl"), tmp_path)
    with pytest.raises(ModelNotSupportedError, match="`text_only=True`"):
        load_model(source, dtype=torch.float32)


def changing_logits(change: Callable[[Tensor], Tensor]) -> PreTrainedModel:
    """A larger model that changes logits behind its output projection."""
    whole = larger_model("qwen2_5_vl")
    original = whole.forward

    def changed(*args: object, **given: object) -> object:
        output = original(*args, **given)
        output.logits = change(output.logits)
        return output

    whole.forward = changed
    return whole


def test_logits_that_are_divided_behind_the_projection_stay_so() -> None:
    """Granite divides logits, also in larger models."""
    whole = changing_logits(lambda logits: logits / 6)
    text = text_model(whole)
    ids = torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        torch.testing.assert_close(text(ids, use_cache=False).logits, whole(ids, use_cache=False).logits)


def test_logits_that_change_behind_the_projection_are_refused() -> None:
    whole = changing_logits(lambda logits: logits - 2)
    with pytest.raises(ModelNotSupportedError, match="behind its output projection"):
        text_model(whole)
