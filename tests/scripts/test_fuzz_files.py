"""Damaged files are refused with an exception of this project, or do no harm: runs ``scripts/fuzz_files.py``."""

from __future__ import annotations

from collections import Counter

import pytest

from medusa_runtime import Bundle
from support.script import load_script

SEED = 21
CASES = 1000


@pytest.mark.slow
def test_damage_is_refused_or_harmless(tiny_bundle: Bundle) -> None:
    outcomes = list(load_script("fuzz_files").fuzz(tiny_bundle.folder, range(CASES), SEED))
    assert [outcome.case for outcome in outcomes] == list(range(CASES))
    assert not [outcome for outcome in outcomes if outcome.wrong]
    kinds = Counter(outcome.kind for outcome in outcomes)
    assert (
        min(kinds["loaded"], kinds["BundleError"]) > CASES // 10
    )  # damage is neither always harmless nor always refused
    assert len({outcome.file for outcome in outcomes}) > 25
