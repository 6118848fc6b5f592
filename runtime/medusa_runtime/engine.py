"""The engine: one request at a time, drafted, verified and accepted step by step."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import numpy as np

from medusa_runtime.backends import open_backend
from medusa_runtime.backends.base import Backend
from medusa_runtime.bundle import Bundle
from medusa_runtime.errors import RequestError
from medusa_runtime.latency import LatencyTable
from medusa_runtime.request import Chunk, GenerationResult, Prompt, Stats
from medusa_runtime.text_stream import TextStream, check_stop
from medusa_runtime.tokenizer import Tokenizer

TreeSize = int | Literal["auto"]
PREFILL_CHUNK = 512


class MedusaEngine:
    """Generates text from a bundle.

    Args:
        bundle: The bundle, checked.
        backend: What runs its graph.
        tokenizer: Its tokenizer, or None if it has none: then prompts are token ids and results too.
    """

    def __init__(self, bundle: Bundle, backend: Backend, tokenizer: Tokenizer | None) -> None:
        self.bundle = bundle
        self.backend = backend
        self.tokenizer = tokenizer
        self._best_tree_size: int | None = None
        self._turn = 0  # counts who may use the backend: the newest stream

    @classmethod
    def load(
        cls,
        bundle: str | Path,
        backend: str = "auto",
        *,
        threads: int | None = None,
        check_digests: bool = True,
    ) -> Self:
        """Opens a bundle.

        Args:
            bundle: The folder that ``medusa-export onnx`` or ``medusa-export trt`` wrote.
            backend: ``onnxruntime`` (on the CPU), ``onnxruntime-cuda``, the flavor of a compiled engine (``tensorrt``,
                ``tensorrt-rtx``), or ``auto`` for the best that the folder and this machine have.
            threads: CPU threads of one step; all that this process may use if None.
            check_digests: Read all files to compare their digests.

        Raises:
            BundleError: The bundle can't be served; the message says why.
            BackendError: The backend is unknown or not installed, or it can't load the graph.
        """
        checked = Bundle.load(bundle, check_digests=check_digests)
        opened = open_backend(backend, checked, threads=threads, check_digests=check_digests)
        return cls(checked, opened, Tokenizer.load(checked.folder))

    def generate(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 128,
        tree_size: TreeSize = "auto",
        stop: str | Sequence[str] = (),
        stop_token_ids: Sequence[int] = (),
        prefill_chunk: int = PREFILL_CHUNK,
    ) -> GenerationResult:
        """Answers a prompt.

        Args:
            prompt: Text, a list of chat messages (``{"role": …, "content": …}``), or token ids.
            max_new_tokens: Tokens to generate at most.
            tree_size: Nodes to verify per step, from 1 (plain decoding) to the bundle's tree; ``auto``
                takes the size with the best expected speed on this machine. It never changes the result.
            stop: Strings that end the text; they are not part of it.
            stop_token_ids: Tokens that end it, besides the model's own.
            prefill_chunk: Tokens of the prompt that one step takes in.

        Raises:
            RequestError: The request can't be served as it stands.
            BackendError: The graph failed.
        """
        stream = self.stream(
            prompt,
            max_new_tokens=max_new_tokens,
            tree_size=tree_size,
            stop=stop,
            stop_token_ids=stop_token_ids,
            prefill_chunk=prefill_chunk,
        )
        return stream.result()

    def stream(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 128,
        tree_size: TreeSize = "auto",
        stop: str | Sequence[str] = (),
        stop_token_ids: Sequence[int] = (),
        prefill_chunk: int = PREFILL_CHUNK,
    ) -> GenerationStream:
        """Answers a prompt piece by piece: iterate over the chunks; arguments and errors as for ``generate``.

        The request is checked at once, before the first chunk is asked for. The engine serves one
        stream at a time: once there is a newer one, the one before raises ``RequestError``.
        """
        prompt_ids = self._encode(prompt)
        size = self._tree_size(tree_size)
        stops = check_stop(stop)
        if stops and self.tokenizer is None:
            raise RequestError("Stop strings need a tokenizer, and this bundle has none: use stop_token_ids.")
        self._check_lengths(len(prompt_ids), max_new_tokens, prefill_chunk)
        eos = {*self.bundle.model.eos_token_ids, *stop_token_ids}
        text = TextStream(self.tokenizer, stops, prompt_ids=prompt_ids) if self.tokenizer else None
        stats = Stats(prompt_tokens=len(prompt_ids), tree_size=size)
        self.backend.reset(0)
        self._turn += 1
        return GenerationStream(
            self._steps(prompt_ids, max_new_tokens, size, prefill_chunk, stats, self._turn),
            eos,
            max_new_tokens,
            text,
            stats,
        )

    def _steps(
        self, prompt_ids: Sequence[int], max_new_tokens: int, size: int, prefill_chunk: int, stats: Stats, turn: int
    ) -> Iterator[list[int]]:
        """The tokens that each step emits, without end: prefill gives one, every step after it at least one."""
        backend, depth = self.backend, self.bundle.tree.max_depth
        # The last chunk is padded to the size of the tree: a step of S tokens drafts at most S - 1 deep.
        step = min(prefill_chunk, backend.max_tokens or prefill_chunk)
        chunks = [prompt_ids[i : i + step] for i in range(0, len(prompt_ids), step)]
        # The last step of the prompt, and the last one of all, which begins with two tokens less than there will be.
        prefilled = len(prompt_ids) - len(chunks[-1]) + max(len(chunks[-1]), size)
        backend.reserve(depth + max(prefilled, len(prompt_ids) + max_new_tokens - 2 + size))
        started = time.perf_counter()
        for chunk in chunks:
            self._check_turn(turn)
            result = backend.step(max(len(chunk), size), {0: chunk})
        stats.prefill_seconds = time.perf_counter() - started
        yield [int(result.tokens[0, 0])]
        started = time.perf_counter()
        while True:
            self._check_turn(turn)
            result = backend.step(size)
            emitted: list[int] = result.tokens[0, : result.count[0]].tolist()
            stats.steps += 1
            stats.accepted_lengths[len(emitted)] += 1
            stats.decode_seconds = time.perf_counter() - started
            yield emitted

    def _check_turn(self, turn: int) -> None:
        if turn != self._turn:
            raise RequestError(
                "This stream's engine has been closed or has begun another request: read a stream to its end first, "
                "or load a second engine."
            )

    def _encode(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str) or (len(prompt) and isinstance(prompt[0], Mapping)):
            if self.tokenizer is None:
                raise RequestError("This bundle has no tokenizer: give the prompt as a list of token ids.")
            ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else self.tokenizer.encode_chat(prompt)  # type: ignore[arg-type]
        else:
            ids = [token.item() if isinstance(token, np.integer) else token for token in prompt]  # type: ignore[misc]
        if not ids:
            raise RequestError("The prompt is empty: give at least one token.")
        vocab_size = self.bundle.model.vocab_size
        for token in ids:
            if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocab_size:
                raise RequestError(f"The prompt holds {token!r}: token ids are integers from 0 to {vocab_size - 1}.")
        return ids

    def _check_lengths(self, prompt_tokens: int, max_new_tokens: int, prefill_chunk: int) -> None:
        if max_new_tokens < 1:
            raise RequestError(f"max_new_tokens is {max_new_tokens}: ask for at least one token.")
        if prefill_chunk < 1:
            raise RequestError(f"prefill_chunk is {prefill_chunk}: a chunk holds at least one token.")
        limit = self.bundle.model.max_positions
        if prompt_tokens + max_new_tokens > limit:
            raise RequestError(
                f"The prompt's {prompt_tokens} tokens and {max_new_tokens} new ones exceed the {limit} tokens that "
                "this model holds. Shorten the prompt or lower max_new_tokens."
            )

    def _tree_size(self, tree_size: TreeSize) -> int:
        largest = self.bundle.tree.size
        if tree_size == "auto":
            if self._best_tree_size is None:
                self._best_tree_size = self._measure()
            return self._best_tree_size
        if not isinstance(tree_size, int) or isinstance(tree_size, bool) or not 1 <= tree_size <= largest:
            raise RequestError(f"tree_size is {tree_size!r}: this bundle's tree allows 1 to {largest}, or 'auto'.")
        return tree_size

    def _measure(self) -> int:
        """The size with the most expected tokens per second on this machine."""
        acceptance, largest = self.bundle.acceptance, self.bundle.tree.size
        if acceptance.expected_tokens(largest) <= 1.0:  # nothing to gain: untrained heads, or a tree of one node
            return 1
        latencies = LatencyTable.measured(self.bundle, self.backend)
        return latencies.best_size(acceptance)

    def close(self) -> None:
        """Gives the backend's memory back."""
        self._turn += 1
        self.backend.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class GenerationStream(Iterator[Chunk]):
    """A running request: iterate over it for chunks; ``result()`` runs it to its end.

    Attributes:
        finish_reason: ``stop`` or ``length`` once it has ended, else None.
        stats: How it goes.
    """

    def __init__(
        self,
        steps: Iterator[list[int]],
        stop_token_ids: set[int],
        max_new_tokens: int,
        text: TextStream | None,
        stats: Stats,
    ) -> None:
        self._steps = steps
        self._stop_token_ids = stop_token_ids
        self._max_new_tokens = max_new_tokens
        self._text = text
        self._token_ids: list[int] = []
        self.stats = stats
        self.finish_reason: str | None = None

    def __next__(self) -> Chunk:
        if self.finish_reason is not None:
            raise StopIteration
        tokens, reason = self._until_stop(next(self._steps))
        text = ""
        if self._text is not None:
            before = self._text.consumed
            text = self._text.push(tokens)
            if self._text.stopped_by is not None:
                tokens = tokens[: self._text.consumed - before]
                reason = "stop"
            elif reason is not None:
                text += self._text.finish()
        self.finish_reason = reason
        self._token_ids += tokens
        self.stats.completion_tokens = len(self._token_ids)
        return Chunk(text, tuple(tokens))

    def _until_stop(self, tokens: list[int]) -> tuple[list[int], str | None]:
        """Cuts a step's tokens behind a stop token or at the length asked for; says which it was."""
        left = self._max_new_tokens - len(self._token_ids)
        for place, token in enumerate(tokens[:left]):
            if token in self._stop_token_ids:
                return tokens[: place + 1], "stop"
        return tokens[:left], "length" if len(tokens) >= left else None

    def result(self) -> GenerationResult:
        """Runs to the end and gives the whole."""
        for _ in self:
            pass
        text = self._text.text if self._text is not None else ""
        return GenerationResult(text, tuple(self._token_ids), self.finish_reason or "length", self.stats)
