"""Requests and options that a service refuses."""

from __future__ import annotations

import numpy as np
import pytest

from medusa_runtime import (
    Bundle,
    MedusaService,
    RequestError,
)
from medusa_runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
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
