"""Folders that take long to make and are only read: each is made once for all test processes.

If the environment variable ``MEDUSA_TEST_STOCK`` names a folder, the folders are kept there for later runs. Each has a
key in its name: a digest of all that it is made by. So a change of the exporter makes new ones.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import distributions
from pathlib import Path

import torch
from filelock import FileLock

from medusa_export.common.dtypes import KvCacheType
from medusa_export.step.step import MedusaStep
from medusa_runtime import Bundle, Tree
from support.decoding import TREE, export, make_step, random_heads
from support.tiny_models import SEEDS, tiny_model
from support.tiny_tokenizer import make_tokenizer

ROOT = Path(__file__).parents[2]
KEPT_SECONDS = 24 * 3600  # since the last use


@cache
def makers() -> bytes:
    """The digest of the packages' sources, of the helpers of tests, and of the versions of all libraries."""
    digest = hashlib.sha256()
    for folder in ("medusa_export", "runtime", "tests/support"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.is_file() and path.suffix != ".pyc":
                digest.update(f"{path.relative_to(ROOT)} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    digest.update("".join(sorted(f"{one.name} {one.version}\n" for one in distributions())).encode())
    return digest.digest()


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
        kept: The folder that holds those that are kept for later runs; None to keep none.
    """

    root: Path
    kept: Path | None = None

    @classmethod
    def beside(cls, root: Path) -> Stock:
        """The stock of a test run. Removes kept folders that no run used for a day.

        Args:
            root: A folder that all processes of the run share.
        """
        known = os.environ.get("MEDUSA_TEST_STOCK")
        if not known:
            return cls(root)
        kept = Path(known)
        kept.mkdir(parents=True, exist_ok=True)
        with FileLock(kept / "removing.lock"):
            for path in kept.glob("*.used"):
                if time.time() - path.stat().st_mtime > KEPT_SECONDS:
                    shutil.rmtree(path.with_suffix(""), ignore_errors=True)
                    path.unlink()
        return cls(root, kept)

    def folder(self, name: str, fill: Callable[[Path], object], *, keep: bool = True) -> Path:
        """A folder by name. If it does not exist, ``fill`` makes it.

        Args:
            name: The folder's name.
            fill: Called with the path of the folder to make.
            keep: Whether the folder depends on nothing but ``makers`` and the file that ``fill`` is in.
        """
        root = self.root
        if keep and self.kept is not None:
            source = Path(inspect.getfile(fill)).read_bytes()
            root, name = self.kept, f"{name}-{hashlib.sha256(makers() + source).hexdigest()[:16]}"
        folder = root / name
        with FileLock(root / f"{name}.lock"):
            (root / f"{name}.used").touch()
            if not folder.exists():
                part = root / f"{name}.part"
                shutil.rmtree(part, ignore_errors=True)  # of a run that was stopped
                fill(part)
                part.rename(folder)
        return folder

    def family(self, family: str) -> Exported:
        """Exports the model of a family that most tests share. Most can't sample, since that makes tracing slower."""
        return self.export(family, SEEDS.get(family, 0), sampling=family in ("llama", "qwen2", "gemma2"))

    def export(
        self,
        family: str = "llama",
        seed: int = 0,
        *,
        dtype: str = "float32",
        heads: bool = True,
        sampling: bool = True,
        kv_cache: KvCacheType | None = None,
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
            kv_cache: The type that keys and values are stored in; None for ``dtype``.
            overrides: Values of the model's configuration.
        """
        model = tiny_model(family, seed, **overrides).to(getattr(torch, dtype))
        own = random_heads(model) if heads else None
        step = make_step(model, own, TREE if heads else Tree(), kv_cache=kv_cache)
        step.sampling = sampling
        tokenizer = None if overrides or not heads else make_tokenizer()
        facts = {"seed": seed, "dtype": dtype, "heads": heads, "sampling": sampling, "kv_cache": kv_cache} | overrides
        name = "-".join([family, *(f"{key}_{value}" for key, value in facts.items())])
        folder = self.folder(name, lambda out: export(step, out, tokenizer=tokenizer, trained=heads))
        return Exported(step, Bundle.load(folder))
