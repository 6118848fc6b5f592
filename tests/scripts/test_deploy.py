"""The files in ``scripts/deploy``: manifests against the schema of Kubernetes, the Dockerfile against a linter.

Neither Docker nor a cluster runs here.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from medusa_runtime.server import run
from medusa_runtime.server.cli import command

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "scripts" / "deploy"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
# Kinds that the cluster knows through its operators, or that only the client reads.
FOREIGN = ("Kustomization", "ServiceMonitor")
KUBERNETES = "1.34"


def manifests() -> Iterator[tuple[Path, dict[str, Any]]]:
    for path in sorted((DEPLOY / "kubernetes").rglob("*.yaml")):
        for manifest in yaml.safe_load_all(path.read_text(encoding="utf-8")):
            yield path, manifest


def manifest(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((DEPLOY / "kubernetes" / "server" / name).read_text(encoding="utf-8"))
    return found


@pytest.fixture
def pod() -> dict[str, Any]:
    found: dict[str, Any] = manifest("deployment.yaml")["spec"]["template"]["spec"]
    return found


@pytest.fixture
def container(pod: Mapping[str, Any]) -> dict[str, Any]:
    (found,) = pod["containers"]
    return dict(found)


def test_manifests_follow_the_schema_of_kubernetes() -> None:
    validator = pytest.importorskip("kubernetes_validate")
    kinds = []
    for path, found in manifests():
        if found["kind"] in FOREIGN:
            continue
        if path.parent.name == "gpu":  # a patch of a deployment lacks what it does not change
            continue
        validator.validate(found, KUBERNETES, strict=True)
        kinds.append(found["kind"])
    assert sorted(kinds) == [
        "Deployment",
        "HorizontalPodAutoscaler",
        "PersistentVolumeClaim",
        "PodDisruptionBudget",
        "Service",
    ]


def test_kustomizations_name_files_that_exist() -> None:
    for path, found in manifests():
        if found["kind"] == "Kustomization":
            for name in [*found["resources"], *(patch["path"] for patch in found.get("patches", ()))]:
                assert (path.parent / name).exists(), f"{path} names {name}"


def test_selectors_and_ports_match(container: Mapping[str, Any]) -> None:
    deployment, service = manifest("deployment.yaml"), manifest("service.yaml")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    for selector in (
        deployment["spec"]["selector"]["matchLabels"],
        service["spec"]["selector"],
        manifest("disruption.yaml")["spec"]["selector"]["matchLabels"],
        manifest("monitor.yaml")["spec"]["selector"]["matchLabels"],
    ):
        assert selector.items() <= labels.items()
    assert manifest("autoscaler.yaml")["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    (port,) = container["ports"]
    assert port == {"name": "http", "containerPort": 8000}
    assert (
        service["spec"]["ports"][0]["targetPort"] == manifest("monitor.yaml")["spec"]["endpoints"][0]["port"] == "http"
    )


def test_the_container_has_time_to_drain(pod: Mapping[str, Any], container: Mapping[str, Any]) -> None:
    wait = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    drain = option(container["args"], "--drain-seconds")
    needed = wait + float(drain) + run._FLUSH_SECONDS + run._LINGER_SECONDS
    assert needed < pod["terminationGracePeriodSeconds"] < needed + 30


def test_the_autoscaler_aims_at_full_rows(container: Mapping[str, Any]) -> None:
    target = manifest("autoscaler.yaml")["spec"]["metrics"][0]["pods"]["target"]
    assert target["averageValue"] == option(container["args"], "--rows")


def test_options_of_the_container_exist(container: Mapping[str, Any]) -> None:
    entry = json.loads(re.findall(r"^ENTRYPOINT (.*)$", DOCKERFILE, re.MULTILINE)[0])
    assert entry[:3] == ["python", "-m", "medusa_runtime.server"]
    options = command.make_context("serve", [*entry[3:], *container["args"]]).params
    assert (str(options["bundle"]), options["host"], options["port"]) == ("/bundle", "0.0.0.0", 8000)
    assert container["volumeMounts"][0]["mountPath"] == "/bundle"


def test_the_image_installs_extras_that_exist_and_copies_files_that_it_may_see() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = re.findall(r'extras="(?:\$extras,)?([\w,]+)"', DOCKERFILE)
    assert set(",".join(named).split(",")) == {"server", "tracing", "tensorrt"} <= extras.keys()
    seen = [line[1:] for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines() if line[:1] == "!"]
    copied = {name for line in re.findall(r"^COPY (?!--)(.*) \S+$", DOCKERFILE, re.MULTILINE) for name in line.split()}
    assert copied == set(seen) and all((ROOT / name).exists() for name in seen)


def test_a_linter_finds_nothing_in_the_dockerfile() -> None:
    linter = shutil.which("hadolint")
    if linter is None:
        pytest.skip("hadolint is not installed")
    found = subprocess.run([linter, DEPLOY / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (0, "")


def option(arguments: list[str], name: str) -> str:
    return arguments[arguments.index(name) + 1]
