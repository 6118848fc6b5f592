"""A byte-level tokenizer for the models of ``tiny_models``."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def make_tokenizer(vocab_size: int = 101) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are <eos> and single bytes, printable ASCII first, up to the size of the vocabulary."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), key=lambda character: (not character.isascii(), character))
    vocab = {"<eos>": 0} | {character: i + 1 for i, character in enumerate(alphabet[: vocab_size - 1])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    fast.chat_template = CHAT_TEMPLATE
    return fast
