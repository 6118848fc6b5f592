"""Compares whole generations of an engine with transformers: greedy tokens and sampled ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from medusa_export.common.progress import OnProgress, Progress
from medusa_export.step.race import lags
from medusa_export.step.step import MedusaStep
from medusa_export.verification.checks import Check, Tolerances
from medusa_export.verification.plan import Plan
from medusa_export.verification.reference import Prompt, reference_logits
from medusa_runtime.backends.base import rows_differ
from medusa_runtime.bundles.contract import MAX_TOP_LOGPROBS
from medusa_runtime.engine import MedusaEngine
from medusa_runtime.errors import NotFiniteError
from medusa_runtime.request import GenerationResult
from medusa_runtime.sampling import Draws, SamplingParams

TEMPERATURE = 0.8  # of sampled answers


def generation_checks(engine: MedusaEngine, plan: Plan, on_progress: OnProgress) -> Iterator[Check]:
    """Compares whole generations: greedy ones, and sampled ones if the bundle supports sampling.

    If the acceptance rules of the step may change the text, only plain decoding has a reference.

    Args:
        engine: The engine to check.
        plan: The prompts, and the sizes to decode them with.
        on_progress: Receives reports.

    Yields:
        One check per tree size, and one for sampled tokens.
    """
    step, tolerances = plan.step, plan.rounded
    sizes = plan.sizes if step.is_exact else [1]
    prompts = plan.prompts
    if plan.own_reference:
        on_progress(Progress("decoding plainly"))
        check, prompts = _plain_answers(engine, plan)
        yield check
        if not rows_differ(engine.backend):
            tolerances = replace(tolerances, margin=-1.0)  # no difference is a tie
    for size in sizes:
        on_progress(Progress(f"generating with tree size {size}"))
        check = Check(f"tokens, tree size {size}")
        steps = emitted = 0
        for chunk in plan.chunks:
            for number, prompt in enumerate(prompts):
                engine.evict()  # the whole prompt is to be checked
                try:
                    result = engine.generate(
                        prompt.ids, max_new_tokens=len(prompt.expected), tree_size=size, prefill_chunk=chunk
                    )
                except NotFiniteError as error:
                    _note_failure(check, number, error)
                    continue
                _compare_tokens(check, step, number, prompt, result.token_ids, tolerances)
                steps += result.stats.steps
                emitted += result.stats.completion_tokens - 1
        check.figures["tokens_per_step"] = emitted / max(steps, 1)
        yield check
    yield from _sampling_checks(engine, step, plan.prompts, sizes, plan.rounded)


def _plain_answers(engine: MedusaEngine, plan: Plan) -> tuple[Check, list[Prompt]]:
    """Decodes plainly, and compares each answer with the reference's up to the first difference.

    Returns:
        The check, and the prompts with the engine's own answers.
    """
    check = Check("tokens, plain decoding and the reference")
    answered = []
    for number, prompt in enumerate(plan.prompts):
        engine.evict()
        result = engine.generate(prompt.ids, max_new_tokens=len(prompt.expected), tree_size=1, lookup=False)
        _compare_tokens(check, plan.step, number, prompt, result.token_ids, plan.rounded)
        answered.append(Prompt(prompt.ids, list(result.token_ids)))
    return check, answered


def _note_failure(check: Check, number: int, error: NotFiniteError) -> None:
    check.compared += 1
    check.mismatches += 1
    check.notes.append(f"prompt {number}: {error}")


def _compare_tokens(
    check: Check, step: MedusaStep, number: int, prompt: Prompt, tokens: Sequence[int], tolerances: Tolerances
) -> None:
    expected = prompt.expected
    same = next((i for i, pair in enumerate(zip(tokens, expected, strict=False)) if pair[0] != pair[1]), None)
    check.compared += len(expected) if same is None else same + 1
    if same is None and len(tokens) == len(expected):
        return
    place = len(tokens) if same is None else same
    logits = reference_logits(step, [*prompt.ids, *expected[:place]])[-1]
    got = int(tokens[place]) if place < len(tokens) else None
    margin = float("inf") if got is None else float(logits.max() - logits[got])
    words = f"prompt {number}, token {place}: got {got}, expected {expected[place] if place < len(expected) else None}"
    if margin <= tolerances.margin:
        check.notes.append(f"tie: {words}; the reference's margin is {margin:.2g}")
        figures = check.figures
        figures["ties"] = figures.get("ties", 0) + 1
        figures["largest_tie_margin"] = max(figures.get("largest_tie_margin", 0.0), margin)
        return
    check.mismatches += 1
    check.notes.append(f"{words}; the reference's margin is {margin:.3g}")


def _sampling_checks(
    engine: MedusaEngine, step: MedusaStep, prompts: Sequence[Prompt], sizes: Sequence[int], tolerances: Tolerances
) -> list[Check]:
    """Checks sampled tokens, with trees of several sizes; no check if the bundle is greedy only.

    The sampled token is the winner of a race among all tokens. It is right if it also wins in the reference, or if it
    is as close to the winner there as two logits in a tie. Log probabilities have the tolerance of logits, those of the
    most likely tokens included.
    """
    if not engine.bundle.sampling:
        return []
    check = Check("sampled tokens")
    ranked = MAX_TOP_LOGPROBS if engine.bundle.top_logprobs else 0
    furthest = 0.0
    for number, prompt in enumerate(prompts):
        params = SamplingParams(temperature=TEMPERATURE, seed=number)
        size, length = sizes[number % len(sizes)], len(prompt.ids)
        try:
            result = engine.generate(
                prompt.ids,
                max_new_tokens=len(prompt.expected),
                tree_size=size,
                sampling=params,
                logprobs=True,
                top_logprobs=ranked,
            )
        except NotFiniteError as error:
            _note_failure(check, number, error)
            continue
        tokens = np.array(result.token_ids)
        logits = reference_logits(step, [*prompt.ids, *result.token_ids])[length - 1 : -1]
        numbers = Draws(params, length, logits.shape[1]).numbers(length, len(tokens))
        behind = lags(logits, numbers, TEMPERATURE, result.token_ids).numpy()
        wrong = np.flatnonzero(~(behind <= tolerances.margin / TEMPERATURE))
        furthest = float(np.maximum(furthest, _furthest_logprob(result, logits.log_softmax(-1))))
        check.compared += len(tokens)
        check.mismatches += len(wrong)
        check.notes += [
            f"prompt {number}, token {place}: {tokens[place]} is {behind[place]:.2g} behind the winner of the draw"
            for place in wrong[:2]
        ]
    check.figures["logprob_max_abs"] = furthest
    if not furthest <= tolerances.max_abs:  # NaN fails, too
        check.mismatches += 1
        check.notes.append(f"a log probability is {furthest:.2g} from the reference's")
    return [check]


def _furthest_logprob(result: GenerationResult, expected: Tensor) -> float:
    """The largest difference between the log probabilities of an answer and the reference's; NaN if there is a NaN.

    The most likely tokens have to have their own log p, and those of the most likely tokens of the reference.

    Args:
        result: The answer, with log probabilities.
        expected: [N, V], log p of all tokens in the place of each token of the answer.
    """
    assert result.logprobs is not None
    tokens, values = torch.tensor(result.token_ids).unsqueeze(1), torch.tensor(result.logprobs).unsqueeze(1)
    differences = [expected.gather(1, tokens) - values]
    if result.top_logprobs:
        tokens = torch.tensor([[top.token_id for top in place] for place in result.top_logprobs])
        values = torch.tensor([[top.logprob for top in place] for place in result.top_logprobs])
        best = expected.topk(tokens.shape[1], dim=-1).values
        differences += [expected.gather(1, tokens) - values, best - values]
    return float(torch.cat(differences, dim=1).abs().max())
