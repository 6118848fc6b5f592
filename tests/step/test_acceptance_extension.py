"""An acceptance rule that lives outside the package: one file, one registration."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

import medusa_export
from medusa_export.common.errors import ExportError, ExtensionError
from medusa_export.step.acceptance.registry import register_rule
from medusa_export.step.eager import EagerBackend
from medusa_export.step.step import MedusaStep
from medusa_export.verification.bundle import verify_bundle
from medusa_export.verification.plan import VerifyOptions
from medusa_runtime import Bundle, Tree
from medusa_runtime.backends.base import Backend
from medusa_runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from support.decoding import TREE, make_step, random_heads
from support.extensions.top_two_rule import TopTwoRule
from support.stock import Stock
from support.tiny_models import tiny_model

PROMPT = [(7 * i * i + 3) % 101 for i in range(13)]
RULES = ("exact", "typical", "top-2")


@dataclass
class Expected:
    """The outputs that a step should give, found by brute force.

    Attributes:
        tokens: Its tokens.
        is_relaxed: True if one of them is not the base model's choice.
    """

    tokens: list[int]
    is_relaxed: bool


def logprobs_after(model: PreTrainedModel, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0, -1].float().log_softmax(-1)


def draft(model: PreTrainedModel, tree: Tree, text: list[int], rng: np.random.Generator) -> NDArray[np.int64]:
    """A tree whose nodes hold the model's best, second-best or third-best token, siblings different ones."""
    nodes = np.full(tree.size, text[-1])
    for parent in range(tree.size):
        children = np.flatnonzero(tree.parents[1:] == parent) + 1
        above = [int(nodes[node]) for node in tree.node_paths[parent][1 : tree.depths[parent] + 1]]
        best = logprobs_after(model, [*text, *above]).topk(3).indices.numpy()
        nodes[children] = rng.permutation(best)[: len(children)]
    return nodes


def brute_force(model: PreTrainedModel, tree: Tree, text: list[int], nodes: NDArray[np.int64]) -> Expected:
    """Looks at each path of the tree by itself, with whole runs of the model."""
    found = []
    for node in range(tree.size):
        path = [int(nodes[n]) for n in tree.node_paths[node][1 : tree.depths[node] + 1]]
        score, relaxed = 0.0, False
        for place, token in enumerate(path):
            logprobs = logprobs_after(model, [*text, *path[:place]])
            if token not in logprobs.topk(2).indices:
                break
            score += float(logprobs[token])
            relaxed |= token != int(logprobs.argmax())
        else:
            found.append((len(path), score, path, relaxed))
    _, _, path, relaxed = max(found)
    return Expected([*path, int(logprobs_after(model, [*text, *path]).argmax())], relaxed)


def check_decoding(model: PreTrainedModel, backend: Backend, tree: Tree, steps: int = 8) -> int:
    """Compares each step with brute force; the number of steps that accepted a token other than the best one."""
    rng = np.random.default_rng(3)
    backend.reserve(128)
    backend.reset(0)
    text = [*PROMPT, *backend.step(len(PROMPT), {0: PROMPT}).emitted(0)[0]]
    relaxed = 0
    for _ in range(steps):
        nodes = draft(model, tree, text, rng)
        backend.drafts[0] = nodes
        expected = brute_force(model, tree, text, nodes)
        tokens = backend.step(tree.size).emitted(0)[0]
        assert tokens == expected.tokens
        relaxed += expected.is_relaxed
        text += tokens
    return relaxed


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama", num_hidden_layers=1)


def relaxed_step(model: PreTrainedModel, *, sampling: bool = True) -> MedusaStep:
    own = make_step(base := tiny_model("llama", num_hidden_layers=1), random_heads(base))
    return MedusaStep(own.model, own.heads, TREE, sampling=sampling, rules=RULES).eval()


@pytest.fixture(scope="module")
def bundle(model: PreTrainedModel, stock: Stock) -> Bundle:
    def fill(out: Path) -> None:
        own = tiny_model("llama", num_hidden_layers=1)
        heads = random_heads(own)
        medusa_export.export(own, out, heads=heads, tree=TREE, acceptance_rules=RULES, name="tiny")

    return Bundle.load(stock.folder("top-2", fill))


@pytest.mark.slow
@pytest.mark.parametrize("derived", [False, True])
def test_graphs_accept_what_brute_force_accepts(model: PreTrainedModel, bundle: Bundle, derived: bool) -> None:
    backend = OnnxRuntimeBackend(bundle, threads=1, graph=None if derived else bundle.graph)
    assert check_decoding(model, backend, TREE) >= 2


@pytest.mark.parametrize("sampling", [False, True])
def test_the_eager_step_accepts_what_brute_force_accepts(model: PreTrainedModel, sampling: bool) -> None:
    assert check_decoding(model, EagerBackend(relaxed_step(model, sampling=sampling)), TREE) >= 2


@pytest.mark.slow
def test_parity_checks_know_that_the_rule_changes_texts(model: PreTrainedModel, bundle: Bundle) -> None:
    prompts = [[(7 * i * i + 3 * n) % 101 for i in range(9 + n)] for n in range(6)]
    step = relaxed_step(model)
    assert not step.is_exact
    outcome = verify_bundle(bundle, step, prompts, VerifyOptions(max_new_tokens=40))
    assert outcome.passed, outcome.checks
    assert [check.name for check in outcome.checks if check.name.startswith("tokens")] == ["tokens, tree size 1"]


@pytest.mark.slow
def test_a_bundle_names_its_rules(bundle: Bundle, model: PreTrainedModel) -> None:
    assert bundle.acceptance_rules == RULES
    assert Bundle.load(bundle.folder).acceptance_rules == RULES
    assert [rule.name for rule in relaxed_step(model, sampling=False).rules] == ["exact", "top-2"]


def test_wrong_rules_are_refused(model: PreTrainedModel, tmp_path: Path) -> None:
    own = make_step(tiny_model("llama", num_hidden_layers=1), None, Tree())
    with pytest.raises(ExtensionError, match=r"no acceptance rule named 'top-3'; there are: .*exact, top-2, typical"):
        MedusaStep(own.model, None, Tree(), rules=("top-3",))
    with pytest.raises(ExportError, match="give 'exact' too"):
        MedusaStep(own.model, None, Tree(), sampling=False, rules=("typical",))
    with pytest.raises(ExtensionError, match="already an acceptance rule named 'top-2'"):
        register_rule(TopTwoRule())
