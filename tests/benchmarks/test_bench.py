"""The bench: its arithmetic on made-up answers, and the command on a tiny bundle."""

from __future__ import annotations

import io
import itertools
import json
import math
import mmap
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import gguf
import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from rich.console import Console

from medusa_export.benchmarks.contestants import (
    Contestant,
    Contestants,
    Generation,
    engine_contestant,
)
from medusa_export.benchmarks.peer_weights import StoredWeights, bundle_weights, genai_weights, gguf_weights
from medusa_export.benchmarks.peers import genai_contestant
from medusa_export.benchmarks.processor import processor
from medusa_export.benchmarks.prompts import bench_prompts
from medusa_export.benchmarks.report import as_markdown, as_table, earlier_report, own_weights, regressions
from medusa_export.benchmarks.speeds import by_category, race, speeds
from medusa_export.cli import main
from medusa_export.common.errors import CheckpointError, DatasetError
from medusa_runtime import Bundle, MedusaEngine
from medusa_runtime.bundles.facts import WeightFacts
from medusa_runtime.tuning import FIRST_ACCURACY
from support.script import load_script


def answer(tokens: int, seconds: float, steps: int, first: int = 7) -> Generation:
    return Generation((first, *range(tokens)), 0.1, seconds, steps)


def test_speeds() -> None:
    answers = {
        "plain": [[answer(10, 1.0, 10)], [answer(10, 2.0, 10)], [answer(10, 4.0, 10)]],
        "tree": [[answer(10, 0.5, 2)], [answer(10, 1.0, 5)], [answer(10, 4.0, 5)]],
        "other": [[answer(10, 1.0, 10, first=8)]] * 3,
    }
    found = speeds(answers, "plain")
    assert found["plain"].tokens_per_second == 5
    assert found["plain"].spread == (2.5, 10)
    assert found["plain"].speedup == found["plain"].overhead == 1
    assert found["tree"].speedup == 2  # the median of 2, 2 and 1
    assert found["tree"].tokens_per_step == 2  # the median of 5, 2 and 2
    assert found["tree"].overhead == 2  # the median of 2.5, 1 and 2
    assert found["tree"].identical
    assert not found["other"].identical


def test_categories() -> None:
    answers = {
        "plain": [[answer(10, 1.0, 10), answer(10, 1.0, 10)]],
        "tree": [[answer(10, 0.5, 4), answer(10, 2.0, 10)]],
    }
    figures = by_category(answers, ["a", "b"], "tree", "plain")
    assert figures["a"] == {"speedup": 2, "tokens_per_step": 2.5}
    assert figures["b"] == {"speedup": 0.5, "tokens_per_step": 1}
    assert "| a | 2.50 | 2.00x |" in as_markdown(speeds(answers, "plain"), figures)


def test_a_terminal_of_80_columns_cuts_nothing_off() -> None:
    answers = [[Generation((7, *range(10)), 0.9, 9.9, 10, nodes_per_step=5.95)]]
    measured = speeds({"onnxruntime-genai, int4": answers, "auto, no lookup": answers}, "auto, no lookup", {})
    figures = {name: replace(speed, memory_mib=1699) for name, speed in measured.items()}
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(as_table(figures))
    text = console.export_text()
    assert "…" not in text and "onnxruntime-genai" in text and "1699 MiB" in text
    assert "5.95" not in text and "5.95" in as_markdown(figures, {})


def test_everyone_answers_everything_after_everyone_else() -> None:
    order: list[str] = []

    def contestant(name: str) -> Contestant:
        def respond(prompt: list[int], count: int) -> Generation:
            order.append(name)
            return Generation(tuple(prompt * count), 0.1, 0.2, 2)

        return respond

    prompts = [[number] for number in range(12)]
    answers = race({n: contestant(n) for n in "abcd"}, "a", prompts, max_new_tokens=3, repeats=2)
    del order[: len(prompts)]  # the baseline's answers, whose lengths all take
    assert list(answers) == ["a", "b", "c", "d"]
    assert [[a.token_ids for a in repeat] for repeat in answers["b"]] == [[tuple(p * 3) for p in prompts]] * 2
    turns = [order[i : i + 4] for i in range(0, len(order), 4)]
    assert all(sorted(turn) == ["a", "b", "c", "d"] for turn in turns)
    assert {(x, y) for x, y in itertools.pairwise(order) if x != y} == set(itertools.permutations("abcd", 2))


def test_all_generate_as_many_tokens_as_the_baseline() -> None:
    def ends_early(prompt: list[int], count: int) -> Generation:
        return Generation(tuple(range(min(count, prompt[0]))), 0.1, 0.2, 2)

    def never_ends(_: list[int], count: int) -> Generation:
        return Generation(tuple(range(count)), 0.1, 0.2, 2)

    answers = race({"a": ends_early, "b": never_ends}, "a", [[3], [20]], max_new_tokens=9, repeats=1)
    assert [[len(answer.token_ids) for answer in repeat] for repeat in answers["b"]] == [[3, 9]]


