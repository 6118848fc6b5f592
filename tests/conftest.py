"""Fixtures that several test files share.

Imports that load torch are inside the fixtures: with xdist, the process that hands out the tests reads this file too,
and the workers start only after it.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

import medusa_export

if TYPE_CHECKING:
    from medusa_runtime import Bundle
    from medusa_runtime.bundles.compiled import CompiledEngine
    from support.stock import Stock


# Tests that use hypothesis have no time limit: a machine may be busy.
settings.register_profile("busy", deadline=None)
settings.load_profile("busy")


def pytest_configure() -> None:
    """Gives each worker a CPU of its own, and pauses garbage collection until all tests are imported.

    Threads that wait for a CPU which another worker uses would keep the others busy. With one CPU there is one thread.
    """
    gc.disable()
    worker, workers = os.environ.get("PYTEST_XDIST_WORKER"), int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if worker is None or not hasattr(os, "sched_setaffinity"):
        return
    cpus = sorted(os.sched_getaffinity(0))
    if workers <= len(cpus):
        os.sched_setaffinity(0, {cpus[int(worker.removeprefix("gw"))]})


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Starts long tests first, so that no worker waits for one at the end.

    Leaves out exhaustive tests, unless ``-m`` names them.
    """
    items.sort(key=lambda item: item.get_closest_marker("long") is None)
    if "exhaustive" in config.option.markexpr:
        return
    left_out = [item for item in items if item.get_closest_marker("exhaustive")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("exhaustive")]


def pytest_collection_finish() -> None:
    """Keeps all that the imports made out of garbage collection, and lets it look through old objects seldom.

    Collections take an eighth of an export otherwise.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(700, 10, 300)
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Limits torch to one thread, because the workers share the cores."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def kept_garbage() -> Iterator[None]:
    """Keeps each training from collecting garbage first: that takes a second where many models were traced before."""
    from accelerate.utils import memory

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "gc", SimpleNamespace(collect=lambda: 0))
        yield


@pytest.fixture(scope="session", autouse=True)
def shared_sessions() -> None:
    """Opens one session of ONNX Runtime for all tests that run the same graph of the same bundle."""
    from support.sessions import share_sessions

    share_sessions()


@pytest.fixture(scope="session")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Stock:
    """Makes each folder once for all workers. Tests only read these folders."""
    from support.stock import Stock

    root = tmp_path_factory.getbasetemp()
    return Stock.beside(root.parent if "PYTEST_XDIST_WORKER" in os.environ else root)


@pytest.fixture(scope="session")
def tiny_model_folder(stock: Stock) -> Path:
    """A random llama of two layers with a tokenizer, saved by transformers."""
    from support.tiny_models import tiny_model
    from support.tiny_tokenizer import make_tokenizer

    def fill(folder: Path) -> None:
        tiny_model("llama").save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)

    return stock.folder("tiny-model", fill)


@pytest.fixture(scope="session")
def tiny_bundle(stock: Stock) -> Bundle:
    """An exported random llama with three random heads and a tree of nine nodes."""
    return stock.export().bundle


@pytest.fixture(scope="session")
def untrained_bundle(stock: Stock, tiny_model_folder: Path) -> Bundle:
    """``tiny_model_folder`` with two fresh heads, exported."""
    from medusa_runtime import Bundle

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
def smollm2_heads() -> Path:
    """The trained heads of SmolLM2."""
    return Path(__file__).parents[1] / "scripts/smollm2_heads"


@pytest.fixture(scope="session")
def smollm2_bundle(stock: Stock, smollm2_gguf: str, smollm2_heads: Path) -> Path:
    """SmolLM2 with its heads, exported by the command that README.md and the tutorial show.

    It holds step times for an engine and for services of up to four rows, as if measured: 20 ms, and 1 ms per token.
    A service measures for half a minute. With these times it chooses trees, and the same ones on every machine.
    """
    from click.testing import CliRunner

    from medusa_export.cli import main
    from medusa_runtime import MedusaEngine, MedusaService
    from medusa_runtime.decoding import latency

    def step_times(bundle: Bundle, _: object, *, rows: int) -> latency.Table:
        return {str(size): 0.02 + 0.001 * size * rows for size in latency.candidate_sizes(bundle.tree.size)}

    def fill(folder: Path) -> None:
        heads = smollm2_heads
        command = ["onnx", smollm2_gguf, "--heads", heads, "--calibration", heads / "calibration.json", "-o", folder]
        result = CliRunner().invoke(main, [str(part) for part in command])
        assert result.exit_code == 0, result.output
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(latency, "_measure", step_times)
            MedusaEngine.load(folder, threads=1, check_digests=False).close()
            MedusaService.load(folder, rows=4, threads=1, check_digests=False).close()

    return stock.folder("smollm2-bundle", fill, keep=False)


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 22 prompts, one in each line."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(f"Prompt number {i}, {'very ' * (i % 5)}good" for i in range(22)))
    return path


@pytest.fixture(scope="session")
def data(stock: Stock, tiny_model_folder: Path, prompts: Path) -> Path:
    """The answers of ``tiny_model_folder`` to ``prompts``, written by ``distill``."""
    from medusa_export import DistillOptions

    options = DistillOptions(batch_size=4, max_new_tokens=12, heldout=0.3, temperature=1)
    return stock.folder(
        "distilled", lambda out: medusa_export.distill(tiny_model_folder, out, prompts=[prompts], options=options)
    )


@pytest.fixture(scope="session")
def tiny_engine(tiny_bundle: Bundle, stock: Stock) -> CompiledEngine:
    """The tiny bundle compiled by TensorRT-RTX for SM 8.9: three rows, 128 slots, chunks of 32."""
    from medusa_export.targets.tensorrt.build import write_engine
    from medusa_export.targets.tensorrt.options import BuildOptions
    from medusa_runtime.backends.tensorrt.library import import_tensorrt
    from medusa_runtime.bundles.compiled import CompiledEngine, EngineLimits

    options = BuildOptions(EngineLimits(max_batch=3, capacity=128, max_prefill=32), ("sm89",), opt_level=0)
    library = import_tensorrt("tensorrt-rtx")
    folder = stock.folder("tiny-engine", lambda out: write_engine(library, tiny_bundle, options, out))
    return CompiledEngine.load(folder)
