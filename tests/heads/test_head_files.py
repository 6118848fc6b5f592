"""Heads from every published format, written as the formats' authors write them, and back."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from medusa_export.cli import main
from medusa_export.common.errors import CheckpointError, OutputError
from medusa_export.heads.files import load_heads, stored_dtype
from medusa_export.heads.modules import MedusaConfig, MedusaHeads
from medusa_export.heads.writer import LAYOUTS, save_heads
from medusa_export.models.checkpoints import load_model
from support.tiny_models import VOCAB_SIZE, tiny_model

HIDDEN = 64
MODEL = tiny_model("llama")
STATE = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(7))


def draw(*shape: int, seed: int) -> Tensor:
    return 0.2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def reference(num_heads: int = 3, num_layers: int = 1, *, shared: bool = False, prefix: str = "") -> dict[str, Tensor]:
    """The state dict of the reference implementation's heads."""
    tensors = {}
    for k in range(num_heads):
        for j in range(num_layers):
            tensors[f"{prefix}{k}.{j}.linear.weight"] = draw(HIDDEN, HIDDEN, seed=100 * k + j)
            tensors[f"{prefix}{k}.{j}.linear.bias"] = draw(HIDDEN, seed=100 * k + 10 + j)
        if not shared:
            tensors[f"{prefix}{k}.{num_layers}.weight"] = draw(VOCAB_SIZE, HIDDEN, seed=100 * k + 20)
    return tensors


def vllm(tensors: dict[str, Tensor], num_layers: int = 1, prefix: str = "") -> dict[str, Tensor]:
    """The same heads with vLLM's names, and like most of its checkpoints without biases."""
    renamed = {}
    for name, tensor in tensors.items():
        k, j, *rest = name.split(".")
        if rest == ["linear", "weight"]:
            renamed[f"{prefix}blocks.{k}.layers.{j}.weight"] = tensor
        elif rest == ["weight"]:
            assert int(j) == num_layers
            renamed[f"{prefix}lm_heads.{k}.weight"] = tensor
    return renamed


def expected_logits(tensors: dict[str, Tensor], num_heads: int = 3, num_layers: int = 1) -> Tensor:
    """[3, K, V], the paper's formula on a file in the reference's names."""
    outputs = []
    for k in range(num_heads):
        hidden = STATE
        for j in range(num_layers):
            weight = tensors[f"{k}.{j}.linear.weight"]
            bias = tensors.get(f"{k}.{j}.linear.bias", torch.zeros(HIDDEN))
            hidden = hidden + nn.functional.silu(hidden @ weight.T + bias)
        outputs.append(hidden @ tensors.get(f"{k}.{num_layers}.weight", MODEL.lm_head.weight).T)
    return torch.stack(outputs, dim=1)


def without_biases(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not name.endswith("bias")}


def written(folder: Path, tensors: dict[str, Tensor], name: str = "medusa_lm_head.safetensors") -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / name)
    return folder


def check(heads: MedusaHeads, tensors: dict[str, Tensor], num_heads: int = 3, num_layers: int = 1) -> None:
    assert (heads.config.num_heads, heads.config.num_layers) == (num_heads, num_layers)
    torch.testing.assert_close(heads(STATE), expected_logits(tensors, num_heads, num_layers))
    assert not heads.training
    assert not any(parameter.requires_grad for parameter in heads.parameters())


# Formats


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
    with pytest.raises(CheckpointError, match=r"heads-1\.safetensors, which is not there"):
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


# Writing


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("reduced", [False, True])
def test_round_trip(tmp_path: Path, shared: bool, reduced: bool) -> None:
    tensors = reference(num_layers=2, shared=shared)
    if reduced:
        tensors["token_map"] = torch.arange(0, VOCAB_SIZE, 3)
    heads = load_heads(written(tmp_path / "in", tensors), MODEL)
    save_heads(heads, tmp_path / "new" / "out", base_model_name_or_path="some/base")
    modes = [path.stat().st_mode for path in (tmp_path / "new" / "out").iterdir()]
    (tmp_path / "plain").touch()
    assert set(modes) == {(tmp_path / "plain").stat().st_mode}, "whoever may read files may read these"
    again = load_heads(tmp_path / "new" / "out", MODEL)
    assert again.config == heads.config
    assert torch.equal(again(STATE), heads(STATE))
    config = json.loads((tmp_path / "new" / "out" / "config.json").read_text())
    version = "2" if shared and not reduced else "1"
    assert config == {
        "medusa_num_heads": 3,
        "medusa_num_layers": 2,
        "base_model_name_or_path": "some/base",
        "version": version,
    }
    if not reduced:
        assert load_file(tmp_path / "new" / "out" / "medusa_lm_head.safetensors").keys() == tensors.keys()


def test_fresh_heads_are_saved_without_the_lm_head(tmp_path: Path) -> None:
    save_heads(MedusaHeads.fresh(2, MODEL.lm_head), tmp_path, base_model_name_or_path="base")
    names = load_file(tmp_path / "medusa_lm_head.safetensors").keys()
    assert set(names) == {f"{k}.0.linear.{part}" for k in range(2) for part in ("weight", "bias")}


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heads = load_heads(written(tmp_path / "in", reference()), MODEL)
    save_heads(heads, tmp_path / "out", base_model_name_or_path="base")
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}

    def half(tensors: dict[str, Tensor], file: Path, **_: object) -> None:
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("medusa_export.heads.writer.save_file", half)
    with pytest.raises(OutputError, match="disk full"):
        save_heads(heads.truncated(1), tmp_path / "out", base_model_name_or_path="base")
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before


