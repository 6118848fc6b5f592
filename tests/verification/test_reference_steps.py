"""Steps of the reference: shared by backends that take the same, and right for those that take others."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from medusa_export.step.eager import EagerBackend
from medusa_export.step.step import MedusaStep, StepOutput
from medusa_export.verification.checks import Tolerances
from medusa_export.verification.reference import Prompt, reference_tokens
from medusa_export.verification.reference_steps import ReferenceSteps
from medusa_export.verification.steps import StepChecks, graph_checks
from medusa_runtime import Bundle
from medusa_runtime.backends.base import StepResult
from medusa_runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from medusa_runtime.backends.onnxruntime.row_rules import RowRule
from medusa_runtime.bundles.bundle import GRAPH, ONNXRUNTIME_BATCH_GRAPH, ONNXRUNTIME_GRAPH
from support.decoding import TREE
from support.verifying import PROMPTS, verify


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The widths of the steps that the eager module takes."""
    widths: list[int] = []
    step = EagerBackend.step

    def counted(backend: EagerBackend, size: int, *others: Any) -> StepResult:
        widths.append(size)
        return step(backend, size, *others)

    monkeypatch.setattr(EagerBackend, "step", counted)
    return widths


def drive(reference: ReferenceSteps, roots: list[int]) -> list[StepOutput]:
    """Takes in two prompts, then verifies trees with these roots, one after the other."""
    reference.begin(64, [False, False])
    outputs = [reference.step(5, {0: PROMPTS[0][:5], 1: PROMPTS[1][:4]})]
    for root in roots:
        reference.drafts[:, 0] = root
        outputs.append(reference.step(TREE.size, {}))
    return outputs


def test_steps_in_common_are_computed_once_and_others_as_from_the_beginning(step: MedusaStep, taken: list[int]) -> None:
    shared = ReferenceSteps(step, 2)
    drive(shared, [7, 8, 9])
    drive(shared, [7, 8, 9])
    assert len(taken) == 4
    found = drive(shared, [7, 3, 9])  # the second tree is another one
    assert len(taken) == 8  # its steps, and the two before them once more
    for output, alone in zip(found, drive(ReferenceSteps(step, 2), [7, 3, 9]), strict=True):
        for name in ("tokens", "count", "next_input_ids", "next_cache_lengths", "logits", "head_logits"):
            assert np.array_equal(getattr(output, name), getattr(alone, name)), name


def test_logits_that_are_kept_have_a_limit(step: MedusaStep, taken: list[int]) -> None:
    shared = ReferenceSteps(step, 2, most_kept=0)
    first, again = drive(shared, [7]), drive(shared, [7])
    assert len(taken) == 4
    assert np.array_equal(first[-1].logits, again[-1].logits)
    assert not first[-1].present and not first[-1].next_pending


def test_all_graphs_of_a_right_bundle_share_the_steps_of_one(
    tiny_bundle: Bundle, step: MedusaStep, taken: list[int]
) -> None:
    prompts = [Prompt(ids, reference_tokens(step, ids, 40)) for ids in PROMPTS]
    reference, steps = ReferenceSteps(step, 2), []
    for graph in (GRAPH, ONNXRUNTIME_GRAPH, ONNXRUNTIME_BATCH_GRAPH):
        checks = graph_checks(tiny_bundle, reference, graph, Tolerances.of("float32")).run(prompts, [1, 9], [5, 512])
        assert all(check.passed for check in checks)
        steps.append(len(taken))
    assert steps[0] > 10
    assert steps == [steps[0]] * 3


def test_a_row_that_differs_leaves_the_other_to_be_compared(tiny_bundle: Bundle, step: MedusaStep) -> None:
    class OneWrong(OnnxRuntimeBackend):
        def step(self, size: int, prompts: Any = None, rows: Any = None) -> StepResult:
            result = super().step(size, prompts, rows)
            if not prompts:
                result.tokens[0] = 0
            return result

    prompts = [Prompt(ids, reference_tokens(step, ids, 40)) for ids in PROMPTS]
    backend = OneWrong(tiny_bundle, rows=2, threads=1, graph=tiny_bundle.graph)
    checks = StepChecks(tiny_bundle, ReferenceSteps(step, 2), "wrong", backend, [], Tolerances.of("float32"))
    (integers,) = checks.run(prompts, [9], [64])
    assert integers.mismatches == 2  # once in each scenario
    assert all("of row 0" in note for note in integers.notes)
    assert sum(integers.figures.values()) > 8


@pytest.mark.parametrize("rule", [RowRule.SEVERAL, RowRule.EVEN])
def test_the_graph_for_one_row_takes_steps_of_the_size_of_the_reference(
    tiny_bundle: Bundle, step: MedusaStep, monkeypatch: pytest.MonkeyPatch, rule: RowRule
) -> None:
    """Also on processors on which products of integers are exact for some numbers of rows only."""
    monkeypatch.setattr(OnnxRuntimeBackend, "_row_rule", lambda *_: rule)
    assert verify(tiny_bundle, step).passed
