"""What several test files share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

import medusa_export
from medusa_export import DistillOptions
from medusa_export.targets.tensorrt.build import write_engine
from medusa_export.targets.tensorrt.options import BuildOptions
from medusa_runtime import Bundle
from medusa_runtime.backends.tensorrt.library import import_tensorrt
from medusa_runtime.bundles.compiled import CompiledEngine, EngineLimits
from support.stock import Stock
from support.tiny_models import tiny_model
from support.tiny_tokenizer import make_tokenizer

torch.set_num_threads(1)  # tests run side by side


@pytest.fixture(scope="session")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Stock:
    """Folders that are made once for all processes that test side by side; not to be changed."""
    root = tmp_path_factory.getbasetemp()
    return Stock(root.parent if "PYTEST_XDIST_WORKER" in os.environ else root)


@pytest.fixture(scope="session")
def tiny_model_folder(stock: Stock) -> Path:
    """A random llama of two layers with a tokenizer, as transformers saves it."""

    def fill(folder: Path) -> None:
        tiny_model("llama").save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)

    return stock.folder("tiny-model", fill)


@pytest.fixture(scope="session")
def tiny_bundle(stock: Stock) -> Bundle:
    """That model with three guessing heads and a tree of nine nodes, exported."""
    return stock.export().bundle


@pytest.fixture(scope="session")
def untrained_bundle(stock: Stock, tiny_model_folder: Path) -> Bundle:
    """That folder with two fresh heads, exported."""
    folder = stock.folder(
        "untrained-bundle", lambda out: medusa_export.export(tiny_model_folder, out, init_heads=2, top_k=2)
    )
    return Bundle.load(folder)


@pytest.fixture(scope="session")
def smollm2_gguf() -> str:
    """The real model; ``scripts/smollm2.sh`` fetches it."""
    known = os.environ.get("MEDUSA_SMOLLM2_GGUF")
    path = Path(known) if known else Path(__file__).parents[1] / ".cache/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    if not path.is_file():
        pytest.skip("SmolLM2 is not here: scripts/smollm2.sh fetches it")
    return str(path)


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """22 prompts, a line each."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(f"Prompt number {i}, {'very ' * (i % 5)}good" for i in range(22)))
    return path


@pytest.fixture(scope="session")
def data(stock: Stock, tiny_model_folder: Path, prompts: Path) -> Path:
    """What that model answers to those prompts, as ``distill`` writes it."""

    options = DistillOptions(batch_size=4, max_new_tokens=12, heldout=0.3, temperature=1)
    return stock.folder(
        "distilled", lambda out: medusa_export.distill(tiny_model_folder, out, prompts=[prompts], options=options)
    )


@pytest.fixture(scope="session")
def tiny_engine(tiny_bundle: Bundle, stock: Stock) -> CompiledEngine:
    """The tiny bundle compiled by TensorRT-RTX for SM 8.9: three rows, 128 slots, chunks of 32."""
    options = BuildOptions(EngineLimits(max_batch=3, capacity=128, max_prefill=32), ("sm89",), opt_level=0)
    library = import_tensorrt("tensorrt-rtx")
    folder = stock.folder("tiny-engine", lambda out: write_engine(library, tiny_bundle, options, out))
    return CompiledEngine.load(folder)
