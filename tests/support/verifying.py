"""Verification of tiny bundles, and of copies that a test has changed."""

from __future__ import annotations

import json
from pathlib import Path

from medusa_export.step.step import MedusaStep
from medusa_export.verification.bundle import verify_bundle
from medusa_export.verification.checks import Verification
from medusa_export.verification.plan import VerifyOptions
from medusa_runtime import Bundle
from medusa_runtime.bundles.bundle import DESCRIPTION
from medusa_runtime.bundles.listed_folder import FileFacts

PROMPTS = [[(7 * i * i + 3) % 101 for i in range(13)], [(5 * i * i + 11 * i + 1) % 101 for i in range(22)]]


def redescribe(folder: Path) -> Bundle:
    """The bundle with the digests of what its files hold now."""
    path = folder / DESCRIPTION
    data = json.loads(path.read_text())
    for name in data["files"]:
        facts = FileFacts.of(folder / name)
        data["files"][name] = {"size": facts.size, "sha256": facts.sha256}
    path.write_text(json.dumps(data))
    return Bundle.load(folder)


def failed(outcome: Verification) -> set[str]:
    return {check.name for check in outcome.checks if not check.passed}


def verify(bundle: Bundle, step: MedusaStep) -> Verification:
    return verify_bundle(bundle, step, PROMPTS, VerifyOptions(max_new_tokens=40))
