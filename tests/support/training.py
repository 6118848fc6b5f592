"""A short training of a tiny model: its conversations, its command, and the figures that it writes."""

from __future__ import annotations

import json
from pathlib import Path

OPTIONS = ("--epochs", 2, "--batch-size", 32, "--conversations", 4, "--heldout", 0.2, "-q")


def write_talks(path: Path) -> Path:
    """Writes 40 conversations of one turn each. Returns the path."""
    with path.open("w") as file:
        for i in range(40):
            answer = f"The answer is {i % 7}, and that is all there is to say."
            messages = [{"role": "user", "content": f"Prompt {i}"}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


def train(model: Path, talks: Path, out: Path, *options: object) -> list[str]:
    """The arguments of a ``train`` command. It trains two fresh heads unless the options name other heads."""
    shape = () if "--heads" in options else ("--num-heads", 2)
    return [str(a) for a in ("train", model, "--data", talks, "-o", out, *OPTIONS, *shape, *options)]


def history(out: Path, name: str) -> list[dict[str, float]]:
    """The figures on held-out prompts that a stage wrote, ``training`` or ``joint``, in the order of its epochs."""
    return [entry for entry in json.loads((out / "training.json").read_text())[name] if "eval_loss" in entry]