def test_weights_of_peers() -> None:
    own = StoredWeights("int4, blocks of 32", same=False)
    answers = {"a": [[answer(10, 1.0, 10)]], "b": [[answer(10, 1.0, 10, first=8)]], "c": [[answer(9, 1.0, 9)]]}
    found = speeds(answers, "a", weights={"a": StoredWeights("fp32", same=True), "b": own})
    assert [found[name].comparable for name in "abc"] == [True, False, True]
    assert own_weights(found) == ["b has weights of its own (int4, blocks of 32), so its tokens may differ."]
    table = as_markdown(found, {})
    assert "| yes | same: fp32 |" in table and "| no | own: int4, blocks of 32 |" in table and "| NO |  |" in table


def test_the_weights_of_a_genai_model(tiny_bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "genai_config.json").write_text(json.dumps({"model": {"decoder": {"filename": "m.onnx"}}}))
    shutil.copy(tiny_bundle.graph, tmp_path / "m.onnx")
    assert genai_weights(tmp_path, tiny_bundle) == bundle_weights(tiny_bundle) == StoredWeights("fp32", same=True)
    assert not genai_weights(tmp_path, replace(tiny_bundle, dtype="float16")).same
    assert not genai_weights(tmp_path, replace(tiny_bundle, weights=WeightFacts(layers="int4"))).same
    node = onnx.helper.make_node("MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft", bits=4, block_size=64)
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([node], "g", [], [])), tmp_path / "m.onnx")
    assert genai_weights(tmp_path, tiny_bundle) == StoredWeights("int4, blocks of 64", same=False)
    for damage in ("m.onnx", "genai_config.json"):
        (tmp_path / damage).write_text("{}")
        with pytest.raises(CheckpointError, match="no model for onnxruntime-genai"):
            genai_weights(tmp_path, tiny_bundle)


@pytest.mark.parametrize(("kind", "same"), [("F32", True), ("Q8_0", False)])
def test_the_weights_of_a_gguf_file(tiny_bundle: Bundle, tmp_path: Path, kind: str, same: bool) -> None:
    file, stored = tmp_path / "m.gguf", gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_tensor("w", gguf.quants.quantize(np.ones((4, 64), np.float32), stored), raw_dtype=stored)
    writer.add_tensor("norm", np.ones(64, np.float32))
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    assert gguf_weights(file, tiny_bundle) == StoredWeights("fp32" if same else kind, same=same)
    file.write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match="can't be read as GGUF"):
        gguf_weights(file, tiny_bundle)


def test_the_processor_is_named(tmp_path: Path) -> None:
    facts = tmp_path / "cpuinfo"
    facts.write_text("processor\t: 0\nmodel name\t: A CPU\nflags\t\t: fpu avx avx2 avx_vnni\n")
    assert processor(facts).name == "A CPU"
    assert processor(facts).instructions == ("AVX2", "AVX-VNNI")
    assert processor(tmp_path / "none").instructions is None


class StandInGenai(ModuleType):
    """The part of onnxruntime-genai 0.18 that the bench uses: its sequence lacks the token that ends an answer."""

    STOP = 2

    class Config:
        def __init__(self, folder: str) -> None: ...

        def clear_providers(self) -> None: ...

    class Model:
        def __init__(self, config: object) -> None: ...

    class GeneratorParams:
        def __init__(self, model: object) -> None: ...

        def set_search_options(self, *, max_length: int, min_length: int, do_sample: bool) -> None:
            self.max_length = max_length

    class Generator:
        def __init__(self, model: object, params: StandInGenai.GeneratorParams) -> None:
            self.most, self.sequence, self.answer = params.max_length, [], [7, 8, 9, StandInGenai.STOP]

        def append_tokens(self, tokens: list[int]) -> None:
            self.sequence += tokens

        def generate_next_token(self) -> None:
            self.last = self.answer.pop(0)
            self.sequence += [self.last] if self.last != StandInGenai.STOP else []

        def get_next_tokens(self) -> list[int]:
            return [self.last]

        def get_sequence(self, row: int) -> list[int]:
            return self.sequence

        def is_done(self) -> bool:
            return self.last == StandInGenai.STOP or len(self.sequence) == self.most


def test_the_end_of_an_answer_is_one_of_its_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime_genai", StandInGenai("onnxruntime_genai"))
    contestant = genai_contestant(Path("model"), None)
    assert contestant([1, 1], 10).token_ids == (7, 8, 9, 2)
    assert contestant([1, 1], 3).token_ids == (7, 8, 9)
    assert contestant([1, 1], 10).steps == 3


