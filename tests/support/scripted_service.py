"""A service whose model writes what a test wants: a stand-in for models that call tools, which no tiny model does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from medusa_runtime import Chunk, GenerationResult, RequestHandle, SamplingParams, Stats
from medusa_runtime.bundles.model_facts import ModelFacts
from medusa_runtime.text.stream import TextStream
from medusa_runtime.text.tokenizer import Tokenizer

_MAX_TOKENS = 100_000


class _Bundle:
    sampling = True
    model = ModelFacts("scripted", "scripted", 1, 1, 257, _MAX_TOKENS)


class ScriptedService:
    """Answers each request with the same text, in chunks of two tokens. Requests are kept in ``asked``."""

    def __init__(self, tokenizer: Tokenizer, answer: str) -> None:
        self.tokenizer = tokenizer
        self.bundle = _Bundle()
        self.max_tokens = _MAX_TOKENS
        self.state = "ready"
        self.load_figures = (0, 0)
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self._answer = tokenizer.encode(answer, add_special_tokens=False)

    def submit(self, prompt: Sequence[int], **options: Any) -> RequestHandle:
        assert options["sampling"] is None or isinstance(options["sampling"], SamplingParams)
        self.asked.append((self.tokenizer.decode(prompt, skip_special_tokens=False), options))
        handle = RequestHandle(Stats(prompt_tokens=len(prompt)), lambda _: None)
        text = TextStream(self.tokenizer, prompt_ids=prompt, shown_ids=frozenset(options["shown_token_ids"]))
        for start in range(0, len(self._answer), 2):
            tokens = tuple(self._answer[start : start + 2])
            handle.stats.completion_tokens += len(tokens)
            handle.put(Chunk(text.push(tokens), tokens))
        handle.put(Chunk(text.finish(), ()))
        handle.end(GenerationResult(text.text, tuple(self._answer), "stop", handle.stats))
        return handle
