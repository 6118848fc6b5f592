"""The status page in a real browser, and the Grafana dashboard against the metrics."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import httpx
import pytest

from medusa_runtime import Stats
from medusa_runtime.server.prometheus import ServerMetrics
from medusa_runtime.server.settings import Settings
from runtime.server.conftest import Served
from support.servers import running

BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
DASHBOARD = Path(__file__).parents[3] / "docs" / "grafana.json"


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium")
def test_a_browser_shows_the_figures(served: Served, tmp_path: Path) -> None:
    metrics = ServerMetrics("tiny")
    metrics.ended("stop", Stats(completion_tokens=17, accepted_lengths=Counter({1: 5, 2: 3, 3: 2})))
    metrics.step("decode", 1, 4, 17, 0.1)
    assert BROWSER is not None
    with running(served.service, metrics, Settings(bundle=Path("tiny"))) as address:
        options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}"]
        done = subprocess.run(
            [BROWSER, *options, "--virtual-time-budget=4000", "--dump-dom", f"{address}/status"],
            capture_output=True, text=True, timeout=120, check=True,
        )  # fmt: skip
    shown = re.sub(r"<script>.*</script>", "", done.stdout, flags=re.DOTALL)
    assert '<h1 id="model">tiny</h1>' in shown
    assert '<dd id="state">ready</dd>' in shown and '<dd id="speed">0.0</dd>' in shown
    assert re.search(r"Depth 1<meter[^>]*></meter>50.0 %.*Depth 2<meter[^>]*></meter>20.0 %", shown, re.DOTALL)


def test_the_dashboard_names_metrics_that_exist(web: httpx.Client) -> None:
    text = json.dumps(json.loads(DASHBOARD.read_text(encoding="utf-8")))
    page = web.get("/metrics").text
    names = {*re.findall(r"(?:vllm|medusa):\w+", text)}
    assert len(names) > 10
    known = {*re.findall(r"^# TYPE (\S+)", page, re.MULTILINE)}
    known |= {name + suffix for name in known for suffix in ("_bucket", "_sum", "_count")}
    assert names <= known, names - known
