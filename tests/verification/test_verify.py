"""``verify`` passes correct bundles, makes the comparisons that it lists, and writes its reports."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray
from transformers import GenerationConfig

from medusa_export.cli import main
from medusa_export.common.progress import ignore_progress
from medusa_export.heads.modules import MedusaHeads
from medusa_export.step.reference import load_reference, prompt_ids
from medusa_export.step.step import MedusaStep
from medusa_export.verification.bundle import verify_bundle
from medusa_export.verification.checks import Check, Tolerances, Verification
from medusa_export.verification.generation import generation_checks
from medusa_export.verification.plan import Plan, VerifyOptions
from medusa_export.verification.reference import Prompt, reference_tokens
from medusa_export.verification.reference_steps import ReferenceSteps
from medusa_export.verification.steps import StepChecks, _Logits, graph_checks, with_outputs
from medusa_export.verification.verify import PROMPTS as DEFAULT_PROMPTS
from medusa_runtime import Bundle, MedusaEngine, Tree
from medusa_runtime.backends.base import StepResult
from medusa_runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from medusa_runtime.bundles.bundle import (
    GRAPH,
    GRAPHS,
    ONNXRUNTIME_BATCH_GRAPH,
    ONNXRUNTIME_CUDA_GRAPH,
    ONNXRUNTIME_GRAPH,
)
from support.decoding import make_step
from support.stock import Stock
from support.tiny_models import SEEDS, families, tiny_model
from support.verifying import PROMPTS, redescribe, verify


def test_a_right_bundle_passes(tiny_bundle: Bundle, step: MedusaStep) -> None:
    outcome = verify(tiny_bundle, step)
    assert outcome.passed, [(check.name, check.notes) for check in outcome.checks]
    names = [check.name for check in outcome.checks]
    assert names == [
        "model.onnx: logits",
        "model.onnx: head logits",
        "model.onnx: integers of a step",
        "model.onnxruntime.onnx: logits",
        "model.onnxruntime.onnx: integers of a step",
        "model.onnxruntime.batch.onnx: logits",
        "model.onnxruntime.batch.onnx: integers of a step",
        "tokens, tree size 1",
        "tokens, tree size 5",
        "tokens, tree size 9",
        "sampled tokens",
    ]
    integers = outcome.checks[2]
    assert set(integers.figures) == {"accepted_1", "accepted_2", "accepted_3", "accepted_4", "accepted_5"}


def test_depths_take_turns_whatever_small_trees_reach() -> None:
    checks = StepChecks.__new__(StepChecks)
    checks._tree, checks._turns = Tree(tuple((0,) * depth for depth in range(1, 9))), Counter()
    rng = np.random.default_rng(0)
    for size in (1, 4, 1, 4, 1, 4):
        assert checks._next_node(size, rng) < size
    assert [checks._next_node(9, rng) for _ in range(5)] == [8, 7, 6, 5, 4]


@pytest.mark.parametrize("worst", [0.0, np.nan])
def test_no_figure_loses_a_nan_that_came_first_or_last(worst: float) -> None:
    rows = [np.ones((1, 4), np.float32), np.full((1, 4), np.nan, np.float32), np.ones((1, 4), np.float32)]
    for reference_too in (False, True):
        logits = _Logits("logits", Tolerances.of("float32"))
        for row in rows[1:] if np.isnan(worst) else rows:
            logits.add(row, row if reference_too else rows[0])
        assert logits.check.mismatches == 1
        assert all(np.isnan(logits.check.figures[name]) for name in ("max_abs", "cosine", "norm_ratio_error"))


@pytest.mark.parametrize(("wrong", "value", "passes"), [(2, 9.0, True), (3, 9.0, False), (1, np.nan, False)])
def test_few_tokens_may_be_far_away_where_inputs_are_rounded(wrong: int, value: float, passes: bool) -> None:
    """Of 200 tokens, 1 %; none where nothing is rounded, and none without numbers."""
    expected = np.ones((200, 4), np.float32)
    got = expected.copy()
    got[:wrong, 0] = value
    for tolerances in (Tolerances.of("float32", rounds_activations=True), Tolerances.of("float32")):
        logits = _Logits("logits", tolerances)
        logits.add(got[:100], expected[:100])
        logits.add(got[100:], expected[100:])
        assert logits.check.passed == (passes and tolerances.outliers > 0)
        assert logits.check.mismatches == (0 if logits.check.passed else wrong)


def test_nothing_compared_is_a_failure(tiny_bundle: Bundle, step: MedusaStep) -> None:
    assert not Check("empty").passed
    assert not Verification([], verify(tiny_bundle, step).tolerances).passed
    assert not verify_bundle(tiny_bundle, step, [], VerifyOptions(max_new_tokens=8)).passed


def test_a_tie_is_shown_and_is_no_failure(stock: Stock) -> None:
    """Two tokens with one and the same row of lm_head: whichever is taken, the margin is 0."""
    bundle = stock.export(heads=False).bundle
    other = tiny_model("llama")
    weight = other.get_output_embeddings().weight
    outcome = verify_bundle(bundle, make_step(other, None, Tree()), PROMPTS[:1], VerifyOptions(max_new_tokens=12))
    assert outcome.passed
    # A twin of the first token: the reference now prefers it, by less than the margin.
    token = reference_tokens(make_step(other, None, Tree()), PROMPTS[0], 1)[0]
    weight[0 if token else 1] = weight[token] * (1 + 1e-6)
    outcome = verify_bundle(bundle, make_step(other, None, Tree()), PROMPTS[:1], VerifyOptions(max_new_tokens=12))
    tokens = outcome.checks[-2]
    assert tokens.passed
    assert any(note.startswith("tie: ") for note in tokens.notes)


class Tied(OnnxRuntimeBackend):
    """Emits another token in row 0 of a step without a prompt, and gives head logits behind it."""

    def step(self, size: int, prompts: Any = None, rows: Any = None) -> StepResult:
        result = super().step(size, prompts, rows)
        self._is_tied = not prompts
        if self._is_tied:
            result.tokens[0, 0] += 1
        return result

    def extra_output(self, name: str) -> NDArray[Any]:
        values = super().extra_output(name)
        if self._is_tied and name == "head_logits":
            values = np.concatenate([values[:1] + 1.0, values[1:]])
        return values


def test_head_logits_behind_a_tie_are_not_compared(tiny_bundle: Bundle, step: MedusaStep) -> None:
    """They are those of another node."""
    prompts = [Prompt(ids, reference_tokens(step, ids, 40)) for ids in PROMPTS]
    names = ["logits", "head_logits"]
    graph = with_outputs(tiny_bundle, tiny_bundle.folder / GRAPH, names)
    backend = Tied(tiny_bundle, rows=2, threads=1, graph=graph, extra_outputs=names)
    tolerances = replace(Tolerances.of("float32"), margin=np.inf)
    checks = StepChecks(tiny_bundle, ReferenceSteps(step, 2), "tied", backend, names, tolerances).run(
        prompts, [9], [64]
    )
    logits, heads, integers = checks
    assert any(note.startswith("tie: tokens of row 0") for note in integers.notes)
    assert heads.passed and heads.figures["max_abs"] < 1e-3
    assert logits.passed


class OneBehind(OnnxRuntimeBackend):
    """Forgets an entry where a step accepted two tokens or more, in one row."""

    def step(self, size: int, prompts: Any = None) -> StepResult:
        result = super().step(size, prompts)
        if result.count[1] > 1 and 1 not in (prompts or {}):
            self.lengths[1] -= 1
        return result


class Reordered(OnnxRuntimeBackend):
    """Drafts another root than it emits."""

    def step(self, size: int, prompts: Any = None) -> StepResult:
        result = super().step(size, prompts)
        self.drafts[:, 0] = (self.drafts[:, 0] + 1) % 101
        return result


@pytest.mark.parametrize(("kind", "words"), [(OneBehind, "next_cache_lengths of row 1"), (Reordered, "next_input_ids")])
def test_a_wrong_integer_is_no_tie(tiny_bundle: Bundle, step: MedusaStep, kind: Any, words: str) -> None:
    """However close some logits may be: the margins of half precision are found everywhere."""
    backend = kind(tiny_bundle, rows=2, threads=1, graph=tiny_bundle.graph)
    prompts = [Prompt(ids, reference_tokens(step, ids, 40)) for ids in PROMPTS]
    checks = StepChecks(tiny_bundle, ReferenceSteps(step, 2), "wrong", backend, [], Tolerances.of("float16"))
    (integers,) = checks.run(prompts, [9], [5])
    assert not integers.passed
    assert any(note.startswith(words) for note in integers.notes)


def test_the_graph_for_several_rows_is_held_against_several(
    tiny_bundle: Bundle, step: MedusaStep, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the graph for one row against one at a time."""
    seen: dict[str, set[int]] = {}
    run = OnnxRuntimeBackend._run

    def watched(backend: OnnxRuntimeBackend, binding: Any, order: list[int], *others: int) -> None:
        seen[graph].add(len(order))
        run(backend, binding, order, *others)

    monkeypatch.setattr(OnnxRuntimeBackend, "_run", watched)
    prompts = [Prompt(ids, reference_tokens(step, ids, 8)) for ids in PROMPTS]
    reference = ReferenceSteps(step, 2)
    for graph in (name for name in GRAPHS if name != ONNXRUNTIME_CUDA_GRAPH):
        seen[graph] = set()
        graph_checks(tiny_bundle, reference, graph, Tolerances.of("float32")).run(prompts, [9], [5])
    assert seen == {GRAPH: {2}, ONNXRUNTIME_GRAPH: {1}, ONNXRUNTIME_BATCH_GRAPH: {2}}


