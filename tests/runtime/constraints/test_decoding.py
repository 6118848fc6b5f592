"""Constraints change logits as transformers does, and the answer does not depend on the draft tree."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from medusa_runtime import Bundle, Constraints, Grammar, MedusaEngine, MedusaService, RequestError, SamplingParams
from medusa_runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from medusa_runtime.bundles.bundle import GRAPH
from medusa_runtime.constraints.grammar import GrammarWalk
from medusa_runtime.text.tokenizer import Tokenizer
from support.right_drafts import RightDrafts
from support.stock import Stock
from support.tiny_models import tiny_model

PROMPT = [(7 * i * i + 3) % 101 for i in range(13)]
COUNT = 40


class Penalties(LogitsProcessor):
    """The penalties on frequency and presence, as OpenAI's API defines them."""

    def __init__(self, frequency: float, presence: float) -> None:
        self._frequency, self._presence = frequency, presence

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        counts = torch.bincount(input_ids[0, len(PROMPT) :], minlength=scores.shape[1])
        return scores - self._frequency * counts - self._presence * (counts > 0)


def by_transformers(options: dict[str, Any], *processors: LogitsProcessor) -> tuple[int, ...]:
    model = tiny_model("llama")
    ids = torch.tensor([PROMPT])
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=COUNT,
        logits_processor=LogitsProcessorList(processors),
        **options,
    )
    return tuple(output[0, len(PROMPT) :].tolist())


