"""The documentation: paths and messages that it names exist, and its code blocks run.

In README.md and the tutorial, ``bash`` and ``python`` blocks run in order, in one shell. ``sh`` blocks don't run: they
install packages, or stand for the reader's own model. Both pages export SmolLM2 by the same command. It runs once, and
each page gets a copy of its bundle.
"""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PACKAGES = [ROOT / "medusa_export", ROOT / "runtime" / "medusa_runtime"]
NAMED_PATH = re.compile(r"`((?:medusa_export|runtime|tests|scripts|docs)/[\w./*-]*)(?:::(\w+))?`")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_paths_that_a_page_names_exist(page: Path) -> None:
    for path, name in NAMED_PATH.findall(page.read_text(encoding="utf-8")):
        found = list(ROOT.glob(path.rstrip("/")))
        assert found, f"{page.name} names {path}, which does not exist: correct the page"
        if name:
            text = found[0].read_text(encoding="utf-8")
            assert re.search(rf"\b{name}\b", text), f"{page.name} names {path}::{name}, which is not there any more"


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])  # mkdocs checks the links of its own pages
def test_links_lead_somewhere(name: str) -> None:
    links = re.findall(r"\]\(([^)#:]+)[^):]*\)", (ROOT / name).read_text(encoding="utf-8"))
    missing = [link for link in links if not (ROOT / link).exists()]
    assert links and not missing, missing


def test_the_troubleshooting_page_quotes_real_messages() -> None:
    known = {message for package in PACKAGES for path in package.rglob("*.py") for message in messages(path)}
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^\| `([^`]+)` \|", page, flags=re.MULTILINE)
    assert len(quoted) > 30
    for message in quoted:
        parts = [part.strip() for part in message.split("…")]
        assert any(in_order(parts, text) for text in known), f"No code says {message!r} any more: correct the page"


def in_order(parts: list[str], text: str) -> bool:
    """Returns True if a text holds all parts, each after the one before."""
    end = 0
    for part in parts:
        start = text.find(part, end)
        if start < 0:
            return False
        end = start + len(part)
    return True


def messages(path: Path) -> Iterator[str]:
    """The strings of a module, with '…' in the place of values."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


# In place of `medusa-export`: copies $EXPORTED for the one command that made it, and runs all others.
COMMANDS = """
set -euo pipefail
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
heads=scripts/smollm2_heads
exported="onnx $(scripts/smollm2.sh) --heads $heads --calibration $heads/calibration.json -o bundle"
unset heads
medusa-export() {
  if [ "$*" = "$exported" ]; then cp -rl "$EXPORTED" bundle
  elif [ $BASHPID != $$ ]; then exec medusa-export "$@"  # a job: kill ends it, not a shell around it
  else command medusa-export "$@"; fi
}
"""


def script_of(page: Path) -> str:
    """The ``bash`` and ``python`` blocks of a page as one shell script."""
    blocks = [(token.info, token.content) for token in MarkdownIt().parse(page.read_text()) if token.type == "fence"]
    parts = [COMMANDS]
    for language, content in blocks:
        if language == "bash":
            parts.append(content)
        elif language == "python":
            parts.append(f"python -c {shlex.quote(content)}")
    return "\n".join(parts)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.skipif("MEDUSA_SMOLLM2_GGUF" not in os.environ, reason="MEDUSA_SMOLLM2_GGUF is not set")
@pytest.mark.parametrize("name", ["README.md", "docs/tutorial.md"])
def test_code_blocks_run(name: str, smollm2_bundle: Path, tmp_path: Path) -> None:
    (ROOT / ".cache").mkdir(exist_ok=True)  # the model may be elsewhere; a link to nothing would stop its download
    for entry in ("scripts", ".cache"):
        (tmp_path / entry).symlink_to(ROOT / entry)
    search_path = os.pathsep.join(str(package.parent) for package in PACKAGES)
    result = subprocess.run(
        ["bash", "-c", script_of(ROOT / name)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": search_path, "EXPORTED": str(smollm2_bundle)},
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert result.returncode == 0, f"{result.stdout[-4000:]}\n{result.stderr[-4000:]}"