def test_room_is_asked_for_as_much_as_prompts_need(tiny_bundle: Bundle, step: MedusaStep) -> None:
    """An engine may have no more, however long its chunks may be."""
    asked: list[int] = []

    class Small(OnnxRuntimeBackend):
        def reserve(self, capacity: int) -> None:
            asked.append(capacity)
            super().reserve(capacity)

    backend = Small(tiny_bundle, rows=2, threads=1, graph=tiny_bundle.graph)
    prompts = [Prompt(ids, reference_tokens(step, ids, 40)) for ids in PROMPTS]
    checks = StepChecks(tiny_bundle, ReferenceSteps(step, 2), "small", backend, [], Tolerances.of("float32"))
    assert checks.run(prompts, [9], [507])[0].passed
    assert max(asked) < 150


def test_prompts_alone_are_not_enough(stock: Stock) -> None:
    """Where each answer ends with its first token, no decoding step is compared."""
    exported = stock.export(heads=False)
    backend = OnnxRuntimeBackend(exported.bundle, rows=2, threads=1, graph=exported.bundle.graph)
    prompts = [Prompt(ids, reference_tokens(exported.step, ids, 1)) for ids in PROMPTS]
    checks = StepChecks(
        exported.bundle, ReferenceSteps(exported.step, 2), "short", backend, [], Tolerances.of("float32")
    )
    (integers,) = checks.run(prompts, [1], [64])
    assert not integers.passed
    assert "No step accepted 1 tokens" in integers.notes[-1]


