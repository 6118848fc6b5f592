"""Requests and options that a service refuses."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from medusa_runtime import (
    Bundle,
    ContextLengthError,
    MedusaEngine,
    MedusaService,
    RequestError,
)
from medusa_runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from medusa_runtime.decoding.sequence import TokenSequence
from medusa_runtime.text.tokenizer import Tokenizer
from support.gate import Gate
from support.prompts import PROMPT


@pytest.mark.parametrize(
    ("prompt", "options", "words"),
    [
        ("", {}, "prompt is empty"),
        ([101], {}, "from 0 to 100"),
        ("Hi", {"max_new_tokens": 511}, "exceed the 512 tokens"),
        ("Hi", {"timeout": 0}, "more than 0 seconds"),
        ("Hi", {"timeout": float("nan")}, "more than 0 seconds"),
        ("Hi", {"timeout": "5"}, "more than 0 seconds"),
        ("Hi", {"timeout": True}, "more than 0 seconds"),
        ([5] * 400, {"max_new_tokens": np.uint8(200)}, "exceed the"),
        ("Hi", {"priority": None}, "priority is None: expected an integer"),
        ("Hi", {"priority": float("nan")}, "priority is nan"),
        ("Hi", {"max_new_tokens": 1.5}, "max_new_tokens is 1.5: expected an integer of at least 1"),
        ("Hi", {"max_new_tokens": None}, "max_new_tokens is None"),
        ("Hi", {"stop_token_ids": 2.5}, "stop_token_ids is 2.5"),
        ("Hi", {"stop_token_ids": ["</s>"]}, "stop_token_ids is '</s>'"),
        ("Hi", {"shown_token_ids": [101]}, "shown_token_ids is 101: token ids go up to 100"),
        ("Hi", {"ignore_eos": 1}, "ignore_eos is 1: expected True or False"),
    ],
)
def test_unusable_requests(shared: MedusaService, prompt: object, options: dict[str, object], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        shared.submit(prompt, **options)


def test_unusable_options(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are refused before anything is opened. A backend that was opened is closed after a later refusal."""
    opened: list[OnnxRuntimeBackend] = []

    def open_it(*_: object, **options: int) -> OnnxRuntimeBackend:
        opened.append(OnnxRuntimeBackend(tiny_bundle, rows=options["rows"], threads=1))
        opened[0].reserve(64)
        return opened[0]

    monkeypatch.setattr("medusa_runtime.service.open_backend", open_it)
    for options in ({"rows": 0}, {"max_queue": -1}, {"tree_size": 10}, {"tree_size": True}, {"prefill_chunk": 0},
                    {"rows": "4"}, {"max_queue": 1.5}, {"prefill_chunk": None}):  # fmt: skip
        with pytest.raises(RequestError):
            MedusaService.load(tiny_bundle.folder, threads=1, **options)
    assert not opened
    monkeypatch.setattr("medusa_runtime.service.DecodeLoop", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        MedusaService.load(tiny_bundle.folder, threads=1)
    assert opened[0].capacity == 0


def test_unknown_options_are_refused(shared: MedusaService) -> None:
    with pytest.raises(TypeError, match="no option 'max_tokens': a request has max_new_tokens, "):
        shared.submit(PROMPT, max_tokens=3)


def test_a_request_may_have_as_many_tokens_as_the_service_says(shared: MedusaService) -> None:
    prompt = [5] * 500
    with pytest.raises(ContextLengthError, match="exceed the 512 tokens"):
        shared.submit(prompt, max_new_tokens=shared.max_tokens - len(prompt) + 1)
    result = shared.generate(prompt, max_new_tokens=shared.max_tokens - len(prompt), ignore_eos=True)
    assert len(result.token_ids) == 12


def test_end_tokens_can_be_ignored_and_special_tokens_shown(tiny_bundle: Bundle) -> None:
    tokenizer = Tokenizer.load(tiny_bundle.folder)
    assert tokenizer is not None
    eos = tokenizer.eos_token_id
    assert eos is not None
    bundle = replace(tiny_bundle, model=replace(tiny_bundle.model, eos_token_ids=(eos,)))

    def answer(**options: object) -> tuple[str, str | None]:
        sequence = TokenSequence.of(bundle, tokenizer, "Hi", max_new_tokens=9, **options)
        first = sequence.accept(tokenizer.encode("a"))
        return first.text + sequence.accept([eos, *tokenizer.encode("bcd")]).text, sequence.finish_reason

    assert answer() == ("a", "stop")
    assert answer(ignore_eos=True) == ("abcd", None)
    assert answer(shown_token_ids=[eos]) == ("a<eos>", "stop")
    assert answer(shown_token_ids=eos, ignore_eos=True) == ("a<eos>bcd", None)
    # A shown token is text, in which stop strings are found.
    assert answer(shown_token_ids=[eos], ignore_eos=True, stop="s>b") == ("a<eo", "stop")
    assert answer(ignore_eos=True, stop="<eos>b") == ("a", "stop")


def test_options_of_numpys_types(tiny_bundle: Bundle) -> None:
    """Unsigned integers would wrap in negations and sums."""
    gate = Gate(tiny_bundle, rows=1)
    service = MedusaService(
        tiny_bundle, gate, None, max_queue=np.uint8(255), tree_size=np.int64(4), prefill_chunk=np.uint8(200)
    )
    with service:
        gate.open.clear()
        first = service.submit([5] * 300, max_new_tokens=np.uint8(2), timeout=np.float32(60))
        assert gate.entered.acquire(timeout=30)
        flags = {"lookup": np.bool_(True), "logprobs": np.bool_(True), "stop_token_ids": np.array([3])}
        priorities = (0, np.uint8(5), np.int8(-128), np.uint64(2**63))
        handles = [
            first,
            *(service.submit(PROMPT, max_new_tokens=2, priority=priority, **flags) for priority in priorities),
        ]
        order = [job.priority for job in service._thread.scheduler.waiting]
        assert order == [2**63, 5, 0, -128] and {type(priority) for priority in order} == {int}
        gate.open.set()
        assert all(handle.result(np.float32(30)).finish_reason for handle in handles)
        with pytest.raises(RequestError, match="timeout is nan"):
            first.result(float("nan"))
        assert handles[1].result(1e300) and handles[1].result(float("inf"))
        assert service.drain(np.float64(30))


def test_options_of_numpys_types_in_an_engine(engine: MedusaEngine) -> None:
    expected = engine.generate([5] * 300, max_new_tokens=20).token_ids
    result = engine.generate(
        [5] * 300,
        max_new_tokens=np.uint8(20),
        tree_size=np.int64(4),
        prefill_chunk=np.uint8(200),
        lookup=np.bool_(True),
    )
    assert result.token_ids == expected


@pytest.mark.parametrize("threads", [0, -1, 1.5, "2", True])
def test_threads_that_are_no_number(tiny_bundle: Bundle, threads: object) -> None:
    for kind in (MedusaEngine, MedusaService):
        with pytest.raises(RequestError, match="threads is"):
            kind.load(tiny_bundle.folder, threads=threads)
