"""Patches of libraries are tried again when a library's version is raised."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from medusa_export.compat import torch as compat_torch
from medusa_export.compat.transformers import CACHE, cache_argument, experts_layout, experts_of
from support.tiny_models import tiny_model

ROOT = Path(__file__).parents[2]
MODULES = sorted(path for path in (ROOT / "medusa_export" / "compat").glob("*.py") if path.name != "__init__.py")
PINNED = dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE))


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.stem)
def test_a_module_was_tried_with_the_versions_that_tests_install(module: Path) -> None:
    """After a version in constraints.txt is raised: try without each patch, then correct the docstring."""
    (words,) = re.findall(r"^Tried with (.*?)\.$", module.read_text(), flags=re.MULTILINE)
    tried = dict(re.findall(r"(\w+) (\d[\d.]*\d)", words))
    assert tried
    assert tried == {name: PINNED[name.replace("_", "-")] for name in tried}


def test_private_modules_of_libraries_are_imported_there_alone() -> None:
    """ruff finds uses of private members (SLF001), but no imports of private modules."""
    private = re.compile(r"^(from|import) [\w.]*(\._| import _(?!_))", re.MULTILINE)
    for path in sorted((ROOT / "medusa_export").rglob("*.py")):
        if "compat" not in path.parts:
            assert not private.search(path.read_text()), path


class _Newer(torch.nn.Module):
    def forward(self, ids: torch.Tensor, cache: object) -> None: ...


class _Older(torch.nn.Module):
    def forward(self, ids: torch.Tensor, past_key_values: object) -> None: ...


class _Neither(torch.nn.Module):
    def forward(self, ids: torch.Tensor, **given: object) -> None: ...


def test_a_model_gets_its_cache_by_the_name_that_it_knows() -> None:
    assert cache_argument(_Newer()) == "cache"
    assert cache_argument(_Older()) == "past_key_values"
    assert cache_argument(_Neither()) == CACHE
    llama = LlamaForCausalLM(LlamaConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9))
    assert cache_argument(llama) == CACHE
    assert llama(torch.zeros(1, 1, dtype=torch.int64), use_cache=True)[CACHE] is not None


def test_experts_of_an_older_transformers_end_in_no_norm() -> None:
    """transformers 5.17 has no attribute for it."""
    (experts, *_) = experts_of(tiny_model("mixtral"))
    del experts.has_post_expert_norm
    assert isinstance(experts_layout(experts).finish, torch.nn.Identity)


def test_a_torch_without_the_option_for_stack_traces_exports(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.11 has no such option."""
    monkeypatch.setattr("medusa_export.compat.torch.fx_config", SimpleNamespace())
    program = compat_torch.export_program(torch.nn.ReLU(), (torch.zeros(2),), {}, ())
    assert [node.op for node in program.graph.nodes] == ["placeholder", "call_function", "output"]