def test_the_reference_is_greedy_whatever_the_model_is_used_to(step: MedusaStep) -> None:
    expected = reference_tokens(step, PROMPTS[0], 40)
    own = step.model.generation_config
    step.model.generation_config = GenerationConfig(
        repetition_penalty=1.5, no_repeat_ngram_size=2, num_beams=3, temperature=0.2, do_sample=True, min_new_tokens=5
    )
    try:
        assert reference_tokens(step, PROMPTS[0], 40) == expected
        assert step.model.generation_config.repetition_penalty == 1.5
    finally:
        step.model.generation_config = own


@pytest.mark.parametrize("family", families("llama", others=("qwen3",)))
def test_without_heads(stock: Stock, family: str) -> None:
    exported = stock.export(family, SEEDS.get(family, 0), heads=False)
    assert verify_bundle(exported.bundle, exported.step, PROMPTS, VerifyOptions(max_new_tokens=12)).passed


def test_half_precision(stock: Stock) -> None:
    exported = stock.export(dtype="float16")
    bundle, reference = exported.bundle, exported.step.float()
    assert bundle.dtype == "float16"
    outcome = verify_bundle(bundle, reference, PROMPTS, VerifyOptions(max_new_tokens=24))
    assert all(check.compared for check in outcome.checks)
    wrong = [(c.name, c.notes) for c in outcome.checks if not c.passed and "No step accepted" not in str(c.notes)]
    assert not wrong