CASES: dict[str, tuple[Constraints, dict[str, Any], tuple[LogitsProcessor, ...]]] = {
    "repetition": (Constraints(repetition_penalty=1.7), {"repetition_penalty": 1.7}, ()),
    "a reward for repetition": (Constraints(repetition_penalty=0.8), {"repetition_penalty": 0.8}, ()),
    "frequency and presence": (
        Constraints(frequency_penalty=0.7, presence_penalty=0.4), {}, (Penalties(0.7, 0.4),),
    ),
    "negative penalties": (Constraints(frequency_penalty=-0.3, presence_penalty=-0.2), {}, (Penalties(-0.3, -0.2),)),
    "bias": (
        Constraints(logit_bias={5: 3.0, 22: -9.0}), {"sequence_bias": [[[5], 3.0], [[22], -9.0]]}, (),
    ),
    "bans": (Constraints(banned_token_ids=[22, 37, 5]), {"suppress_tokens": [22, 37, 5]}, ()),
    "all together": (
        Constraints(logit_bias={5: 2.0}, banned_token_ids=[22], repetition_penalty=1.2, min_new_tokens=30),
        {"sequence_bias": [[[5], 2.0]], "suppress_tokens": [22], "repetition_penalty": 1.2, "min_new_tokens": 30},
        (),
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=CASES, ids=list(CASES))
def case(request: pytest.FixtureRequest) -> tuple[Constraints, tuple[int, ...]]:
    """Constraints, and the answer of transformers under them."""
    constraints, options, processors = CASES[request.param]
    return constraints, by_transformers(options, *processors)


@pytest.mark.parametrize("graph", [None, GRAPH])
def test_answers_are_those_of_transformers_with_any_tree(
    tiny_bundle: Bundle, case: tuple[Constraints, tuple[int, ...]], graph: str | None
) -> None:
    constraints, expected = case
    path = None if graph is None else tiny_bundle.folder / graph
    for size in (1, 3, 8, 9):
        backend = RightDrafts(tiny_bundle, [[*PROMPT, *expected]], graph=path)
        with MedusaEngine(tiny_bundle, backend, None) as engine:
            result = engine.generate(
                PROMPT, max_new_tokens=COUNT, constraints=constraints, tree_size=size, prefill_chunk=7
            )
        assert result.token_ids == expected
        assert size == 1 or result.stats.tokens_per_step > 1.3


def test_rows_with_constraints_of_their_own_answer_as_alone(tiny_bundle: Bundle) -> None:
    """Sampled with seeds, and with log probabilities of the base model."""
    given: list[dict[str, Any]] = [
        {"constraints": Constraints(presence_penalty=1.5), "sampling": SamplingParams(seed=1)},
        {"constraints": Constraints(logit_bias={3: 2.5}, repetition_penalty=1.3)},
        {"sampling": SamplingParams(seed=2, top_k=20)},
        {"constraints": Constraints(banned_token_ids=list(range(40)), min_new_tokens=20), "logprobs": True},
        {},
    ]
    prompts = [PROMPT[: 6 + row] for row in range(len(given))]
    with MedusaEngine.load(tiny_bundle.folder, threads=1) as engine:
        alone = [
            engine.generate(prompt, max_new_tokens=30, tree_size=1, **options)
            for prompt, options in zip(prompts, given, strict=True)
        ]
    texts = [[*prompt, *result.token_ids] for prompt, result in zip(prompts, alone, strict=True)]
    backend = RightDrafts(tiny_bundle, texts[:3])
    with MedusaService(tiny_bundle, backend, None, tree_size=8) as service:
        handles = [
            service.submit(prompt, max_new_tokens=30, **options) for prompt, options in zip(prompts, given, strict=True)
        ]
        results = [handle.result(60) for handle in handles]
    assert [result.token_ids for result in results] == [result.token_ids for result in alone]
    assert min(alone[3].token_ids) >= 40
    assert alone[3].logprobs is not None
    assert results[3].logprobs == pytest.approx(alone[3].logprobs, abs=1e-4)
    assert max(result.stats.tokens_per_step for result in results) > 1.2


def test_log_probabilities_stay_those_of_the_base_model(tiny_bundle: Bundle) -> None:
    with MedusaEngine.load(tiny_bundle.folder, threads=1) as engine:
        free = engine.generate(PROMPT, max_new_tokens=1, logprobs=True)
        other = engine.generate(
            PROMPT, max_new_tokens=1, logprobs=True, constraints=Constraints(banned_token_ids=free.token_ids)
        )
    with torch.no_grad():
        expected = tiny_model("llama")(torch.tensor([PROMPT])).logits[0, -1].log_softmax(-1)
    assert other.token_ids[0] == expected.topk(2).indices[1]
    assert other.logprobs == pytest.approx((expected.topk(2).values[1].item(),), abs=1e-4)


def test_an_answer_does_not_end_early(tiny_bundle: Bundle) -> None:
    """Where greedy decoding ends at a stop token, an answer of more tokens goes on behind the second best one."""
    with MedusaEngine.load(tiny_bundle.folder, threads=1) as engine:
        free = engine.generate(PROMPT, max_new_tokens=COUNT)
        stops = [free.token_ids[3]]
        assert len(engine.generate(PROMPT, max_new_tokens=COUNT, stop_token_ids=stops).token_ids) == 4
        late = engine.generate(
            PROMPT, max_new_tokens=COUNT, stop_token_ids=stops, constraints=Constraints(min_new_tokens=11)
        )
    assert stops[0] not in late.token_ids[:11]


GRAMMARS = {
    "regex": (Grammar.regex("(ab|ba){3,9}!"), "(ab|ba){3,9}!"),
    "schema": (
        Grammar.json_schema({"type": "object", "properties": {"n": {"enum": [1, 22]}}, "required": ["n"]}),
        r'\s*\{\s*"n"\s*:\s*(1|22)\s*(,.*)?\}\s*',
    ),
    "lark": (Grammar.lark('start: "x" item{2,4} "."\nitem: /[0-9]/ ";"'), r"x([0-9];){2,4}\."),
    "gbnf": (Grammar.gbnf('root ::= "yes" | "no" | "maybe-" [0-9]'), "yes|no|maybe-[0-9]"),
}


@pytest.mark.parametrize("name", GRAMMARS)
@pytest.mark.parametrize("sampling", [None, SamplingParams(seed=7)], ids=["greedy", "sampled"])
def test_answers_follow_a_grammar_with_any_tree(
    tiny_bundle: Bundle, name: str, sampling: SamplingParams | None
) -> None:
    grammar, pattern = GRAMMARS[name]
    options: dict[str, Any] = {"constraints": Constraints(grammar=grammar), "stop_token_ids": [0], "sampling": sampling}
    with MedusaEngine.load(tiny_bundle.folder, threads=1) as engine:
        results = [engine.generate("go", max_new_tokens=60, tree_size=size, **options) for size in (1, 3, 9)]
    assert {result.token_ids for result in results} == {results[0].token_ids}
    if results[0].finish_reason == "stop":
        assert re.fullmatch(pattern, results[0].text)
    else:
        assert len(results[0].token_ids) == 60


def test_forced_tokens_cost_few_steps(tiny_bundle: Bundle) -> None:
    """The heads know nothing, but where the grammar leaves one token, that is drafted."""
    constraints = Constraints(grammar=Grammar.regex("The-answer-is-forty-two[.!]"))
    with MedusaEngine.load(tiny_bundle.folder, threads=1) as engine:
        result = engine.generate("go", max_new_tokens=60, constraints=constraints, tree_size=9, stop_token_ids=[0])
    assert result.text[:-1] == "The-answer-is-forty-two"
    assert result.finish_reason == "stop"
    assert result.stats.tokens_per_step > 2


def test_rows_follow_grammars_of_their_own(tiny_bundle: Bundle) -> None:
    tokenizer = Tokenizer.load(tiny_bundle.folder)
    patterns = ["[ab]{5}", "(xy){4}", "[0-9]{3}-[0-9]{2}", "q+r"]
    backend = OnnxRuntimeBackend(tiny_bundle, rows=3, threads=1)
    with MedusaService(tiny_bundle, backend, tokenizer, tree_size=8) as service:
        handles = [
            service.submit(
                "go",
                max_new_tokens=20,
                stop_token_ids=[0],
                constraints=Constraints(grammar=Grammar.regex(pattern)),
                sampling=SamplingParams(seed=row),
            )
            for row, pattern in enumerate(patterns)
        ]
        handles.append(service.submit("go", max_new_tokens=20))
        results = [handle.result(60) for handle in handles]
    for pattern, result in zip(patterns, results, strict=False):
        assert result.finish_reason == "length" or re.fullmatch(pattern, result.text)
    assert results[0].finish_reason == results[1].finish_reason == results[2].finish_reason == "stop"


@pytest.mark.parametrize("sampling", [None, SamplingParams(seed=1)])
def test_constraints_that_leave_no_token_end_the_request(tiny_bundle: Bundle, sampling: SamplingParams | None) -> None:
    digits = Grammar.regex("[0-9]{3}")
    vocab = tiny_bundle.model.vocab_size
    with MedusaEngine.load(tiny_bundle.folder, threads=1, measure=False) as engine:
        numbers = [token for token in range(vocab) if engine.tokenizer and engine.tokenizer.decode([token]).isdigit()]
        for constraints in (
            Constraints(banned_token_ids=range(vocab)),
            Constraints(banned_token_ids=range(1, vocab), min_new_tokens=3),
            Constraints(banned_token_ids=numbers, grammar=digits),
            Constraints(banned_token_ids=[*tiny_bundle.model.eos_token_ids, 0], grammar=digits),
        ):
            for size in (1, tiny_bundle.tree.size):
                with pytest.raises(RequestError, match="leave no token to go on with"):
                    engine.generate(
                        PROMPT, tree_size=size, stop_token_ids=[0], constraints=constraints, sampling=sampling
                    )


def test_a_grammar_that_ends_early_ends_the_answer(tiny_bundle: Bundle) -> None:
    longer = Constraints(min_new_tokens=20, grammar=Grammar.regex("[0-9]{2,5}"))
    with MedusaEngine.load(tiny_bundle.folder, threads=1, measure=False) as engine:
        answers = [
            engine.generate(PROMPT, tree_size=size, stop_token_ids=[5], constraints=longer)
            for size in (1, tiny_bundle.tree.size)
        ]
    assert re.fullmatch("[0-9]{5}%", answers[0].text)  # the end token is shown, as it is no special one
    assert answers[0].token_ids[-1] == 5
    assert answers[0].finish_reason == "stop"
    assert answers[0].token_ids == answers[1].token_ids


def test_behind_the_end_of_a_grammar_end_tokens_alone_may_follow(tiny_bundle: Bundle) -> None:
    tokenizer = Tokenizer.load(tiny_bundle.folder)
    assert tokenizer is not None
    walk = GrammarWalk(Grammar.regex("[0-9]{2}"), tokenizer.description, tiny_bundle.model.vocab_size, [5])
    digits = tokenizer.encode("12", add_special_tokens=False)
    drafted, parents = np.array([digits[1], 5, 5, 7]), [-1, 0, 1, 2]
    for known in (digits, [5]):
        walk.extend(known)
        bits = np.unpackbits(walk.masks(drafted, parents)[:3], axis=1, bitorder="little")
        assert [row.nonzero()[0].tolist() for row in bits] == [[5], [5], [5]]


def test_a_grammar_that_is_none_is_refused(tiny_bundle: Bundle) -> None:
    with MedusaEngine.load(tiny_bundle.folder, threads=1) as engine:
        for grammar in (Grammar.regex("(a"), Grammar.lark("start: nothing"), Grammar.json_schema({"type": "number?"})):
            with pytest.raises(RequestError, match="The grammar can't be followed"):
                engine.generate("go", stop_token_ids=[0], constraints=Constraints(grammar=grammar))
        with pytest.raises(RequestError, match="use stop_token_ids"):
            engine.generate("go", constraints=Constraints(grammar=Grammar.regex("a")))
        assert engine.generate("go", max_new_tokens=3).token_ids


def test_bundles_without_constraints_refuse_them(stock: Stock) -> None:
    bundle = stock.export(sampling=False).bundle
    with (
        MedusaEngine.load(bundle.folder, threads=1) as engine,
        pytest.raises(RequestError, match="knows no constraints"),
    ):
        engine.generate(PROMPT, constraints=Constraints(presence_penalty=1))
