"""Files of heads that can't be loaded, and heads on the hub."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from medusa_export.common.errors import CheckpointError
from medusa_export.heads.files import load_heads, stored_dtype
from medusa_export.models.checkpoints import load_model
from support.head_files import (
    MODEL,
    check,
    reference,
    vllm,
    written,
)


class _Code:
    """Unpickled, it runs a command."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.marker}",)


def test_a_pickle_with_code_is_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    file = tmp_path / "medusa_lm_head.pt"
    torch.save({**reference(), "code": _Code(marker)}, file)
    with pytest.raises(CheckpointError, match=r"weights_only=True refuses.*save_file"):
        load_heads(tmp_path, MODEL)
    assert not marker.exists()
    torch.load(file, weights_only=False)  # it does carry code
    assert marker.exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_plain_pickle_with_code_is_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    (tmp_path / "medusa_lm_head.pt").write_bytes(pickle.dumps(_Code(marker)))
    with pytest.raises(CheckpointError, match="run code"):
        load_heads(tmp_path, MODEL)
    assert not marker.exists()


def changed(**changes: Tensor | None) -> dict[str, Tensor]:
    """The reference's heads; ``_`` stands for a dot, and None drops a tensor."""
    named = {name.strip("_").replace("_", "."): tensor for name, tensor in changes.items()}
    return {name: tensor for name, tensor in {**reference(), **named}.items() if tensor is not None}


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (changed(_1_0_linear_weight=None), r"lacks the tensor 1\.0\.linear\.weight.*\[64, 64\]"),
        (changed(_1_0_linear_bias=None), r"lacks the tensor 1\.0\.linear\.bias.*\[64\]"),
        (changed(_2_1_weight=None), r"lacks the tensor 2\.1\.weight.*\[101, 64\]"),
        (changed(_4_0_linear_weight=torch.zeros(64, 64)), r"lacks the tensor 3\.0\.linear\.weight"),
        (changed(_0_1_linear_weight=torch.zeros(64, 64)), r"lacks the tensor 0\.1\.linear\.bias"),
        (changed(_0_2_weight=torch.zeros(101, 64)), r"0\.2\.weight, which has no place"),
        (
            changed(_0_0_linear_weight=torch.zeros(32, 32)),
            r"0\.0\.linear\.weight .*\[32, 32\].*\[64, 64\].*hidden size",
        ),
        (changed(_0_0_linear_bias=torch.zeros(32)), r"0\.0\.linear\.bias .*\[32\].*\[64\]"),
        (changed(_0_1_weight=torch.zeros(102, 64)), r"0\.1\.weight .*\[102, 64\].*\[101, 64\].*vocabulary"),
        (changed(_0_1_weight=torch.zeros(100, 64)), r"0\.1\.weight .*\[100, 64\].*\[101, 64\].*vocabulary"),
        (changed(_0_1_weight=torch.zeros(101, 64, dtype=torch.int8)), r"0\.1\.weight .*torch\.int8"),
        ({**reference(), **vllm(reference())}, "mixes two formats"),
        ({}, "is empty"),
        (dict(MODEL.state_dict()), "no known format"),
        ({"0.0.linear.weight": torch.zeros(64, 64), "surprise": torch.zeros(1)}, "surprise.* no known format"),
        ({"lm_head.weight": torch.zeros(101, 64)}, r"lacks the tensor 0\.0\.linear\.weight"),
        ({**reference(), "token_map": torch.tensor([0, 101])}, r"token 101.* 0 to 100"),
        ({**reference(), "token_map": torch.tensor([0, -1])}, r"token -1"),
        ({**reference(), "token_map": torch.tensor([1, 1])}, "twice"),
        ({**reference(), "token_map": torch.tensor([1.0])}, r"token_map .*float32"),
        ({**reference(), "token_map": torch.tensor([], dtype=torch.long)}, r"token_map .*\[0\]"),
        ({**reference(), "0.1.weight": torch.zeros(4, 64), "token_map": torch.arange(5)}, r"0\.1\.weight .*\[5, 64\]"),
    ],
)
@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_unfit_tensors_are_named(tmp_path: Path, tensors: dict[str, Tensor], words: str, kind: str) -> None:
    file = tmp_path / f"medusa_lm_head.{kind}"
    save_file(tensors, file) if kind == "safetensors" else torch.save(tensors, file)
    with pytest.raises(CheckpointError, match=words) as error:
        load_heads(tmp_path, MODEL)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
@pytest.mark.parametrize("length", [0, 5, 300, -200])
def test_truncated_files(tmp_path: Path, kind: str, length: int) -> None:
    file = tmp_path / f"medusa_lm_head.{kind}"
    save_file(reference(), file) if kind == "safetensors" else torch.save(reference(), file)
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(CheckpointError, match=f"medusa_lm_head.{kind}") as error:
        load_heads(tmp_path, MODEL)
    assert "\n" not in str(error.value)