# Dropping deeper heads


@pytest.mark.parametrize("tensors", [reference(), reference(shared=True)], ids=["own", "shared"])
def test_truncated(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    heads = load_heads(written(tmp_path, tensors), MODEL)
    check(heads.truncated(2), tensors, num_heads=2)
    weights = [own.residual_layers[0].weight for own in (heads, heads.truncated(2))]
    assert weights[0].data_ptr() == weights[1].data_ptr()
    for number in (0, 4):
        with pytest.raises(ValueError, match=f"{number} of 3"):
            heads.truncated(number)


# What can't be loaded


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
    with pytest.raises(CheckpointError, match="no table of named tensors"):
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
    with pytest.raises(CheckpointError, match="which is not there"):
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


# Conversion


def converted(tmp_path: Path, source: Path, layout: str) -> tuple[Path, str]:
    MODEL.save_pretrained(tmp_path / "model")
    arguments = ["heads", "convert", tmp_path / "model", "--heads", source, "--format", layout, "-o", tmp_path / layout]
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    return tmp_path / layout, result.output


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_conversion(tmp_path: Path, layout: str, shared: bool, num_layers: int) -> None:
    tensors = reference(num_layers=num_layers, shared=shared)
    folder, output = converted(tmp_path, written(tmp_path / "heads", tensors), layout)
    if layout == "v2" and not shared:
        assert "error: These heads have projections of their own" in output
        assert not folder.exists()
        return
    check(load_heads(folder, MODEL), tensors, num_layers=num_layers)
    names = set(load_file(folder / "medusa_lm_head.safetensors"))
    full = set(reference(num_layers=num_layers))
    bare = set(reference(num_layers=num_layers, shared=True))
    blocks = {
        f"blocks.{k}.layers.{j}.{kind}" for k in range(3) for j in range(num_layers) for kind in ("weight", "bias")
    }
    vllm_projections = {"lm_head.weight"} if shared else {f"lm_heads.{k}.weight" for k in range(3)}
    expected = {"own": bare if shared else full, "v0.1": full, "v2": bare, "vllm": blocks | vllm_projections}
    assert names == expected[layout]
    config = json.loads((folder / "config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "model")
    assert config["num_heads" if layout == "vllm" else "medusa_num_heads"] == 3


def test_conversion_keeps_a_reduced_vocabulary_and_the_dtype(tmp_path: Path) -> None:
    tokens = torch.arange(5, 50, 3)
    tensors = reference(shared=True) | {"token_map": tokens.int()}
    source = written(tmp_path / "heads", {k: v.half() if v.is_floating_point() else v for k, v in tensors.items()})
    folder, output = converted(tmp_path, source, "vllm")
    assert "error" not in output
    stored = load_file(folder / "medusa_lm_head.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16, torch.int32}
    assert torch.equal(stored["token_map"], tokens.int())
    assert json.loads((folder / "config.json").read_text())["truncated_vocab_size"] == len(tokens)
    torch.testing.assert_close(load_heads(folder, MODEL)(STATE), load_heads(source, MODEL)(STATE), atol=2e-3, rtol=0)


def test_a_reduced_vocabulary_fits_no_v01(tmp_path: Path) -> None:
    """What reads that layout projects to the whole vocabulary."""
    tensors = reference(shared=True) | {"token_map": torch.arange(5, 50, 3).int()}
    folder, output = converted(tmp_path, written(tmp_path / "heads", tensors), "v0.1")
    assert "error: The layout v0.1 has no place for heads that can propose some of the tokens only" in output
    assert not folder.exists()


def test_heads_do_not_replace_the_configuration_of_a_model(tmp_path: Path) -> None:
    MODEL.save_pretrained(tmp_path / "model")
    before = (tmp_path / "model" / "config.json").read_bytes()
    with pytest.raises(OutputError, match="is the configuration of a llama model: give another folder"):
        save_heads(MedusaHeads.fresh(2, MODEL.lm_head), tmp_path / "model", base_model_name_or_path="base")
    assert (tmp_path / "model" / "config.json").read_bytes() == before
    assert not (tmp_path / "model" / "medusa_lm_head.safetensors").exists()


@pytest.mark.parametrize("content", [b"Repository not found", b"error code: 404", b"\x80\x02", b""])
def test_a_page_in_the_place_of_a_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "heads.pt").write_bytes(content)
    with pytest.raises(CheckpointError):
        load_heads(tmp_path / "heads.pt", MODEL)


def test_weights_that_are_whole_numbers(tmp_path: Path) -> None:
    torch.save({name: tensor.to(torch.int8) for name, tensor in reference().items()}, tmp_path / "heads.pt")
    with pytest.raises(CheckpointError, match="whole numbers only"):
        stored_dtype(tmp_path / "heads.pt")
    torch.save({3: torch.ones(1)}, tmp_path / "heads.pt")
    with pytest.raises(CheckpointError, match="no table of named tensors"):
        load_heads(tmp_path / "heads.pt", MODEL)


def test_conditioned_heads_fit_no_other_layout(tmp_path: Path) -> None:
    save_heads(
        MedusaHeads.fresh(2, MODEL.lm_head, conditioned=True), tmp_path / "heads", base_model_name_or_path="base"
    )
    folder, output = converted(tmp_path, tmp_path / "heads", "vllm")
    assert "error: The layout vllm has no place for heads that are conditioned" in output
    assert not folder.exists()
    assert "error" not in converted(tmp_path, tmp_path / "heads", "own")[1]
