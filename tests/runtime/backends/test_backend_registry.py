"""Backends by name: those of other packages are found by their entry points, and work in an engine."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from medusa_export.verification.backend import verify_backend
from medusa_export.verification.plan import VerifyOptions
from medusa_runtime import BackendError, Bundle, MedusaEngine, SamplingParams
from medusa_runtime.backends import (
    Backend,
    BackendKind,
    OpenOptions,
    backend_names,
    open_backend,
    register_backend,
    unregister_backend,
)
from medusa_runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from support.decoding import greedy
from support.machine import PROMPTS
from support.stock import Stock
from support.tiny_models import tiny_model

HOWTO = Path(__file__).parents[3] / "docs/howto/backend.md"
# Takes the text of a module, and the name and value of an entry point. Installs a package with both.
Install = Callable[[str, str, str], None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    modules: list[str] = []

    def make(text: str, name: str, value: str) -> None:
        module = value.partition(":")[0]
        modules.append(module)
        (tmp_path / f"{module}.py").write_text(text)
        info = tmp_path / f"{module}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[medusa_runtime.backends]\n{name} = {value}\n")
        importlib.invalidate_caches()

    monkeypatch.syspath_prepend(tmp_path)
    yield make
    for module in modules:
        sys.modules.pop(module, None)


@pytest.fixture
def plain(install: Install) -> None:
    """The example of the how-to page, installed."""
    example = re.search(r"```python\n# plain_backend.py\n(.*?)```", HOWTO.read_text(), re.DOTALL)
    assert example is not None
    install(example[1], "plain", "plain_backend:PLAIN")


@pytest.fixture
def registered() -> Iterator[Callable[[BackendKind], None]]:
    names: list[str] = []

    def register(kind: BackendKind) -> None:
        register_backend(kind)
        names.append(kind.name)

    yield register
    for name in names:
        unregister_backend(name)


@pytest.mark.usefixtures("plain")
def test_the_backend_of_another_package_generates(tiny_bundle: Bundle) -> None:
    assert "plain" in backend_names()
    with MedusaEngine.load(tiny_bundle.folder, backend="plain") as engine:
        assert engine.backend.name == "plain"
        for prompt in PROMPTS:
            for size in (1, 4, 9):
                result = engine.generate(prompt, max_new_tokens=30, tree_size=size)
                assert list(result.token_ids) == greedy(tiny_model("llama"), prompt, 30)
        sampled = [
            other.generate(PROMPTS[0], max_new_tokens=20, sampling=SamplingParams(seed=3)).token_ids
            for other in (engine, MedusaEngine.load(tiny_bundle.folder, "onnxruntime", threads=1))
        ]
        assert sampled[0] == sampled[1]


@pytest.mark.usefixtures("plain")
def test_verify_checks_the_backend_of_another_package(stock: Stock) -> None:
    exported = stock.export()
    outcome = verify_backend(exported.bundle, "plain", exported.step, PROMPTS * 2, VerifyOptions(max_new_tokens=24))
    assert outcome.not_run is None
    assert outcome.passed


def test_an_unknown_name_lists_those_there_are(tiny_bundle: Bundle, registered: Callable[[BackendKind], None]) -> None:
    registered(BackendKind("mine", lambda bundle, options: OnnxRuntimeBackend(bundle)))
    words = "no backend 'cudnn': choose one of auto, mine, onnxruntime, onnxruntime-cuda, tensorrt, tensorrt-rtx"
    with pytest.raises(BackendError, match=words):
        open_backend("cudnn", tiny_bundle)
    for name in ("mine", "onnxruntime", "auto"):
        with pytest.raises(BackendError, match=f"a backend '{name}' already"):
            register_backend(BackendKind(name, lambda bundle, options: OnnxRuntimeBackend(bundle)))


def test_auto_tries_backends_in_their_order(tiny_bundle: Bundle, registered: Callable[[BackendKind], None]) -> None:
    tried: list[str] = []

    def opener(name: str, *, fails: bool) -> Callable[[Bundle, OpenOptions], Backend]:
        def open_it(bundle: Bundle, options: OpenOptions) -> Backend:
            tried.append(name)
            if fails:
                raise BackendError(f"{name} has no device.")
            return OnnxRuntimeBackend(bundle, rows=options.rows, threads=options.threads)

        return open_it

    registered(BackendKind("last", opener("last", fails=False), auto_order=3))
    registered(BackendKind("broken", opener("broken", fails=True), auto_order=1))
    registered(BackendKind("absent", opener("absent", fails=False), auto_order=0, is_available=lambda: False))
    registered(BackendKind("engines", opener("engines", fails=False), runs="tensorrt", auto_order=0))
    registered(BackendKind("by-name", opener("by-name", fails=False)))
    with pytest.warns(RuntimeWarning, match=r"Running on last instead of broken\. broken has no device\."):
        opened = open_backend("auto", tiny_bundle, rows=3, threads=1)
    assert tried == ["broken", "last"]
    assert opened.rows == 3
    with pytest.raises(BackendError, match=r"holds a bundle, which engines can't run"):
        open_backend("engines", tiny_bundle)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("import no_such_module", "'odd' can't be imported from odd_backend:KIND: ModuleNotFoundError"),
        ("KIND = 3", "'odd' of group medusa_runtime.backends gives 3: expected a BackendKind of that name"),
    ],
)
def test_a_broken_entry_point_is_named(tiny_bundle: Bundle, install: Install, text: str, words: str) -> None:
    install(text, "odd", "odd_backend:KIND")
    with pytest.raises(BackendError, match=words):
        open_backend("odd", tiny_bundle)
    sys.modules.pop("odd_backend", None)
    with pytest.warns(RuntimeWarning, match=words):
        assert open_backend("auto", tiny_bundle, threads=1).rows == 1


def test_nothing_is_imported_before_it_is_opened() -> None:
    program = "import sys, medusa_runtime.backends as b; b.backend_names(); print('onnxruntime' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, text=True).stdout == "False\n"
    )
