"""Makes small tokenizers of all kinds."""

from __future__ import annotations

import json
from collections.abc import Callable

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

SENTENCES = [
    "The quick brown fox jumps over the lazy dog, and doesn't stop. It's fun!",
    "Ein Märchen über Größe: naïve café — 42 %, e\u0301tude.",
    "今日は良い天気ですね。漢字とかな。",
    "Smile 😀 and the family 👨‍👩‍👧‍👦, flags 🇩🇪🇯🇵 too.",
    "def f(x):\n    return x + 1\n\n\tprint('hello  world')",
]


def byte_level() -> tokenizers.Tokenizer:
    """Byte-level BPE, as in GPT-2 and Llama 3."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<s>", "</s>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(SENTENCES, trainer)
    backend.add_tokens([AddedToken("<think>", normalized=False), AddedToken("  ", normalized=False), "é é"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return backend


def byte_fallback() -> tokenizers.Tokenizer:
    """BPE over ▁ with byte tokens, as in Llama 2 and Mistral."""
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=380, special_tokens=specials, initial_alphabet=["▁"], limit_alphabet=40, show_progress=False
    )
    backend.train_from_iterator([text.replace(" ", "▁") for text in [*SENTENCES, "    " * 5]], trainer)
    # The trainer makes byte tokens added tokens. They belong only to the vocabulary, so remove them from the others.
    state = json.loads(backend.to_str())
    state["added_tokens"] = state["added_tokens"][:3]
    backend = tokenizers.Tokenizer.from_str(json.dumps(state))
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return backend


def unigram() -> tokenizers.Tokenizer:
    """Unigram with a Metaspace decoder, as in T5-like tokenizers."""
    backend = tokenizers.Tokenizer(models.Unigram())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=150, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(SENTENCES, trainer)
    return backend


def word_piece() -> tokenizers.Tokenizer:
    """WordPiece. Its decoder does not clean up spaces; the configuration does."""
    backend = tokenizers.Tokenizer(models.WordPiece(unk_token="<unk>"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(
        vocab_size=260, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=list(".?!,'"), show_progress=False
    )
    backend.train_from_iterator(SENTENCES, trainer)
    return backend


def plain_words() -> tokenizers.Tokenizer:
    """Whole words without a decoder, so that tokens are joined by spaces."""
    words = [
        "<unk>",
        "<s>",
        "</s>",
        *sorted(set(" ".join(SENTENCES).split())),
        *("'", ".", "?", "!", ",", "n't", "s", "'t", "'s", "'m", "'ve", "'re", "n", "m", "ve"),
    ]
    backend = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return backend


def suffixed() -> tokenizers.Tokenizer:
    """BPE with an end-of-word suffix and the decoder for it."""
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.BPEDecoder()
    trainer = trainers.BpeTrainer(
        vocab_size=220, special_tokens=["<unk>", "<s>", "</s>"], end_of_word_suffix="</w>", show_progress=False
    )
    backend.train_from_iterator(SENTENCES, trainer)
    return backend


KINDS: dict[str, Callable[[], tokenizers.Tokenizer]] = {
    "byte_level": byte_level,
    "byte_fallback": byte_fallback,
    "unigram": unigram,
    "word_piece": word_piece,
    "plain_words": plain_words,
    "suffixed": suffixed,
}
