"""Tests that need an NVIDIA GPU; docs/gpu.md says how to run them. Elsewhere each test is skipped, with the reason."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from medusa_export.targets.tensorrt.build import write_engine
from medusa_export.targets.tensorrt.options import BuildOptions
from medusa_export.verification.backend import verify_backend
from medusa_runtime import BackendError, Bundle, MedusaEngine
from medusa_runtime.backends import open_backend
from medusa_runtime.backends.tensorrt.backend import TensorRTBackend
from medusa_runtime.backends.tensorrt.cuda import Cuda
from medusa_runtime.backends.tensorrt.library import import_tensorrt, installed_flavors
from medusa_runtime.bundles.compiled import EngineLimits
from support.decoding import TREE, decode, export, greedy, make_step, random_heads
from support.tiny_models import tiny_model

pytestmark = pytest.mark.gpu
PROMPTS = [[(7 * i * i + 3 + row) % 101 for i in range(length)] for row, length in enumerate((13, 6, 20))]


@pytest.fixture(scope="module", autouse=True)
def gpu() -> None:
    try:
        Cuda.open()
    except BackendError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module", params=["tensorrt", "tensorrt-rtx"])
def engine(request: pytest.FixtureRequest, tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle compiled for this GPU."""
    if request.param not in installed_flavors():
        pytest.skip(f"{request.param} is not installed")
    folder: Path = tmp_path_factory.mktemp("engine") / "engine"
    options = BuildOptions(EngineLimits(max_batch=3, capacity=128, max_prefill=32))
    write_engine(import_tensorrt(request.param), tiny_bundle, options, folder)
    return folder


def test_tensorrt_gives_the_tokens_of_transformers(engine: Path) -> None:
    expected = [greedy(tiny_model("llama"), prompt, 40) for prompt in PROMPTS]
    for rows in (1, 3):
        backend = open_backend("auto", Bundle.load(engine), rows=rows)
        assert isinstance(backend, TensorRTBackend)
        for size, chunk, seed in ((9, 5, 0), (9, 32, None), (4, 7, 1), (1, 13, None)):
            result = decode(backend, TREE, PROMPTS[:rows], expected[:rows], size=size, chunk=chunk, count=40, seed=seed)
            assert result.tokens == expected[:rows]
        assert not backend.uncaptured
        backend.close()


def test_steps_submitted_ahead_give_the_same(engine: Path) -> None:
    expected = greedy(tiny_model("llama"), PROMPTS[0], 40)
    backend = open_backend("auto", Bundle.load(engine))
    assert isinstance(backend, TensorRTBackend)
    tokens = backend.step(13, {0: PROMPTS[0]}).tokens[0, :1].tolist()
    backend.submit(9)
    while len(tokens) < 40:
        backend.submit(9)
        step = backend.collect()
        tokens += step.tokens[0, : step.count[0]].tolist()
    assert tokens[:40] == expected


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_onnxruntime_gives_what_pytorch_gives(dtype: str, tmp_path: Path) -> None:
    model = tiny_model("llama").to(getattr(torch, dtype))
    step = make_step(model, random_heads(model))
    bundle = export(step, tmp_path / "bundle")
    outcome = verify_backend(bundle, "onnxruntime-cuda", step.float(), PROMPTS * 2)
    if outcome.not_run is not None:
        pytest.skip(outcome.not_run)
    assert outcome.passed, outcome.checks
    assert MedusaEngine.load(bundle.folder).backend.name.endswith("cuda")