def test_engines_learn_apart(tiny_bundle: Bundle) -> None:
    """Steps of one contestant are not those of another: without lookup easy ones are the heads' alone."""
    with MedusaEngine.load(tiny_bundle.folder) as engine:
        alone, both = (engine_contestant(engine, "auto", lookup=lookup) for lookup in (False, True))
        assert alone([5, 6, 7, 5, 6, 7], 24).token_ids == both([5, 6, 7, 5, 6, 7], 24).token_ids
        counted = engine._loop.sizes.choice
        assert counted.accuracy(hit=False) == counted.accuracy(hit=True) == FIRST_ACCURACY


def test_contestants_are_weighed() -> None:
    contestants = Contestants([1], max_new_tokens=3)
    kept: list[mmap.mmap] = []

    def heavy() -> Contestant:
        kept.append(mmap.mmap(-1, 1 << 26))  # memory from malloc may be some that the process has already
        kept[0].write(os.urandom(1 << 26))
        return lambda _, count: answer(count, 1.0, count)

    weights = StoredWeights("fp32", same=True)
    contestants.add("heavy", heavy, weights)
    contestants.add("light", lambda: lambda _, count: answer(count, 1.0, count), weights)
    assert contestants.memory["heavy"] >> 20 in range(60, 140)
    assert contestants.memory["light"] >> 20 < 20
    found = speeds({name: [[answer(10, 1.0, 10)]] for name in contestants.by_name}, "light", contestants.memory)
    assert found["heavy"].memory_mib == contestants.memory["heavy"] >> 20


def test_no_prompt_is_among_those_that_heads_are_trained_on() -> None:
    from medusa_export.training.conversations import Conversation

    def key(prompt: str) -> str:
        return Conversation(({"role": "user", "content": prompt},)).prompt_key

    trained_on = {key(prompt) for prompt in load_script("seed_prompts").prompts(2600)}
    assert len(trained_on) > 2000
    assert not trained_on & {key(prompt.prompt) for prompt in bench_prompts()}


def test_prompts(tmp_path: Path) -> None:
    prompts = bench_prompts()
    assert len({prompt.category for prompt in prompts}) >= 6
    assert len(set(prompts)) == len(prompts)
    for damaged in ('{"text": 1}', '{"prompt": ' + "[" * 10_000 + "]" * 10_000 + "}"):
        (tmp_path / "p").write_text(damaged)
        with pytest.raises(DatasetError, match="category and prompt"):
            bench_prompts(tmp_path / "p")


def test_an_earlier_report(tmp_path: Path) -> None:
    old = {"speedup": 1.5, "tokens_per_step": 2.0, "overhead": 1.3, "identical": True}
    (tmp_path / "old.json").write_text(json.dumps(old))
    assert regressions({**old, "speedup": math.nan}, earlier_report(tmp_path / "old.json"), 0.1)
    assert regressions({**old, "speedup": 1.4}, earlier_report(tmp_path / "old.json"), 0.1) == []
    assert regressions({**old, "speedup": 1.3}, earlier_report(tmp_path / "old.json"), 0.1) == [
        "speedup is 1.30, was 1.50"
    ]
    assert regressions({**old, "overhead": 1.5, "identical": False}, earlier_report(tmp_path / "old.json"), 0.1) == [
        "overhead is 1.50, was 1.30",
        "the tokens are no longer the same",
    ]


def test_the_command(tiny_bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"category": "a", "prompt": "Hello"}\n{"category": "b", "prompt": "World"}\n')
    arguments = [
        "bench", tiny_bundle.folder, "--prompts", tmp_path / "p.jsonl", "-n", 8, "--repeats", 1, "--tree-sizes", "3,9",
        "--json", tmp_path / "r.json", "--markdown", tmp_path / "r.md", "--plot", tmp_path / "r.png", "-q",
    ]  # fmt: skip
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == 0, (result.output, result.exception)
    report = json.loads((tmp_path / "r.json").read_text())
    assert {"speedup", "tokens_per_step", "overhead", "tree_size", "identical"} <= set(report)
    assert report["identical"]
    assert set(report["categories"]) == {"a", "b"}
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "old.json").write_text(json.dumps({**report, "tokens_per_step": 99}))
    result = CliRunner().invoke(main, [str(a) for a in (*arguments, "--compare", tmp_path / "old.json")])
    assert result.exit_code == 1
    assert "tokens per step is" in result.output
    # The report that is compared with may be the one that is written: it is read before.
    (tmp_path / "r.json").write_text(json.dumps({**report, "tokens_per_step": 99}))
    result = CliRunner().invoke(main, [str(a) for a in (*arguments, "--compare", tmp_path / "r.json")])
    assert result.exit_code == 1
    assert json.loads((tmp_path / "r.json").read_text())["tokens_per_step"] < 9
    result = CliRunner().invoke(main, [str(a) for a in (*arguments, "--compare", tmp_path / "none.json")])
    assert "is no report of" in result.output
    assert len(result.output.splitlines()) == 1  # before anything is measured
