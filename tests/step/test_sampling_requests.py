"""Sampling parameters and bundles: what is refused, and what older bundles can do."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest

from medusa_runtime import Bundle, BundleError, MedusaEngine, RequestError, SamplingParams
from medusa_runtime.bundles.bundle import DESCRIPTION
from medusa_runtime.bundles.contract import MAX_TOP_K
from medusa_runtime.sampling import GREEDY
from support.decoding import greedy
from support.stock import Stock
from support.tiny_models import tiny_model

PROMPT = [(7 * i * i + 3) % 101 for i in range(13)]


@pytest.mark.slow
def test_greedy_only_leaves_sampling_out(stock: Stock) -> None:
    expected = tuple(greedy(tiny_model("llama"), PROMPT, 20))
    bundle = stock.export(sampling=False).bundle
    assert not bundle.sampling
    assert {spec.name for spec in bundle.inputs}.isdisjoint({"exponentials", "temperature"})
    with MedusaEngine.load(bundle.folder, threads=1) as engine:
        assert engine.generate(PROMPT, max_new_tokens=20).token_ids == expected
        assert engine.generate(PROMPT, max_new_tokens=20, sampling=GREEDY).token_ids == expected
        with pytest.raises(RequestError, match="export it with sampling"):
            engine.generate(PROMPT, sampling=SamplingParams())
        with pytest.raises(RequestError, match="can't give log probabilities"):
            engine.generate(PROMPT, logprobs=True)


def test_bundles_of_older_contracts(stock: Stock, tmp_path: Path) -> None:
    """Greedy ones are what they were; others had another input to draw with."""
    for samples, name in ((False, "greedy"), (True, "sampling")):
        folder = Path(shutil.copytree(stock.export(sampling=samples).bundle.folder, tmp_path / name))
        path = folder / DESCRIPTION
        data = json.loads(path.read_text()) | {"contract_version": 2}
        for spec in data["inputs"]:
            if spec["name"] == "exponentials":
                spec |= {"name": "uniforms", "shape": ["batch", "draws"]}
        path.write_text(json.dumps(data))
    assert not Bundle.load(tmp_path / "greedy").sampling
    with pytest.raises(BundleError, match="Export the bundle again"):
        Bundle.load(tmp_path / "sampling")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1.0), ("temperature", math.nan), ("temperature", math.inf), ("temperature", "hot"),
        ("temperature", 10**400), ("temperature", 1e-50), ("typical_alpha", 10**400),
        ("top_k", -1), ("top_k", 1.5), ("top_k", MAX_TOP_K + 1), ("top_p", 0.0), ("top_p", 1.1), ("min_p", -0.1),
        ("seed", -1), ("seed", 1.0), ("typical_epsilon", 0.0), ("typical_alpha", 0.0), ("acceptance", "greedy"),
    ],
)  # fmt: skip
def test_parameters_without_meaning_are_refused(name: str, value: object) -> None:
    with pytest.raises(RequestError, match=f"{name} is .*: expected"):
        SamplingParams(**{name: value})


def test_what_a_request_may_not_ask_for(tiny_bundle: Bundle) -> None:
    engine = MedusaEngine.load(tiny_bundle.folder, threads=1)
    with pytest.raises(RequestError, match="give SamplingParams"):
        engine.generate(PROMPT, sampling={"temperature": 1.0})
    with pytest.raises(RequestError, match="expected True or False"):
        engine.generate(PROMPT, logprobs=5)
