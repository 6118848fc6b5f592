"""Requests that schemathesis makes from the OpenAPI description: no answer is 5xx, and all follow the description."""

from __future__ import annotations

from pathlib import Path

import pytest

from runtime.server.conftest import Served
from support.script import load_script


@pytest.mark.slow
def test_no_request_makes_the_server_fail(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[3] / "scripts"))
    found = load_script("fuzz_server").fuzz(served.address, 60, seed=0)
    assert found.total() > 200
    statuses = {status for label, status in found if label == "POST /v1/chat/completions"}
    assert statuses >= {200, 400}
