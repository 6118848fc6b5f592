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

# JSON of these tokenizers, an object a line
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

# Of each kind of model, with what tokenizers of that kind have besides.
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
    """Makes the folder of undamaged files: a bundle, an engine, other tokenizers, and what the exporter reads."""
    target.mkdir(parents=True)
    shutil.copytree(bundle, target / "bundle")
    folder = target / "bundle"
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
    opened = Bundle.load(folder)
    engine = target / "engine"
    engine.mkdir()
    carried = [DESCRIPTION, *(name for name in opened.files if name not in (*GRAPHS, WEIGHTS))]
    for name in carried:
        (engine / name).parent.mkdir(exist_ok=True)
        shutil.copy(folder / name, engine / name)
    (engine / ENGINE).write_bytes(b"not read before a GPU is there")
    compiled = CompiledEngine(
        folder=engine,
        flavor="tensorrt",
        version="10.0",
        targets=("sm89",),
        bundle_sha256=FileFacts.of(folder / DESCRIPTION).sha256,
        limits=EngineLimits(2, 128, 32),
        profiles=(Profile("decode", (1, 1, 2), (1, 4, 9)),),
        layers={"MATRIX_MULTIPLY": 3},
        files={name: FileFacts.of(engine / name) for name in [ENGINE, *carried]},
    )
    (engine / "engine.json").write_text(compiled.to_json(opened))
    for name, state in TOKENIZERS.items():
        (target / "tokenizers" / name).mkdir(parents=True)
        (target / "tokenizers" / name / "tokenizer.json").write_text(json.dumps(state))
        added = {str(i): {"content": f"<{i}>", "special": i == 8} for i in (8, 9)}
        config = {
            "added_tokens_decoder": added,
            "chat_template": [{"name": "default", "template": TOOL_TEMPLATE}],
            "clean_up_tokenization_spaces": True,
            "extra_special_tokens": {"x_token": "<x>"},
        }
        (target / "tokenizers" / name / "tokenizer_config.json").write_text(json.dumps(config))
    (target / "exporter").mkdir()
    calibration = {
        "model": "m",
        "heads": "h",
        "positions": 9,
        "accuracies": [[0.5, 0.2], [0.4, 0.1]],
        "guess_share": 0.1,
        "paths": [[[0], 0.5], [[0, 0], 0.3]],
        "guessed": [[[0], 0.9], [[0, 0, 0], 0.4]],
    }
    (target / "exporter" / "calibration.json").write_text(json.dumps(calibration))
    (target / "exporter" / "tree.json").write_text("[[0], [1], [0, 0], [0, 1]]")


def list_files(folder: Path, damaged: str) -> None:
    """Makes the descriptions in a folder true of a damaged file, but for one that is damaged itself."""
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
