"""Answers under JSON schemas of public suites: checks that each is valid, and that draft trees change none of them.

The suites are folders of JSON files: a schema per file, as JSONSchemaBench has them, or lists of cases with a
``schema`` each, as JSON-Schema-Test-Suite has them. For each schema that is drawn, an engine gives

- the greedy answer without a tree, and the one with a tree: both must be the same;
- sampled answers with seeds, with a tree;
- the greedy answer without the schema, to compare tokens per step.

Every answer that ends by itself must be valid. Lines that the file of results has are not computed again.
Without a bundle, a tiny random model answers.

    scripts/schemas.py jsonschemabench/data JSON-Schema-Test-Suite/tests/draft2020-12 --results tiny.jsonl
    scripts/schemas.py jsonschemabench/data --bundle bundle --results smollm2.jsonl
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jsonschema_rs
from tiny_bundle import bundle_folder

from medusa_runtime import Constraints, GenerationResult, Grammar, MedusaEngine, RequestError, SamplingParams

# Longer schemas are left out: their prompts would take most of the time.
MOST_CHARACTERS = 800


def schemas_of(folder: Path) -> Iterator[tuple[str, Any]]:
    """The schemas of a suite, with their names."""
    for path in sorted(folder.rglob("*.json")):
        data = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(data, list):
            for number, case in enumerate(data):
                yield f"{path.stem} {number}", case["schema"]
        else:
            yield f"{path.parent.name}/{path.stem}", data


def drawn(folders: Sequence[Path], count: int, seed: int) -> list[tuple[str, Any]]:
    """Draws schemas at random, as many from each suite as from the others."""
    choice = random.Random(seed)  # noqa: S311
    found = []
    for number, folder in enumerate(folders):
        fitting = [
            (name, schema)
            for name, schema in schemas_of(folder)
            if isinstance(schema, dict) and len(json.dumps(schema)) <= MOST_CHARACTERS
        ]
        share = count // len(folders) + (number < count % len(folders))
        found += choice.sample(fitting, min(share, len(fitting)))
    return found


def checked(engine: MedusaEngine, schema: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """Answers a prompt under a schema in several ways and returns the figures, as a JSON object.

    Args:
        engine: The engine.
        schema: The schema.
        arguments: The command line's arguments.
    """
    tree_size = arguments.tree_size
    try:
        constraints = Constraints(grammar=Grammar.json_schema(schema, one_line=arguments.one_line))
        chat = [{"role": "user", "content": f"Give an example of JSON that this schema allows:\n{json.dumps(schema)}"}]

        def answer(size: int, seed: int | None = None, given: Constraints | None = constraints) -> GenerationResult:
            sampling = None if seed is None else SamplingParams(temperature=1.0, seed=seed)
            return engine.generate(
                chat, max_new_tokens=arguments.tokens, tree_size=size, sampling=sampling, constraints=given
            )

        plain = answer(1)
    except RequestError as error:
        return {"refused": str(error)}
    tree = answer(tree_size)
    sampled = [answer(tree_size, seed) for seed in range(arguments.samples)]
    free = answer(tree_size, given=None)
    return {
        "same": plain.token_ids == tree.token_ids,
        "answers": [facts(schema, result) for result in (plain, tree, *sampled)],
        "with": [tree.stats.steps, len(tree.token_ids)],
        "without": [free.stats.steps, len(free.token_ids)],
    }


def facts(schema: dict[str, Any], result: GenerationResult) -> dict[str, Any]:
    """Returns if an answer has ended, and if it is valid."""
    if result.finish_reason != "stop":
        return {"ended": False}
    try:
        jsonschema_rs.validate(schema, json.loads(result.text, parse_float=finite))
    except (ValueError, jsonschema_rs.ValidationError) as error:
        return {"ended": True, "valid": False, "text": result.text, "error": str(error)[:300]}
    return {"ended": True, "valid": True}


def finite(text: str) -> float:
    """A number of JSON as the nearest finite float: the validator takes others for null."""
    return max(-sys.float_info.max, min(sys.float_info.max, float(text)))


def report(lines: Sequence[dict[str, Any]]) -> int:
    """Prints what was found; 1 if an answer was invalid or depended on the tree."""
    refused = Counter(reason(line["refused"]) for line in lines if "refused" in line)
    served = [line for line in lines if "refused" not in line]
    answers = [found for line in served for found in line["answers"]]
    invalid = [(line["name"], found) for line in served for found in line["answers"] if found.get("valid") is False]
    differing = [line["name"] for line in served if not line["same"]]
    print(f"{len(lines)} schemas, {len(served)} served, {refused.total()} refused:")
    for why, count in refused.most_common():
        print(f"  {count:4} {why}")
    ended = sum(found["ended"] for found in answers)
    print(f"{len(answers)} answers, {ended} ended by themselves, {len(invalid)} of them invalid")
    print(f"{len(differing)} greedy answers depend on the tree")
    for name in ("with", "without"):
        steps, tokens = (sum(line[name][place] for line in served) for place in (0, 1))
        print(f"tokens per step {name} a schema: {(tokens - len(served)) / max(steps, 1):.2f}")
    for name, found in invalid:
        print(f"invalid: {name}: {found['text']!r:.200}: {found['error']}")
    print(*(f"depends on the tree: {name}" for name in differing), sep="\n")
    return int(bool(invalid or differing))


def reason(message: str) -> str:
    """A refusal without what names one schema."""
    return re.sub(r"[\"'`{\[].*", "…", message.partition("\n")[0].removeprefix("The grammar can't be followed: "))


def main() -> None:
    """Runs all schemas and prints what they have shown."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("suites", nargs="+", type=Path, help="Folders of schemas.")
    parser.add_argument("--bundle", type=Path, help="The bundle. Default: a tiny random model.")
    parser.add_argument("--results", type=Path, required=True, help="File that gets a line per schema.")
    parser.add_argument("--count", type=int, default=200, help="Schemas, as many of each suite. Default: 200.")
    parser.add_argument("--tokens", type=int, default=96, help="The most tokens of an answer. Default: 96.")
    parser.add_argument("--tree-size", type=int, default=8, help="Nodes of the tree. Default: 8.")
    parser.add_argument("--samples", type=int, default=2, help="Sampled answers per schema. Default: 2.")
    parser.add_argument("--one-line", action="store_true", help="Fix the white space, as the server does.")
    parser.add_argument("--seed", type=int, default=0, help="Chooses the schemas. Default: 0.")
    arguments = parser.parse_args()
    chosen = drawn(arguments.suites, arguments.count, arguments.seed)
    arguments.results.touch()
    lines = [json.loads(line) for line in arguments.results.read_text(encoding="utf-8").splitlines()]
    known = {line["name"] for line in lines}
    with (
        bundle_folder(arguments.bundle, tokenizer=True, all_bytes=True) as folder,
        MedusaEngine.load(folder, threads=1, measure=False) as engine,
        arguments.results.open("a", encoding="utf-8") as file,
    ):
        for name, schema in chosen:
            if name in known:
                continue
            line = {"name": name, **checked(engine, schema, arguments)}
            file.write(json.dumps(line) + "\n")
            file.flush()
            lines.append(line)
    sys.exit(report(lines))


if __name__ == "__main__":
    main()
