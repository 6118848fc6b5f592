"""The objects that stages share: their options, their report, and a random model where no other is at hand."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from medusa_export.common.files import write_text

CHAT_TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message['role'] }} {{ message['content'] }}<|end|> {% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant {% endif %}"
)
_SPECIAL = ("<pad>", "<|start|>", "<|end|>")
_VOCAB_SIZE, _SMALL_VOCAB_SIZE = 49152, 300


@dataclass
class Context:
    """The options of a stage, and its report.

    Attributes:
        device: The device to run on; on ``cpu`` sizes are small and times mean nothing.
        folder: The folder of reports and of what stages make.
        name: The name of the stage.
        model: The base model: a folder or a GGUF file; None for a random model.
        heads: Its heads; None for untrained ones.
        bundle: A bundle that was exported before; None to export one.
        seconds: The time that a measurement of throughput should take.
        report: The findings so far.
    """

    device: torch.device
    folder: Path
    name: str
    model: str | None = None
    heads: str | None = None
    bundle: Path | None = None
    seconds: float = 60.0
    report: dict[str, Any] = field(default_factory=dict)

    @property
    def is_dry(self) -> bool:
        """True if sizes are small: the run proves that the stage works, and measures nothing."""
        return self.device.type != "cuda"

    def note(self, **facts: Any) -> None:
        """Adds findings and writes the report, so that what was found outlasts a stage that is stopped."""
        self.report |= facts
        write_text(self.folder / f"{self.name}.json", json.dumps(self.report, indent=1) + "\n")

    def base_model(self) -> str:
        """The base model: the given one, or a random one of the sizes of SmolLM2-135M, which is made once."""
        if self.model is not None:
            return self.model
        folder = self.folder / "random-model"
        if not (folder / "config.json").exists():
            make_model(small=self.is_dry).save_pretrained(folder)
            make_tokenizer(small=self.is_dry).save_pretrained(folder)
        return str(folder)


class Stopwatch:
    """Measures the seconds of a block: ``with Stopwatch() as watch: ...``, then ``watch.seconds``."""

    seconds = 0.0

    def __enter__(self) -> Stopwatch:
        self._started = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._started


def make_model(*, small: bool) -> PreTrainedModel:
    """Makes a Llama with random weights. It never writes a special token, so its answers don't end.

    Args:
        small: A few channels; otherwise the sizes of SmolLM2-135M.
    """
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    if not small:
        sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
    config = AutoConfig.for_model(
        "llama",
        **sizes,
        num_key_value_heads=sizes["num_attention_heads"] // (2 if small else 3),
        vocab_size=_SMALL_VOCAB_SIZE if small else _VOCAB_SIZE,
        max_position_embeddings=512 if small else 2048,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=_SPECIAL.index("<|end|>"),
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        weight = model.get_output_embeddings().weight.normal_()
        weight[: len(_SPECIAL)] = 0
    return model


def make_tokenizer(*, small: bool) -> PreTrainedTokenizerFast:
    """Makes a tokenizer for ``make_model``: a word for each token, with a chat template."""
    words = [*_SPECIAL, "system", "user", "assistant"]
    words += [f"w{place}" for place in range(len(words), _SMALL_VOCAB_SIZE if small else _VOCAB_SIZE)]
    vocab = {word: place for place, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=words[-1]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special: dict[str, Any] = {
        "pad_token": _SPECIAL[0],
        "eos_token": _SPECIAL[2],
        "additional_special_tokens": [_SPECIAL[1]],
    }
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    fast.chat_template = CHAT_TEMPLATE
    return fast


def write_prompts(target: Path, count: int) -> Path:
    """Writes prompts for ``make_model``, one per line: different words of its tokenizer."""
    numbers = ((line, line // 290, *range(line, line + 8)) for line in range(count))
    write_text(target, "".join(" ".join(f"w{6 + number % 290}" for number in line) + "\n" for line in numbers))
    return target