def test_a_given_margin_holds_where_products_round_their_inputs(tiny_bundle: Bundle) -> None:
    options = VerifyOptions(margin=0.5)
    for rounds in (False, True):
        own = VerifyOptions().tolerances(tiny_bundle, rounds_activations=rounds)
        found = options.tolerances(tiny_bundle, rounds_activations=rounds)
        assert (found.margin, found.max_abs) == (0.5, own.max_abs)
        assert own == Tolerances.of(tiny_bundle.dtype, rounds_activations=rounds)


def test_command_writes_reports(tiny_model_folder: Path, untrained_bundle: Bundle, tmp_path: Path) -> None:
    runner = CliRunner()
    bundle = Path(shutil.copytree(untrained_bundle.folder, tmp_path / "bundle"))
    report, junit = tmp_path / "out" / "report.json", tmp_path / "junit.xml"
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Hello\nThe answer\n")
    arguments = [
        "verify",
        str(bundle),
        "--model",
        str(tiny_model_folder),
        "--prompts",
        str(prompts),
        "-n",
        "40",
        "--json",
        str(report),
        "--junit",
        str(junit),
    ]
    result = runner.invoke(main, arguments)
    assert result.exit_code == 0, result.output
    data = json.loads(report.read_text())
    assert data["passed"] is True
    assert data["rounded"] is None
    assert {check["name"] for check in data["checks"]} >= {"model.onnx: logits", "tokens, tree size 1"}
    suite = ElementTree.parse(junit).getroot()
    assert int(suite.get("tests", 0)) == len(data["checks"])
    assert suite.get("failures") == "0"

    raw = np.fromfile(bundle / "model.onnx.data", np.float32)
    raw[: len(raw) // 2] *= 1.5
    raw.tofile(bundle / "model.onnx.data")
    redescribe(bundle)
    result = runner.invoke(main, arguments)
    assert result.exit_code == 1
    assert "error: " in result.output
    assert json.loads(report.read_text())["passed"] is False
    assert ElementTree.parse(junit).getroot().get("failures") != "0"


def test_trained_heads_have_to_be_given(tiny_bundle: Bundle, tiny_model_folder: Path) -> None:
    result = CliRunner().invoke(main, ["verify", str(tiny_bundle.folder), "--model", str(tiny_model_folder), "-q"])
    assert result.exit_code == 1
    assert "--heads" in result.output


def test_fresh_heads_are_made_again() -> None:
    model = tiny_model("llama")
    first, second = (MedusaHeads.fresh(2, model.get_output_embeddings()) for _ in range(2))
    assert all((a == b).all() for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True))


@pytest.mark.long
@pytest.mark.slow
def test_smollm2_decodes_with_large_trees(smollm2_gguf: str, smollm2_bundle: Path, smollm2_heads: Path) -> None:
    """The tutorial's command, which runs as a test, compares all steps. Its whole answers are those of small trees."""
    bundle = Bundle.load(smollm2_bundle, check_digests=False)
    step = load_reference(bundle, smollm2_gguf, str(smollm2_heads))
    ids = prompt_ids(bundle, DEFAULT_PROMPTS[:2], chosen=False)
    options = VerifyOptions(max_new_tokens=16, tree_sizes=(10, bundle.tree.size))
    plan = Plan.answered(bundle, step, ids, options, ignore_progress)
    with MedusaEngine.load(bundle.folder, threads=1, check_digests=False) as engine:
        checks = list(generation_checks(engine, plan, ignore_progress))
    assert [check.name for check in checks] == ["tokens, tree size 10", "tokens, tree size 64", "sampled tokens"]
    assert all(check.passed for check in checks), checks
