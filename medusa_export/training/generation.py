"""Generates answers and user turns with the base model, in batches."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from medusa_export.common.errors import DatasetError
from medusa_export.compat.transformers import cache_argument
from medusa_export.models.end_tokens import EndTokens
from medusa_export.training.conversations import Conversation, Message
from medusa_export.training.features import fingerprint
from medusa_export.training.labels import Labeller, decoded
from medusa_export.training.templates import MARK, ChatTemplate


@dataclass(frozen=True)
class Written:
    """A text that the model wrote.

    Attributes:
        text: The text, without the token that ends it.
        complete: True if the model ended the text, False if it was cut off at the limit.
        ids: The token ids, the one that ends the text included.
    """

    text: str
    complete: bool
    ids: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Number of tokens, the one that ends the text included."""
        return len(self.ids)


class Writer:
    """Writes answers and user turns, many rows at a time.

    Args:
        model: The model, on the device to run on.
        tokenizer: The model's tokenizer, with a chat template.

    Attributes:
        on_progress: Called after each step with the number of rows that got a token.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self._model: Any = model
        self._tokenizer = tokenizer
        self._template = ChatTemplate(tokenizer)
        self.on_progress: Callable[[int], None] = lambda _: None
        self._stop_ids = EndTokens(model, tokenizer).ids
        if not self._stop_ids:
            raise DatasetError(
                "Neither the model nor its tokenizer names an end token, so answers would never end: set eos_token_id "
                "in the model's generation_config.json."
            )

    @property
    def fingerprint(self) -> str:
        """A digest of the model's weights and chat template. Models of one name differ in it."""
        return hashlib.sha256(f"{fingerprint(self._model)} {self._tokenizer.chat_template}".encode()).hexdigest()

    def refusal(self, messages: Sequence[Message]) -> str | None:
        """The reason why the chat template refuses a conversation; None if it accepts it.

        Args:
            messages: The conversation. It ends with a user's turn.
        """
        try:
            self._template.render(messages, answering=True)
        except DatasetError as error:
            return str(error)
        return None

    def learnable(self, conversation: Conversation) -> int:
        """Number of tokens that a training would learn from a conversation.

        Raises:
            DatasetError: The chat template doesn't fit the answers.
        """
        return sum(sum(sample.is_label) for sample in Labeller(self._tokenizer).samples(conversation))

    def answer(
        self, conversations: Sequence[Sequence[Message]], *, max_new_tokens: int, temperature: float, seed: int
    ) -> list[Written | None]:
        """The assistant's next message in each conversation; None if the model's context has no room for it.

        Args:
            conversations: Conversations that end with a user's turn.
            max_new_tokens: The most tokens of a message.
            temperature: Sampling temperature; 0 is greedy.
            seed: Seed of the random numbers.
        """
        texts = [self._template.render(messages, answering=True) for messages in conversations]
        return self._write(texts, self._stop_ids, max_new_tokens, temperature, seed)

    def user_turns(
        self, conversations: Sequence[Sequence[Message]], *, max_new_tokens: int, temperature: float, seed: int
    ) -> list[Written | None]:
        """The user's next message in each conversation, written by the model (Magpie, arXiv 2406.08464).

        The model continues the chat template's text up to the place where a user's message begins. Arguments are those
        of ``answer``. A message is None if the model's context has no room for it.
        """
        texts, ends = [], set()
        for messages in conversations:
            marked: list[Message] = [*messages, {"role": "user", "content": MARK}]
            before, found, after = self._template.render(marked, answering=False).partition(MARK)
            if not found:
                raise DatasetError(
                    "The chat template alters the text of user messages, so the model can't write prompts: give "
                    "`prompts`."
                )
            texts.append(before)
            ends.add(after.strip())
        stop_ids = {*self._stop_ids}
        for end in ends:
            first = self._tokenizer(end, add_special_tokens=False)["input_ids"][:1]
            stop_ids |= set(first) & set(self._template.special.values())
        written = self._write(texts, sorted(stop_ids), max_new_tokens, temperature, seed)
        # A template without special tokens ends a turn with ordinary text.
        return [_cut_at(turn, ends) if turn else None for turn in written]

    def _write(
        self, texts: Sequence[str], stop_ids: Sequence[int], max_new_tokens: int, temperature: float, seed: int
    ) -> list[Written | None]:
        limit = self._model.config.get_text_config().max_position_embeddings - max_new_tokens
        encoded = [self._tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        prompts = {place: ids for place, ids in enumerate(encoded) if len(ids) <= limit}
        if not prompts:
            return [None] * len(texts)
        rng = np.random.default_rng(seed)
        draws = rng.random((len(texts), max_new_tokens), np.float32)[list(prompts)] if temperature else None
        written = self._write_all([*prompts.values()], stop_ids, max_new_tokens, temperature, draws)
        found = dict(zip(prompts, written, strict=True))
        return [found.get(place) for place in range(len(texts))]

    def _write_all(
        self,
        prompts: Sequence[Sequence[int]],
        stop_ids: Sequence[int],
        max_new_tokens: int,
        temperature: float,
        draws: NDArray[np.float32] | None,
    ) -> list[Written]:
        batch = _Batch(self._model, prompts, pad=stop_ids[0])
        written: list[list[int]] = [[] for _ in prompts]
        stop = set(stop_ids)
        for place in range(max_new_tokens):
            rows = batch.rows
            uniform = None if draws is None else torch.from_numpy(draws[rows, place])
            tokens = _choose(batch.logits, temperature, uniform).tolist()
            for row, token in zip(rows, tokens, strict=True):
                written[row].append(token)
            self.on_progress(len(rows))
            running = [i for i, token in enumerate(tokens) if token not in stop]
            if not running or place + 1 == max_new_tokens:
                break
            batch.step(tokens, running)
        return [self._cut(row, stop) for row in written]

    def _cut(self, tokens: list[int], stop_ids: set[int]) -> Written:
        complete = tokens[-1] in stop_ids
        return Written(decoded(self._tokenizer, tokens[:-1] if complete else tokens), complete, tuple(tokens))


def _cut_at(turn: Written, ends: Iterable[str]) -> Written:
    """A turn up to the first of some ending texts that occurs in it; the whole turn if none does."""
    text = next((turn.text.partition(end)[0] for end in ends if end and end in turn.text), None)
    return turn if text is None else Written(text, True, turn.ids)


def _choose(logits: torch.Tensor, temperature: float, uniform: torch.Tensor | None) -> torch.Tensor:
    """Chooses a token per row: greedily, or by a uniform random number.

    Args:
        logits: [R, V].
        temperature: Sampling temperature. Not used for greedy choices.
        uniform: Random numbers in [0, 1), [R]; None for greedy choices.
    """
    if uniform is None:
        return logits.argmax(-1)
    heights = torch.softmax(logits.float() / temperature, dim=-1).cumsum(-1)
    drawn = uniform.to(logits.device).unsqueeze(1) * heights[:, -1:]
    return torch.searchsorted(heights, drawn, right=True).squeeze(1).clamp(max=logits.shape[1] - 1)


class _Batch:
    """Rows that are being written, left-padded. Rows that have ended are dropped.

    (transformers' ``generate`` computes every row until the last has ended, which takes several times as long.)

    Args:
        model: The model.
        prompts: Token ids of each row.
        pad: The token id for padding.

    Attributes:
        rows: Index of each remaining row among the prompts.
        logits: Logits of the next token of each remaining row, [R, V].
    """

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]], pad: int) -> None:
        width = max(map(len, prompts))
        ids = torch.full((len(prompts), width), pad)
        mask = torch.zeros_like(ids)
        for row, tokens in enumerate(prompts):
            ids[row, width - len(tokens) :] = torch.tensor(tokens)
            mask[row, width - len(tokens) :] = 1
        self._model = model
        self._cache_argument = cache_argument(model)
        self._mask = mask.to(model.device)
        self._cache = DynamicCache(config=model.config)
        self.rows = list(range(len(prompts)))
        positions = (self._mask.cumsum(-1) - 1).clamp(min=0)
        self.logits = self._run(ids.to(model.device), positions)

    def step(self, tokens: Sequence[int], running: Sequence[int]) -> None:
        """Appends a token to each row, and drops the rows that are not ``running``."""
        if len(running) < len(self.rows):
            kept = torch.tensor(running, device=self._mask.device)
            self._cache.batch_select_indices(kept)
            self._mask = self._mask[kept]
            self.rows = [self.rows[i] for i in running]
            tokens = [tokens[i] for i in running]
        positions = self._mask.sum(-1, keepdim=True)
        self._mask = torch.nn.functional.pad(self._mask, (0, 1), value=1)
        self.logits = self._run(torch.tensor(tokens, device=self._mask.device).unsqueeze(1), positions)

    @torch.inference_mode()
    def _run(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        output = self._model(
            input_ids=ids,
            attention_mask=self._mask,
            position_ids=positions,
            **{self._cache_argument: self._cache},
            use_cache=True,
            # An index tensor, not a number: with a slice of the hidden states, lm_head would be copied for each row.
            logits_to_keep=torch.tensor([ids.shape[1] - 1], device=ids.device),
        )
        logits: torch.Tensor = output.logits[:, -1]
        return logits
