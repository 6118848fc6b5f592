"""Models whose weights stay in their files until they are asked for."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from medusa_export.common.errors import CheckpointError
from medusa_export.graph.export import build_graph
from medusa_export.graph.weights import StepWeights
from medusa_export.models.checkpoint import FORMATS
from medusa_export.models.checkpoints import load_model, open_model
from medusa_export.step.attention import ATTENTION_NAME
from medusa_export.step.step import MedusaStep
from medusa_runtime.bundles.tree import Tree
from support.decoding import export
from support.extensions.npz import NpzCheckpoint
from support.gguf_files import write_gguf
from support.tiny_models import tiny_model


def as_safetensors(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder, max_shard_size="20KB")
    return folder


def as_pickle(model: PreTrainedModel, folder: Path) -> Path:
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return folder


def as_gguf(model: PreTrainedModel, folder: Path) -> Path:
    folder.mkdir()
    return write_gguf(folder / "model.gguf", model)


def as_npz(model: PreTrainedModel, folder: Path) -> Path:
    model.config.save_pretrained(folder)
    np.savez(folder / "weights.npz", **{name: tensor.numpy() for name, tensor in model.state_dict().items()})
    return folder


@pytest.fixture
def npz() -> Iterator[None]:
    """The format of an extension is registered."""
    FORMATS.register("npz", NpzCheckpoint)
    yield
    FORMATS._members.pop("npz")


@pytest.mark.usefixtures("npz")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("write", [as_safetensors, as_pickle, as_gguf, as_npz])
def test_weights_that_are_read_later_are_those_of_a_loaded_model(
    write: Callable[[PreTrainedModel, Path], Path], dtype: torch.dtype, tmp_path: Path
) -> None:
    source = str(write(tiny_model("llama"), tmp_path / "model"))
    opened, loaded = open_model(source, dtype=dtype), load_model(source, dtype=dtype)
    read = {name: reader() for name, reader in opened.readers.items()}
    names = {name for name, _ in loaded.named_parameters()}
    assert set(read) == names
    for name, weight in loaded.named_parameters():
        assert torch.equal(read[name], weight), name
        assert read[name].dtype == dtype
        placeholder = opened.model.get_parameter(name)
        assert (placeholder.shape, placeholder.dtype) == (weight.shape, dtype)
        assert placeholder.untyped_storage().nbytes() == dtype.itemsize
    for name, buffer in loaded.named_buffers():
        assert torch.equal(opened.model.get_buffer(name), buffer), name


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    tiny_model("qwen3").save_pretrained(tmp_path)
    opened = open_model(str(tmp_path), dtype=torch.float32, attn_implementation=ATTENTION_NAME)
    assert opened.model.get_output_embeddings().weight is opened.model.get_input_embeddings().weight
    weights = StepWeights(MedusaStep(opened.model, None, Tree()), opened.readers)
    tied = weights.tensor("step.model.lm_head.weight").read()
    assert torch.equal(tied, tiny_model("qwen3").lm_head.weight)


def test_an_incomplete_checkpoint_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path, state_dict={k: v for k, v in model.state_dict().items() if "norm.weight" not in k})
    with pytest.raises(CheckpointError, match="which would be random"):
        open_model(str(tmp_path), dtype=torch.float32)


@pytest.mark.slow
def test_an_export_holds_one_product_in_memory_at_a_time(tmp_path: Path) -> None:
    """The weights that are alive at once are those of one merged product: q, k and v, or gate and up."""
    as_safetensors(tiny_model("llama"), tmp_path / "model")
    opened = open_model(str(tmp_path / "model"), dtype=torch.float32, attn_implementation=ATTENTION_NAME)
    alive: set[str] = set()
    most: list[set[str]] = []
    reads: list[str] = []

    def counted(name: str, read: Callable[[], Tensor]) -> Tensor:
        values = read()
        alive.add(name)
        reads.append(name)
        weakref.finalize(values, alive.discard, name)
        most.append(set(alive))
        return values

    readers = {name: partial(counted, name, read) for name, read in opened.readers.items()}
    step = MedusaStep(opened.model, None, Tree()).eval()
    graph = build_graph(step, weights=StepWeights(step, readers))
    assert not reads  # tracing needs no values
    export(step, tmp_path / "bundle", graph=graph)
    assert sorted(reads) == sorted(opened.readers)
    assert max(map(len, most)) == 3
