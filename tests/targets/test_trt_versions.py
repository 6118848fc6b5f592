"""The API of TensorRT that the code uses, against the record of each version's real bindings."""

from __future__ import annotations

import ast
import json
import re
from importlib import import_module
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest

from medusa_export.common.errors import EngineBuildError
from medusa_export.common.progress import Progress
from medusa_export.targets.tensorrt import versions
from medusa_export.targets.tensorrt.versions import TRIED, check_driver, check_version, cuda_of
from medusa_runtime.backends.tensorrt.cuda import Cuda
from medusa_runtime.backends.tensorrt.library import TensorRTLibrary
from support.script import load_script

tensorrt_api: Any = load_script("tensorrt_api")
VERSIONS = [f"{flavor} {number}" for flavor, (_, _, numbers) in tensorrt_api.FLAVORS.items() for number in numbers]


def _read() -> dict[str, dict[str, list[str]]]:
    """The record: by member and signature, the versions that have it."""
    record = json.loads(tensorrt_api.RECORD.read_text(encoding="utf-8"))
    return {
        member: {signature: VERSIONS if text == "all" else text.split(", ") for signature, text in signatures.items()}
        for member, signatures in record.items()
    }


RECORD = _read()
NAMES = tensorrt_api.used_names()
USED = {member for member in RECORD if member.split(".")[-1] in NAMES}
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


@pytest.mark.parametrize("version", VERSIONS)
def test_a_version_has_all_that_the_code_uses(version: str) -> None:
    missing = {member for member in USED if not any(version in found for found in RECORD[member].values())}
    is_rtx = version.startswith("tensorrt-rtx")
    allowed = {member for member in missing if {member, member.split(".")[0]} & RTX_ONLY and not is_rtx}
    assert missing <= allowed, f"{version} lacks {sorted(missing - allowed)}"


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


def library(flavor: str, version: str) -> TensorRTLibrary:
    return TensorRTLibrary(flavor, SimpleNamespace(__version__=version))


def test_versions_that_were_tried_are_those_of_the_record() -> None:
    for flavor, (_, _, recorded) in tensorrt_api.FLAVORS.items():
        ends = (recorded[0], recorded[-1])
        assert TRIED[flavor] == tuple(tuple(int(part) for part in end.split(".")[:2]) for end in ends)


def test_an_old_version_is_refused_before_a_build() -> None:
    said: list[Progress] = []
    for flavor, version in (("tensorrt", "10.14.1.48.post1"), ("tensorrt-rtx", "1.3.0.35"), ("tensorrt", "9.9")):
        with pytest.raises(EngineBuildError, match=rf"{flavor} {version} is too old: a build needs .*Update it: pip"):
            check_version(library(flavor, version), said.append)
    for flavor, version in (("tensorrt", "10.15.1.29"), ("tensorrt", "11.4.0.106"), ("tensorrt-rtx", "1.7.1.116")):
        check_version(library(flavor, version), said.append)
    assert not said
    check_version(library("tensorrt", "12.0.1"), said.append)
    assert str(said[0]) == "tensorrt 12.0.1 is newer than 11.4, the last that was tried"


@pytest.mark.parametrize(("driver", "refused"), [(13000, False), (13010, False), (12090, True)])
def test_an_old_driver_is_refused_before_a_build(driver: int, refused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stub:
        def call(self, _: str, name: str) -> int:
            assert name == "cudaDriverGetVersion"
            return driver

    monkeypatch.setattr(Cuda, "open", classmethod(lambda _: Stub()))
    monkeypatch.setattr(versions, "cuda_of", lambda _: 13)
    if not refused:
        check_driver(library("tensorrt", "11.4"))
        return
    with pytest.raises(EngineBuildError, match=r"made for CUDA 13, but the driver here is for CUDA 12\.9\. Update the"):
        check_driver(library("tensorrt", "11.4"))


def test_the_cuda_of_an_installed_flavor_is_read_from_its_packages() -> None:
    assert cuda_of("tensorrt-rtx") == (13 if find_spec("tensorrt_rtx_bindings") else None)
    assert cuda_of("nothing") is None


def test_signatures_of_all_versions_agree() -> None:
    """Where they differ, the code's call fits all: the buffer of an engine comes first, and the type is read only."""
    differing = {
        member
        for member in USED
        if len({re.sub(r"-> .*", "", signature.split(" | ")[0]) for signature in RECORD[member]}) > 1
    }
    assert differing == {"ITensor.dtype"}


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
    assert tensorrt_api.api_of(module) == recorded, "run scripts/tensorrt_api.py again"
