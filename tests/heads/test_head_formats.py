"""Heads from every published format, written as the formats' authors write them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from medusa_export.common.errors import CheckpointError
from medusa_export.heads.files import load_heads
from medusa_export.heads.modules import MedusaConfig
from medusa_export.heads.writer import save_heads
from medusa_export.models.checkpoints import load_model
from support.head_files import (
    HIDDEN,
    MODEL,
    STATE,
    check,
    draw,
    expected_logits,
    reference,
    vllm,
    without_biases,
    written,
)
from support.tiny_models import VOCAB_SIZE, tiny_model


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("shared", [False, True])
def test_heads_alone_as_safetensors(tmp_path: Path, num_layers: int, shared: bool) -> None:
    tensors = reference(num_layers=num_layers, shared=shared)
    folder = written(tmp_path, tensors)
    (folder / "config.json").write_text('{"medusa_num_heads": 2, "medusa_num_layers": 1}')  # wrong, as on the hub
    heads = load_heads(folder, MODEL)
    check(heads, tensors, num_layers=num_layers)
    assert heads.config.shared_lm_head == shared
    check(load_heads(str(folder / "medusa_lm_head.safetensors"), MODEL), tensors, num_layers=num_layers)


@pytest.mark.parametrize("zipped", [True, False])
def test_heads_alone_as_pickle(tmp_path: Path, zipped: bool) -> None:
    tensors = reference()
    torch.save(tensors, tmp_path / "medusa_lm_head.pt", _use_new_zipfile_serialization=zipped)
    check(load_heads(tmp_path, MODEL), tensors)


def test_layers_that_repeat_one_block(tmp_path: Path) -> None:
    """The reference builds deeper heads from one block object, and its pickle keeps the sharing."""
    block = {"linear.weight": draw(HIDDEN, HIDDEN, seed=1), "linear.bias": draw(HIDDEN, seed=2)}
    tensors = {f"0.{j}.{name}": tensor for j in range(2) for name, tensor in block.items()}
    tensors["0.2.weight"] = draw(VOCAB_SIZE, HIDDEN, seed=3)
    torch.save(tensors, tmp_path / "medusa_lm_head.pt")
    heads = load_heads(tmp_path, MODEL)
    check(heads, tensors, num_heads=1, num_layers=2)
    save_heads(heads, tmp_path / "out", base_model_name_or_path="base")
    check(load_heads(tmp_path / "out", MODEL), tensors, num_heads=1, num_layers=2)
    heads.get_parameter("layers.0.weight").zero_()
    assert heads.get_parameter("layers.1.weight").any()


@pytest.mark.parametrize("shared", [False, True])
def test_merged_checkpoint_of_several_shards(tmp_path: Path, shared: bool) -> None:
    MODEL.save_pretrained(tmp_path, max_shard_size="100KB")
    index_file = tmp_path / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    tensors = reference(shared=shared)
    for i, (name, tensor) in enumerate(tensors.items()):
        shard = f"heads-{i % 2}.safetensors"
        known = load_file(tmp_path / shard) if (tmp_path / shard).exists() else {"rotary_emb.inv_freq": torch.zeros(1)}
        save_file({**known, f"medusa_head.{name}": tensor}, tmp_path / shard, metadata={"format": "pt"})
        index["weight_map"][f"medusa_head.{name}"] = shard
    index_file.write_text(json.dumps(index))
    check(load_heads(tmp_path, MODEL), tensors)
    base = load_model(str(tmp_path), dtype=torch.float32)
    check(load_heads(tmp_path, base), tensors)
    (tmp_path / "heads-1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"heads-1\.safetensors, which is missing"):
        load_heads(tmp_path, MODEL)


def test_merged_checkpoint_in_one_file(tmp_path: Path) -> None:
    tensors = reference()
    merged = {**MODEL.state_dict(), **reference(prefix="medusa_head.")}
    check(load_heads(written(tmp_path / "a", merged, "model.safetensors"), MODEL), tensors)
    (tmp_path / "b").mkdir()
    torch.save(merged, tmp_path / "b" / "pytorch_model.bin")
    check(load_heads(tmp_path / "b", MODEL), tensors)


@pytest.mark.parametrize("prefix", ["", "medusa_heads."])
@pytest.mark.parametrize("num_layers", [1, 2])
def test_vllm(tmp_path: Path, num_layers: int, prefix: str) -> None:
    tensors = without_biases(reference(num_layers=num_layers))
    folder = written(tmp_path, vllm(tensors, num_layers, prefix), "model.safetensors")
    check(load_heads(folder, MODEL), tensors, num_layers=num_layers)


def test_vllm_with_biases(tmp_path: Path) -> None:
    tensors = reference()
    biases = {f"blocks.{k}.layers.0.bias": tensors[f"{k}.0.linear.bias"] for k in range(3)}
    check(load_heads(written(tmp_path, {**vllm(tensors), **biases}), MODEL), tensors)


@pytest.mark.parametrize("name", ["lm_head.weight", "lm_heads.0.weight"])
def test_vllm_with_one_projection(tmp_path: Path, name: str) -> None:
    tensors = without_biases(reference(shared=True))
    weight = draw(VOCAB_SIZE, HIDDEN, seed=9)
    heads = load_heads(written(tmp_path, {**vllm(tensors), name: weight}), MODEL)
    check(heads, {**tensors, **{f"{k}.1.weight": weight for k in range(3)}})
    assert heads.config.one_projection
    assert heads.projections is not None and len(heads.projections) == 1


def test_a_projection_that_is_the_lm_head_is_shared(tmp_path: Path) -> None:
    tensors = {**without_biases(reference(shared=True))}
    folder = written(tmp_path, {**vllm(tensors), "lm_head.weight": MODEL.lm_head.weight.detach()})
    heads = load_heads(folder, MODEL)
    assert heads.config.shared_lm_head
    check(heads, tensors)


@pytest.mark.parametrize("full", [False, True])
def test_reduced_vocabulary(tmp_path: Path, full: bool) -> None:
    """The projections may still hold every row: vLLM takes those of the map."""
    token_map = torch.tensor([50, 3, 7, 100, 0])
    tensors = without_biases(reference())
    reduced = {n: t if full or t.shape[0] == HIDDEN else t[token_map] for n, t in tensors.items()}
    heads = load_heads(written(tmp_path, {**vllm(reduced), "token_map": token_map.int()}), MODEL)
    assert heads.token_map is not None
    assert heads.token_map.tolist() == token_map.tolist()
    assert heads.config == MedusaConfig(3, HIDDEN, 5, shared_lm_head=False, reduced_vocab=True)
    torch.testing.assert_close(heads(STATE), expected_logits(tensors)[..., token_map])


def test_reduced_vocabulary_of_the_shared_lm_head(tmp_path: Path) -> None:
    token_map = torch.tensor([50, 3, 7])
    tensors = reference(shared=True)
    heads = load_heads(written(tmp_path, {**tensors, "token_map": token_map}), MODEL)
    torch.testing.assert_close(heads(STATE), expected_logits(tensors)[..., token_map])


def test_heads_take_the_dtype_of_the_model(tmp_path: Path) -> None:
    folder = written(tmp_path, {n: t.half() for n, t in reference().items()})
    heads = load_heads(folder, tiny_model("llama").bfloat16())
    assert {parameter.dtype for parameter in heads.parameters()} == {torch.bfloat16}


def test_conditioned_heads_are_given_the_next_token(tmp_path: Path) -> None:
    tensors = reference(num_layers=2, shared=True)
    conditions = {f"{k}.0.condition.weight": draw(HIDDEN, HIDDEN, seed=300 + k) for k in range(3)}
    heads = load_heads(written(tmp_path / "in", {**tensors, **conditions}), MODEL)
    assert heads.config.conditioned
    embedded = draw(3, HIDDEN, seed=7)
    inner = [
        STATE @ tensors[f"{k}.0.linear.weight"].T + tensors[f"{k}.0.linear.bias"] + embedded @ weight.T
        for k, weight in enumerate(conditions.values())
    ]
    states = [STATE + nn.functional.silu(x) for x in inner]
    states = [
        x + nn.functional.silu(x @ tensors[f"{k}.1.linear.weight"].T + tensors[f"{k}.1.linear.bias"])
        for k, x in enumerate(states)
    ]
    torch.testing.assert_close(heads(STATE, embedded), MODEL.lm_head(torch.stack(states, 1)))
    save_heads(heads, tmp_path / "out", base_model_name_or_path="base")
    torch.testing.assert_close(load_heads(tmp_path / "out", MODEL)(STATE, embedded), heads(STATE, embedded))
    with pytest.raises(CheckpointError, match=r"lacks the tensor 1\.0\.condition\.weight"):
        load_heads(
            written(tmp_path / "cut", {**tensors, "0.0.condition.weight": conditions["0.0.condition.weight"]}), MODEL
        )