def test_a_pickle_of_something_else(tmp_path: Path) -> None:
    torch.save([torch.zeros(1)], tmp_path / "heads.pt")
    with pytest.raises(CheckpointError, match="not a table of named tensors"):
        load_heads(tmp_path, MODEL)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no heads at"):
        load_heads(tmp_path / "nothing", MODEL)
    with pytest.raises(CheckpointError, match=r"holds no medusa_lm_head\.safetensors"):
        load_heads(tmp_path, MODEL)
    (tmp_path / "heads.txt").write_text("heads")
    with pytest.raises(CheckpointError, match=r"neither a \.safetensors nor"):
        load_heads(tmp_path / "heads.txt", MODEL)


def hub(cache: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> Path:
    """An empty repository in a cache of the hub that stands alone."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    return snapshot


def test_heads_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub(tmp_path, monkeypatch, "someone/elsewhere")
    with pytest.raises(CheckpointError, match="There are no heads at someone/nothing"):
        load_heads("someone/nothing", MODEL)
    snapshot = hub(tmp_path, monkeypatch, "someone/heads")
    (snapshot / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"in its cache there is no medusa_lm_head\.safetensors"):
        load_heads("someone/heads", MODEL)
    tensors = reference()
    torch.save(tensors, snapshot / "medusa_lm_head.pt")
    check(load_heads("someone/heads", MODEL), tensors)
    assert stored_dtype("someone/heads") == torch.float32


def test_a_hub_that_is_out_of_reach_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fail(source: str, name: str, **_: object) -> None:
        asked.append((source, name))
        raise OSError("We couldn't connect.")

    monkeypatch.setattr("medusa_export.models.files.is_offline_mode", lambda: False)
    monkeypatch.setattr("medusa_export.models.files.cached_file", fail)
    for function in (lambda: load_heads("someone/heads", MODEL), lambda: load_model("someone/it", dtype=torch.float32)):
        asked.clear()
        with pytest.raises(CheckpointError, match=r"We couldn't connect\."):
            function()
        assert len(asked) == 1


def test_of_a_merged_model_on_the_hub_only_the_shards_with_heads_are_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = hub(tmp_path, monkeypatch, "someone/merged")
    written(snapshot, reference(prefix="medusa_head."), "heads.safetensors")
    names = dict.fromkeys(reference(prefix="medusa_head."), "heads.safetensors")
    index = {"weight_map": {**names, "lm_head.weight": "base.safetensors"}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    # Not here at first, as in a cache that holds the index alone.
    (snapshot / "heads.safetensors").rename(tmp_path / "heads.safetensors")
    with pytest.raises(CheckpointError, match="which is missing"):
        load_heads("someone/merged", MODEL)
    fetched = []

    def fetch(source: str, name: str, **_: object) -> str | None:
        fetched.append((source, name))
        path = snapshot / name
        if name == "heads.safetensors" and not path.exists():
            (tmp_path / name).rename(path)
        return str(path) if path.exists() else None

    monkeypatch.setattr("medusa_export.models.files.cached_file", fetch)
    check(load_heads("someone/merged", MODEL), reference())
    assert ("someone/merged", "heads.safetensors") in fetched
    assert not any(name == "base.safetensors" for _, name in fetched)


@pytest.mark.parametrize("content", ["{", "{}", '{"weight_map": 3}'])
def test_damaged_index(tmp_path: Path, content: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match="no readable weight_map"):
        load_heads(tmp_path, MODEL)


def test_a_shard_without_its_tensor(tmp_path: Path) -> None:
    tensors = reference(prefix="medusa_head.")
    lost = tensors.pop("medusa_head.2.1.weight")
    assert lost is not None
    written(tmp_path, tensors, "a.safetensors")
    names = [*tensors, "medusa_head.2.1.weight"]
    index = {"weight_map": dict.fromkeys(names, "a.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"medusa_head\.2\.1\.weight in a\.safetensors, which lacks it"):
        load_heads(tmp_path, MODEL)


@pytest.mark.parametrize("content", [b"Repository not found", b"error code: 404", b"\x80\x02", b""])
def test_a_page_in_the_place_of_a_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "heads.pt").write_bytes(content)
    with pytest.raises(CheckpointError):
        load_heads(tmp_path / "heads.pt", MODEL)


def test_weights_that_are_whole_numbers(tmp_path: Path) -> None:
    torch.save({name: tensor.to(torch.int8) for name, tensor in reference().items()}, tmp_path / "heads.pt")
    with pytest.raises(CheckpointError, match="integers only"):
        stored_dtype(tmp_path / "heads.pt")
    torch.save({3: torch.ones(1)}, tmp_path / "heads.pt")
    with pytest.raises(CheckpointError, match="not a table of named tensors"):
        load_heads(tmp_path / "heads.pt", MODEL)
