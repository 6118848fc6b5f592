"""The undamaged files that ``fuzz_files.py`` damages."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

from medusa_runtime import Bundle
from medusa_runtime.bundles.bundle import DESCRIPTION, ENGINE_DESCRIPTION, GRAPHS, WEIGHTS
from medusa_runtime.bundles.compiled import ENGINE, CompiledEngine, EngineLimits, Profile
from medusa_runtime.bundles.listed_folder import FileFacts

HUGE = 2**24  # bytes that no file of a tiny bundle has
TOOL_TEMPLATE = """{%- set ns = namespace(last=0) %}
{%- if tools %}{{ '<|tools|>' }}{% for tool in tools %}{{ tool | tojson(indent=2) }}{% endfor %}{% endif %}
{%- macro show(message) %}{{ '<|' ~ message.role ~ '|>' }}{{ message['content'] | trim }}{% endmacro %}
{%- for message in messages if message.role != 'tool' %}
{%- if message.role == 'system' and loop.first %}{% set system = message.content %}{% continue %}{% endif %}
{{ show(message) }}{% if not loop.last %}{{ ', ' }}{% endif %}
{%- set ns.last = loop.index0 %}
{%- endfor %}
{{ messages[1:] | map(attribute='role') | join('+') }}{{ '%s of %d' % (ns.last, messages | length) }}
{%- if add_generation_prompt %}{% generation %}<|assistant|>{% endgeneration %}{% endif %}
"""

# Parts that the tokenizers share.
_TOKEN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
_LETTERS = list("abcdefghijklmnopqrstuvwxyz ,.'")
_SHARED = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [{"id": 0, "content": "<unk>", **_TOKEN}],
}
_VOCAB = {
    token: i
    for i, token in enumerate(["<unk>", *(f"<0x{byte:02X}>" for byte in range(64)), *_LETTERS, "he", "▁", "▁the"])
}

# A tokenizer of each kind of model, with the normalizers, decoders etc. that are usual for the kind.
TOKENIZERS = {
    "bytes": _SHARED
    | {
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"Regex": "(?i:'s|'t)|\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}]+|\\s+"},
            "behavior": "Isolated",
            "invert": False,
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<unk>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<unk>": {"id": "<unk>", "ids": [0], "tokens": ["<unk>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": _VOCAB,
            "merges": [["h", "e"]],
        },
    },
    "pieces": _SHARED
    | {
        "normalizer": {"type": "NFKC"},
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
        "post_processor": None,
        "decoder": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
        "model": {
            "type": "Unigram",
            "unk_id": 0,
            "byte_fallback": False,
            "vocab": [[token, -1.5 - i / 9] for i, token in enumerate(_VOCAB)],
        },
    },
    "words": _SHARED
    | {
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": None,
            "lowercase": True,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {"type": "BertProcessing", "sep": ["<unk>", 0], "cls": ["<unk>", 0]},
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": "<unk>",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": {
                token: i for i, token in enumerate(["<unk>", *_LETTERS, *("##" + letter for letter in _LETTERS)])
            },
        },
    },
}


def prepare(bundle: Path, target: Path) -> None:
    """Makes the folder of undamaged files: a bundle, an engine, more tokenizers, and files that the exporter reads."""
    target.mkdir(parents=True)
    shutil.copytree(bundle, target / "bundle")
    _complete_bundle(target / "bundle")
    _make_engine(target / "engine", Bundle.load(target / "bundle"))
    for name, state in TOKENIZERS.items():
        _make_tokenizer(target / "tokenizers" / name, state)
    _make_exporter_inputs(target / "exporter")


def _complete_bundle(folder: Path) -> None:
    """Adds the optional files of a tokenizer to a bundle, and lists them."""
    (folder / "additional_chat_templates").mkdir(exist_ok=True)
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text(TOOL_TEMPLATE)
    (folder / "special_tokens_map.json").write_text(
        json.dumps({"eos_token": "<eos>", "sep_token": {"content": "<sep>"}})
    )
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {
        "additional_special_tokens": ["<a>", {"content": "<b>"}],
        "image_token": "<img>",
        "split_special_tokens": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    data = json.loads((folder / DESCRIPTION).read_text())
    data["files"] = {
        str(path.relative_to(folder)): asdict(FileFacts.of(path))
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (DESCRIPTION, ".medusa-latency.json")
    }
    (folder / DESCRIPTION).write_text(json.dumps(data))


def _make_engine(folder: Path, bundle: Bundle) -> None:
    """Makes the folder of a compiled engine. The engine itself is not read without a GPU."""
    folder.mkdir()
    carried = [DESCRIPTION, *(name for name in bundle.files if name not in (*GRAPHS, WEIGHTS))]
    for name in carried:
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(bundle.folder / name, folder / name)
    (folder / ENGINE).write_bytes(b"not read without a GPU")
    compiled = CompiledEngine(
        folder=folder,
        flavor="tensorrt",
        version="10.0",
        targets=("sm89",),
        bundle_sha256=FileFacts.of(bundle.folder / DESCRIPTION).sha256,
        limits=EngineLimits(2, 128, 32),
        profiles=(Profile("decode", (1, 1, 2), (1, 4, 9)),),
        layers={"MATRIX_MULTIPLY": 3},
        files={name: FileFacts.of(folder / name) for name in [ENGINE, *carried]},
    )
    (folder / ENGINE_DESCRIPTION).write_text(compiled.to_json(bundle))


def _make_tokenizer(folder: Path, state: dict[str, object]) -> None:
    """Makes the folder of a tokenizer, given the content of its ``tokenizer.json``."""
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text(json.dumps(state))
    config = {
        "added_tokens_decoder": {str(i): {"content": f"<{i}>", "special": i == 8} for i in (8, 9)},
        "chat_template": [{"name": "default", "template": TOOL_TEMPLATE}],
        "clean_up_tokenization_spaces": True,
        "extra_special_tokens": {"x_token": "<x>"},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def _make_exporter_inputs(folder: Path) -> None:
    """Makes a calibration and a tree."""
    folder.mkdir()
    calibration = {
        "model": "m",
        "heads": "h",
        "positions": 9,
        "accuracies": [[0.5, 0.2], [0.4, 0.1]],
        "guess_share": 0.1,
        "paths": [[[0], 0.5], [[0, 0], 0.3]],
        "guessed": [[[0], 0.9], [[0, 0, 0], 0.4]],
    }
    (folder / "calibration.json").write_text(json.dumps(calibration))
    (folder / "tree.json").write_text("[[0], [1], [0, 0], [0, 1]]")


def list_files(folder: Path, damaged: str) -> None:
    """Updates sizes and digests in a folder's descriptions after a file was damaged.

    Args:
        folder: The folder.
        damaged: Name of the damaged file. If it is a description, it is not updated.
    """
    for description in (DESCRIPTION, ENGINE_DESCRIPTION):
        path = folder / description
        if description == damaged or not path.is_file():
            continue
        data = json.loads(path.read_text())
        for name in data["files"]:
            if (folder / name).is_file() and (folder / name).stat().st_size < HUGE:
                data["files"][name] = asdict(FileFacts.of(folder / name))
        if "bundle" in data:
            data["bundle"]["sha256"] = data["files"][DESCRIPTION]["sha256"]
        path.write_text(json.dumps(data))
