"""Heads whose weights stay in their file until they are asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

import medusa_export
from medusa_export.common.errors import CheckpointError
from medusa_export.heads.files import load_heads, open_heads
from medusa_export.heads.loaded import LoadedHeads
from medusa_export.heads.modules import MedusaHeads
from medusa_runtime import Tree
from support.extensions.bottleneck_heads import BottleneckConfig, BottleneckHeads
from support.head_files import HIDDEN, MODEL, draw, reference, vllm, without_biases, written
from support.tiny_models import tiny_model

_CONDITIONS = {f"{k}.0.condition.weight": draw(HIDDEN, HIDDEN, seed=300 + k) for k in range(3)}
_TOKEN_MAP = torch.tensor([50, 3, 7])
FORMATS = {
    "own projections": reference(num_layers=2),
    "conditioned, lm_head": {**reference(shared=True), **_CONDITIONS},
    "one projection": {**vllm(without_biases(reference(shared=True))), "lm_head.weight": draw(101, HIDDEN, seed=9)},
    "reduced": {**reference(), "token_map": _TOKEN_MAP},
    "rows of the lm_head": {**reference(shared=True), "token_map": _TOKEN_MAP},
}


@pytest.mark.parametrize("tensors", FORMATS.values(), ids=FORMATS)
def test_each_weight_is_read_from_the_file(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    file = written(tmp_path, {name: t.half() if t.is_floating_point() else t for name, t in tensors.items()})
    model = tiny_model("llama").bfloat16()
    opened, expected = open_heads(file, model), load_heads(file, model)
    assert opened.heads.config == expected.config
    weights = dict(expected.named_parameters())
    assert opened.readers.keys() == weights.keys()
    for name, placeholder in opened.heads.named_parameters():
        assert placeholder.untyped_storage().nbytes() == placeholder.itemsize
        values = opened.readers[name]()
        assert values.dtype == placeholder.dtype == torch.bfloat16
        assert torch.equal(values, weights[name])


def test_the_lm_head_is_read_only_to_compare_it(tmp_path: Path) -> None:
    asked = []

    def read_lm_head() -> Tensor:
        asked.append(True)
        return MODEL.lm_head.weight.detach()

    open_heads(written(tmp_path / "own", reference()), MODEL, read_lm_head)
    assert not asked
    tensors = {**vllm(without_biases(reference(shared=True))), "lm_head.weight": MODEL.lm_head.weight.detach()}
    assert open_heads(written(tmp_path / "shared", tensors), MODEL, read_lm_head).heads.shares_lm_head
    assert asked


def test_the_first_heads_alone_read_their_part_of_each_stack(tmp_path: Path) -> None:
    file = written(tmp_path, reference())
    kept, expected = open_heads(file, MODEL).truncated(2), load_heads(file, MODEL).truncated(2)
    weights = dict(expected.named_parameters())
    assert kept.readers.keys() == weights.keys()
    assert all(torch.equal(read(), weights[name]) for name, read in kept.readers.items())


class _ReversedHeads(BottleneckHeads):
    """Heads that are kept from the last one on."""

    def truncated(self, num_heads: int) -> BottleneckHeads:
        kept = BottleneckHeads(BottleneckConfig(num_heads, HIDDEN, 101), self.lm_head)
        kept.load_state_dict({name: weight.flip(0)[:num_heads] for name, weight in self.state_dict().items()})
        return kept


def test_heads_with_a_truncation_of_their_own_are_read_first() -> None:
    with torch.device("meta"):
        heads = _ReversedHeads(BottleneckConfig(3, HIDDEN, 101), MODEL.lm_head)
    weights = {"down": draw(3, HIDDEN, 8, seed=1), "up": draw(3, 8, HIDDEN, seed=2)}
    opened = LoadedHeads(heads, {name: lambda values=values: values for name, values in weights.items()})
    kept = opened.prepared(torch.float32).truncated(1)
    assert not kept.readers
    assert torch.equal(kept.heads.get_parameter("down"), weights["down"][2:])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "weights"), [("own projections", "int4"), ("rows of the lm_head", None)])
def test_a_bundle_has_the_bytes_of_heads_in_memory(tmp_path: Path, name: str, weights: str | None) -> None:
    base = tiny_model("llama", num_hidden_layers=1)
    base.save_pretrained(tmp_path / "model")
    torch.save({name: t.half() if t.is_floating_point() else t for name, t in FORMATS[name].items()}, tmp_path / "h.pt")
    tree = Tree.from_paths([[0], [1], [0, 0]])  # two of the three heads

    def exported(folder: str, heads: str | MedusaHeads) -> dict[str, bytes]:
        out = tmp_path / folder
        medusa_export.export(
            tmp_path / "model", out, heads=heads, tree=tree, with_tokenizer=False, sampling=False, weights=weights
        )
        return {file.name: file.read_bytes() for file in out.iterdir()}

    streamed = exported("streamed", str(tmp_path / "h.pt"))
    assert streamed == exported("in_memory", load_heads(tmp_path / "h.pt", base))
    assert any(file.endswith(".data") for file in streamed)


def test_a_type_that_torch_lacks_is_refused_by_name(tmp_path: Path) -> None:
    header = {"0.0.linear.weight": {"dtype": "F4", "shape": [64, 64], "data_offsets": [0, 2048]}}
    text = json.dumps(header).encode()
    (tmp_path / "heads.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(2048))
    with pytest.raises(CheckpointError, match=r"0\.0\.linear\.weight is stored as F4"):
        load_heads(tmp_path / "heads.safetensors", MODEL)
