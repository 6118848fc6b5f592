"""The API of TensorRT that the code uses, against the record of each version's real bindings."""

from __future__ import annotations

import ast
import json
import re
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import pytest

from support.script import load_script

tensorrt_api: Any = load_script("tensorrt_api")
RECORD: dict[str, dict[str, list[str]]] = json.loads(tensorrt_api.RECORD.read_text(encoding="utf-8"))
VERSIONS = sorted({version for signatures in RECORD.values() for found in signatures.values() for version in found})
# The code asks for these before it uses them, or uses them for TensorRT-RTX only.
RTX_ONLY = {
    "BuilderFlag.REQUIRE_USER_ALLOCATION", "ComputeCapability", "DynamicShapesKernelSpecializationStrategy",
    "DynamicShapesKernelSpecializationStrategy.EAGER", "DynamicShapesKernelSpecializationStrategy.LAZY",
    "EngineInvalidityDiagnostics", "EngineValidity", "EngineValidity.INVALID",
    "IBuilderConfig.num_compute_capabilities",
    "IBuilderConfig.set_compute_capability", "IExecutionContext.is_stream_capturable", "IRuntimeCache.deserialize",
    "IRuntimeCache.reset", "IRuntimeCache.serialize", "IRuntimeConfig.create_runtime_cache",
    "IRuntimeConfig.dynamic_shapes_kernel_specialization_strategy", "IRuntimeConfig.set_runtime_cache",
    "Runtime.get_engine_validity",
}  # fmt: skip
# Classes of enumerations: their members' ``name`` is Python's own.
_NAMES = re.compile(r"\.name$")


def test_the_record_has_every_supported_version() -> None:
    expected = {
        f"{flavor} {version}" for flavor, (_, _, versions) in tensorrt_api.FLAVORS.items() for version in versions
    }
    assert set(VERSIONS) == expected


@pytest.mark.parametrize("version", VERSIONS)
def test_a_version_has_all_that_the_code_uses(version: str) -> None:
    missing = {member for member, found in RECORD.items() if not any(version in one for one in found.values())}
    missing = {member for member in missing if not _NAMES.search(member)}
    assert missing == ((RTX_ONLY & set(RECORD)) if version.startswith("tensorrt 1") else set())


def test_the_code_asks_for_what_only_one_flavor_has() -> None:
    """Each such name is an argument of ``getattr`` or ``hasattr``, or belongs to an object that was asked for so."""
    asked: set[str] = set()
    for folder in tensorrt_api.SOURCES:
        for path in folder.glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr"):
                    asked |= {part.value for part in node.args if isinstance(part, ast.Constant)}
    assert asked >= {
        "ComputeCapability", "DynamicShapesKernelSpecializationStrategy", "REQUIRE_USER_ALLOCATION",
        "get_engine_validity", "set_compute_capability",
    }  # fmt: skip


def test_signatures_of_all_versions_agree() -> None:
    """Where they differ the code's call fits all of them: the buffer of an engine comes first, and types are read."""
    differing = {member for member, signatures in RECORD.items() if len(signatures) > 1}
    assert differing == {"ITensor.dtype", "Runtime.deserialize_cuda_engine", *_builds_with_streams()}


def _builds_with_streams() -> set[str]:
    """Methods with more overloads in some versions. The first one is the same in all."""
    found = set()
    for member, signatures in RECORD.items():
        if len(signatures) > 1 and len({signature.split(" | ")[0] for signature in signatures}) == 1:
            found.add(member)
    return found


@pytest.mark.parametrize("flavor", tensorrt_api.FLAVORS)
def test_the_record_is_that_of_the_installed_version(flavor: str) -> None:
    name = tensorrt_api.FLAVORS[flavor][0]
    if find_spec(name) is None:
        pytest.skip(f"{flavor} is not installed")
    module = import_module(name)
    version = f"{flavor} {module.__version__}"
    if version not in VERSIONS:
        pytest.skip(f"{version} is not among the recorded versions")
    recorded = {
        member: signature for member, found in RECORD.items() for signature, have in found.items() if version in have
    }
    assert tensorrt_api.api_of(module, tensorrt_api.used_names()) == recorded, "run scripts/tensorrt_api.py again"
