"""Folders that take long to make and are only read: each is made once for all test processes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock

from medusa_export.step.step import MedusaStep
from medusa_runtime import Bundle, Tree
from support.decoding import export, make_step, random_heads
from support.tiny_models import tiny_model
from support.tiny_tokenizer import make_tokenizer


@dataclass(frozen=True)
class Exported:
    """A step, and the bundle that was exported from it."""

    step: MedusaStep
    bundle: Bundle


@dataclass(frozen=True)
class Stock:
    """The folders that test processes share.

    Attributes:
        root: The folder that holds them.
    """

    root: Path

    def folder(self, name: str, fill: Callable[[Path], object]) -> Path:
        """A folder by name. If it does not exist, ``fill`` makes it."""
        folder = self.root / name
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                part = self.root / f"{name}.part"
                fill(part)
                part.rename(folder)
        return folder

    def export(
        self,
        family: str = "llama",
        seed: int = 0,
        *,
        dtype: str = "float32",
        heads: bool = True,
        sampling: bool = True,
        **overrides: object,
    ) -> Exported:
        """Exports a random model with three random heads and a tree of nine nodes.

        A model without heads, or with ``overrides``, has no tokenizer.

        Args:
            family: Family of the model, see ``tiny_models``.
            seed: Seed of the weights.
            dtype: Type of the weights.
            heads: Whether the model has heads.
            sampling: Whether the graph can sample.
            overrides: Values of the model's configuration.
        """
        model = tiny_model(family, seed, **overrides).to(getattr(torch, dtype))
        step = make_step(model, random_heads(model)) if heads else make_step(model, None, Tree())
        step.sampling = sampling
        tokenizer = None if overrides or not heads else make_tokenizer()
        facts = {"seed": seed, "dtype": dtype, "heads": heads, "sampling": sampling} | overrides
        name = "-".join([family, *(f"{key}_{value}" for key, value in facts.items())])
        folder = self.folder(name, lambda out: export(step, out, tokenizer=tokenizer, trained=heads))
        return Exported(step, Bundle.load(folder))
