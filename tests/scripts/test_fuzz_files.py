"""Any damage to any file ends in an error of ours, or in none: ``scripts/fuzz_files.py`` in small."""

from __future__ import annotations

from collections import Counter

import pytest

from medusa_runtime import Bundle
from support.script import load_script

SEED = 21


@pytest.mark.slow
def test_damage_is_told_or_harmless(tiny_bundle: Bundle) -> None:
    outcomes = list(load_script("fuzz_files").fuzz(tiny_bundle.folder, range(2000), SEED))
    assert [outcome.case for outcome in outcomes] == list(range(2000))
    assert not [outcome for outcome in outcomes if outcome.wrong]
    kinds = Counter(outcome.kind for outcome in outcomes)
    assert min(kinds["loaded"], kinds["BundleError"]) > 200  # neither harmless all nor refused all
    assert len({outcome.file for outcome in outcomes}) > 25
