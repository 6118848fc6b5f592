"""The tokens that end an answer: each source counts, and a template's own end is found in every shape of template."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

from medusa_export.cli import main
from medusa_export.common.errors import ExportError
from medusa_export.models.end_tokens import EndTokens, _added_tokens, _renderer, template_end
from medusa_export.models.generation_settings import kept_settings, settings_warnings, unapplied
from medusa_export.verification.bundle import verify_bundle
from medusa_export.verification.plan import VerifyOptions
from medusa_export.verification.reference import reference_tokens
from medusa_runtime import Bundle, MedusaEngine, Tree
from support.decoding import make_step
from support.template_texts import CHATML, LLAMA2
from support.tiny_models import tiny_model
from support.tiny_tokenizer import make_tokenizer
from support.tokenizer_kinds import byte_level


def turns(user: str, assistant: str, opening: str, *, start: str = "", end: str = "", system: str = "") -> str:
    """A template that puts these around the words of a turn, with ``~`` where the words are."""
    parts = {"user": user.split("~"), "assistant": assistant.split("~"), "system": (system or user).split("~")}
    roles = "".join(
        "{% " + ("if" if i == 0 else "elif") + f" m.role == '{role}' %}}{before}{{{{ m.content | trim }}}}{after}"
        for i, (role, (before, after)) in enumerate(parts.items())
    )
    closed = f"{{% if add_generation_prompt %}}{opening}{{% else %}}{end}{{% endif %}}"
    return f"{start}{{% for m in messages %}}{roles}{{% endif %}}{{% endfor %}}{closed}"


CHATML_DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}" + CHATML
)
GPT_OSS = (
    "<|start|>system<|message|>You answer.<|end|>{% for m in messages %}{% if m.role == 'system' %}"
    "<|start|>developer<|message|>{{ m.content }}<|end|>{% elif m.role == 'assistant' %}"
    "<|start|>assistant<|channel|>final<|message|>{{ m.content }}"
    "{% if loop.last and not add_generation_prompt %}<|return|>{% else %}<|end|>{% endif %}"
    "{% else %}<|start|>user<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
QWEN3 = CHATML.replace(
    "message['content'] +",
    "('<think>\n\n</think>\n\n' if message.role == 'assistant' and loop.last else '') + message['content'] +",
)
LLAMA3 = turns(
    "<|start_header_id|>user<|end_header_id|>\n\n~<|eot_id|>",
    "<|start_header_id|>assistant<|end_header_id|>\n\n~<|eot_id|>",
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    start="<|begin|>",
    system="<|start_header_id|>system<|end_header_id|>\n\n~<|eot_id|>",
)
TEMPLATES: dict[str, tuple[str, str | None]] = {
    "chatml": (CHATML, "<|im_end|>"),
    "chatml with a system message of its own": (CHATML_DEFAULT_SYSTEM, "<|im_end|>"),
    "chatml that always opens an answer": (CHATML.replace("add_generation_prompt", "true"), "<|im_end|>"),
    "qwen 3": (QWEN3, "<|im_end|>"),
    "llama 2": (LLAMA2, "</s>"),
    "llama 3": (LLAMA3, "<|eot_id|>"),
    "mistral": (turns("[INST] ~[/INST]", " ~</s>", "", start="<s>", system="[SYS]~[/SYS]"), "</s>"),
    "gemma": (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        + turns("<start_of_turn>user\n~<end_of_turn>\n", "<start_of_turn>model\n~<end_of_turn>\n",
                "<start_of_turn>model\n", start="<s>"),
        "<end_of_turn>",
    ),
    "phi 3": (
        turns("<|user|>\n~<|end|>\n", "<|assistant|>\n~<|end|>\n", "<|assistant|>\n", end="</s>",
              system="<|system|>\n~<|end|>\n"),
        "<|end|>",
    ),
    "zephyr, whose headers are words": (turns("<u>\n~</s>\n", "<a>\n~</s>\n", "<a>\n"), "</s>"),
    "vicuna": (turns("USER: ~ ", "ASSISTANT: ~</s>", "ASSISTANT:", start="A chat. ", system="~ "), "</s>"),
    "command": (
        turns("<|START|><|USER|>~<|END_TURN|>", "<|START|><|BOT|><|START_RESPONSE|>~<|END_RESPONSE|><|END_TURN|>",
              "<|START|><|BOT|>", start="<s>", system="<|START|><|SYSTEM|>~<|END_TURN|>"),
        "<|END_RESPONSE|>",  # <|END_TURN|> if another source names it, which Cohere's does
    ),
    "deepseek": (turns("<|User|>~", "<|Assistant|>~<|sentence_end|>", "<|Assistant|>", start="<s>", system="~"),
                 "<|sentence_end|>"),
    "gpt-oss, which ends the last turn in its own way": (GPT_OSS, "<|return|>"),
    "glm, in which only the next header ends a turn": (
        turns("<|user|>\n~", "<|assistant|>\n~", "<|assistant|>\n", system="<|system|>\n~"), None),
    "an opening that is always there, and no end": (
        turns("<|user|>\n~", "<|assistant|>\n~", "<|assistant|>\n", end="<|assistant|>\n", system="<|system|>\n~"),
        None),
    "an end between turns alone": (
        turns("<|user|>~", "<|assistant|>~{% if not loop.last %}</s>{% endif %}", "<|assistant|>"), "</s>"),
    "words": (turns("### User: ~\n", "### Answer: ~\n", "### Answer:"), None),
    "no answers": ("{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}", None),
    "a refusal of everything": ("{{ raise_exception('no') }}", None),
    "a tokenizer's own error": ("{{ messages.nothing.at.all }}", None),
}  # fmt: skip
NAMES = """
<|end|> <|return|> <|start|> <|message|> <|channel|> <|user|> <|assistant|> <|system|> <|eot_id|> <|begin|>
<|start_header_id|> <|end_header_id|> [INST] [/INST] <start_of_turn> <end_of_turn> <|START|> <|USER|> <|BOT|>
<|SYSTEM|> <|END_TURN|> <|START_RESPONSE|> <|END_RESPONSE|> <|User|> <|Assistant|> <|sentence_end|>
"""


def tokenizer_of(template: str, **named: str) -> PreTrainedTokenizerFast:
    backend = byte_level()
    backend.add_special_tokens(NAMES.split())
    tokens = {"bos_token": "<s>", "eos_token": "</s>", **named}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **tokens)
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_a_template_puts_behind_an_answer(name: str) -> None:
    template, expected = TEMPLATES[name]
    tokenizer = tokenizer_of(template)
    found = template_end(_renderer(tokenizer), _added_tokens(tokenizer), set())
    assert (None if found is None else tokenizer.convert_ids_to_tokens(found)) == expected


def test_a_token_that_another_source_names_is_the_one_meant() -> None:
    tokenizer = tokenizer_of(TEMPLATES["command"][0])
    token = tokenizer.convert_tokens_to_ids("<|END_TURN|>")
    assert template_end(_renderer(tokenizer), _added_tokens(tokenizer), {token}) == token


def model_of(generation: Any, config: Any, vocab_size: int = 500) -> Any:
    model = tiny_model("llama", vocab_size=vocab_size)
    model.config.eos_token_id = config
    model.generation_config.eos_token_id = generation
    return model


def test_all_sources_count_and_are_named() -> None:
    tokenizer = tokenizer_of(CHATML)
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in ("</s>", "<|im_end|>", "<|eot_id|>", "<|end|>")}
    ends = EndTokens(model_of([ids["<|eot_id|>"], ids["</s>"]], ids["<|end|>"]), tokenizer)
    assert {token.text: token.sources for token in ends.found} == {
        "<|eot_id|>": ("generation config",),
        "</s>": ("generation config", "tokenizer"),
        "<|end|>": ("config",),
        "<|im_end|>": ("chat template",),
    }
    assert set(ends.ids) == set(ids.values())
    assert [warning.split(" ends")[0] for warning in ends.warnings] == [
        f"<|end|> ({ids['<|end|>']})", f"<|im_end|> ({ids['<|im_end|>']})",
    ]  # fmt: skip


def test_sources_that_agree_are_no_reason_to_warn() -> None:
    tokenizer = tokenizer_of(CHATML, eos_token="<|im_end|>")
    end = tokenizer.eos_token_id
    for generation, config in ((end, end), ([end], None), (None, end), (None, None), ([end, 1], 1)):
        ends = EndTokens(model_of(generation, config), tokenizer)
        assert ends.warnings == []
        assert end in ends.ids


def test_a_model_without_a_tokenizer() -> None:
    ends = EndTokens(model_of([3, 4], 3), None)
    assert [(token.id, token.text, token.sources) for token in ends.found] == [
        (3, None, ("generation config", "config")), (4, None, ("generation config",)),
    ]  # fmt: skip


@pytest.mark.parametrize("value", [[2, None], [None, 2, 2], [2.0], (2,), 2, [None, 2, 500], [2, -1], [2, 10**30]])
def test_entries_that_are_no_tokens_are_left_out(value: Any) -> None:
    ends = EndTokens(model_of(value, None), None)
    assert ends.ids == (2,)
    assert all(type(token) is int for token in ends.ids)
    assert len(ends.warnings) == any(entry in (500, -1, 10**30) for entry in (value if isinstance(value, list) else []))


@pytest.mark.parametrize(
    "value", [["</s>"], "</s>", True, [2, False], 2.5, [float("nan")], [float("inf")], [[2]], {"a": 2}]
)
def test_entries_of_other_kinds_are_refused(value: Any) -> None:
    """In a config transformers refuses them by itself."""
    with pytest.raises(ExportError, match="The generation config's eos_token_id holds"):
        EndTokens(model_of(value, None), None)


# The commands


def save_chat_model(folder: Path, **generation: Any) -> None:
    """A model whose files name <eos>, and whose template ends answers with another token."""
    model = tiny_model("llama")
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["#"]})  # a token that the model emits
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}#\n{% endfor %}<assistant>"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings = {"eos_token_id": 0, **generation}
    (folder / "generation_config.json").write_text(json.dumps(settings))


SETTINGS = {
    "temperature": 0.6,  # with the next one it is refused where transformers saves it
    "do_sample": False,
    "repetition_penalty": 1.1,
    "suppress_tokens": [5, 6],
    "no_repeat_ngram_size": 0,
    "min_new_tokens": 3,
    "bad_words_ids": [[7]],
    "max_new_tokens": 99,
}


@dataclass
class Exported:
    model: Path
    bundle: Bundle
    output: str


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """That model with settings and bad end tokens, exported by the command."""
    folder = tmp_path_factory.mktemp("chat")
    save_chat_model(folder / "model", **(SETTINGS | {"eos_token_id": [0, None, 5000]}))
    arguments = ["onnx", str(folder / "model"), "--no-heads", "--greedy-only", "-o", str(folder / "bundle"), "-q"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    return Exported(folder / "model", Bundle.load(folder / "bundle"), result.output)


def inspected(folder: Path, *options: str) -> str:
    result = CliRunner(env={"COLUMNS": "200"}).invoke(main, ["inspect", str(folder), *options])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.slow
def test_export_says_where_sources_disagree_and_inspect_shows_them(exported: Exported) -> None:
    assert "warning: The generation config names the end token 5000, which the model can't emit" in exported.output
    words = "warning: # (3) ends an answer by the chat template, but not by the model's generation config"
    assert words in exported.output
    shown = inspected(exported.bundle.folder)
    assert "<eos> (0), by the generation config, the tokenizer" in shown
    assert "# (3), by the chat template" in shown


@pytest.mark.slow
def test_an_answer_ends_where_its_template_does(exported: Exported) -> None:
    """In the engine, in transformers as verify runs it, and by verify."""
    with MedusaEngine.load(exported.bundle.folder, threads=1) as engine:
        assert set(engine.bundle.model.eos_token_ids) == {0, 3}
        prompts = [[a, b] for a in range(5, 30) for b in (40, 50)]
        answers = [engine.generate(prompt, max_new_tokens=40) for prompt in prompts]
    ended = [answer for answer in answers if answer.token_ids[-1] == 3]
    assert ended, "no answer had the token"
    assert all(answer.finish_reason == "stop" for answer in ended)
    assert not any(3 in answer.token_ids[:-1] for answer in answers)
    step = make_step(AutoModelForCausalLM.from_pretrained(exported.model), None, Tree())
    place = answers.index(min(ended, key=lambda answer: len(answer.token_ids)))
    assert tuple(reference_tokens(step, prompts[place], 40, (0, 3))) == answers[place].token_ids
    checked = verify_bundle(
        exported.bundle, step, [prompts[place]], VerifyOptions(max_new_tokens=40, prefill_chunks=(5,))
    )
    assert checked.passed


def test_settings_that_decoding_drops_are_said_and_kept(exported: Exported) -> None:
    listed = "bad_words_ids=[[7]], min_new_tokens=3, repetition_penalty=1.1, suppress_tokens=[5, 6]"
    assert f"sets {listed}. Decoding does not apply these" in exported.output
    assert "sampling" not in exported.output
    assert SETTINGS.items() <= exported.bundle.generation.items()
    folder = exported.bundle.folder
    assert json.loads(inspected(folder, "--json"))["generation"] == exported.bundle.generation
    assert "repetition_penalty=1.1, of the generation config" in inspected(folder)
    assert json.loads((folder / "generation_config.json").read_text())["repetition_penalty"] == 1.1


def test_a_model_that_asks_for_sampling() -> None:
    settings = kept_settings(GenerationConfig(do_sample=True, temperature=0.6, top_p=0.9, repetition_penalty=1.0))
    assert settings == {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.0}
    [warning] = settings_warnings(settings)
    assert "asks for sampling (temperature=0.6, top_p=0.9). Requests are greedy unless they ask for it" in warning
    assert settings_warnings(kept_settings(GenerationConfig(do_sample=False, temperature=0.6))) == []
    assert (kept_settings(None), settings_warnings({})) == ({}, [])


def test_settings_that_json_lacks_are_kept_as_text() -> None:
    generation = GenerationConfig(sequence_bias=None)
    generation.own_setting = float("inf")
    assert kept_settings(generation) == {"own_setting": "inf"}


def test_every_setting_of_transformers_is_known() -> None:
    """A setting that is new there counts as one that is not applied. The list must not name one without effect."""
    defaults = GenerationConfig().to_dict()
    changing = {
        "bad_words_ids", "begin_suppress_tokens", "constraints", "diversity_penalty", "dola_layers", "early_stopping",
        "encoder_no_repeat_ngram_size", "encoder_repetition_penalty", "epsilon_cutoff", "eta_cutoff",
        "exponential_decay_length_penalty", "force_words_ids", "forced_bos_token_id", "forced_eos_token_id",
        "guidance_scale", "length_penalty", "min_length", "min_new_tokens", "no_repeat_ngram_size", "num_beam_groups",
        "num_beams", "penalty_alpha", "remove_invalid_values", "renormalize_logits", "repetition_penalty",
        "sequence_bias", "stop_strings", "suppress_tokens", "token_healing", "top_h", "typical_p",
        "watermarking_config",
    }  # fmt: skip
    names = {name for name in defaults if not name.startswith("_")}
    assert changing & names == set(unapplied(dict.fromkeys(names, "set")))


def test_end_tokens_that_are_none_are_refused_before_work_begins(tmp_path: Path) -> None:
    save_chat_model(tmp_path / "model", eos_token_id=[0, "x"])
    result = CliRunner().invoke(main, ["onnx", str(tmp_path / "model"), "--no-heads", "-o", str(tmp_path / "bundle")])
    assert result.exit_code == 1
    assert "error: The generation config's eos_token_id holds 'x'" in result.output
    assert "writing" not in result.output and not (tmp_path / "bundle").exists()


def test_older_bundles_have_no_sources(exported: Exported, tmp_path: Path) -> None:
    folder = tmp_path / "older"
    shutil.copytree(exported.bundle.folder, folder)
    data = json.loads((folder / "medusa.json").read_text())
    del data["end_tokens"], data["generation"]
    (folder / "medusa.json").write_text(json.dumps(data))
    loaded = Bundle.load(folder)
    assert loaded == replace(exported.bundle, folder=folder, end_tokens=(), generation={})
    assert "token 3, by the model's configuration" in inspected(folder)
