"""Records the classes of TensorRT's Python API that this project uses, in each version that it supports.

A version's bindings are a small wheel. The libraries that they need are gigabytes. To import the bindings, a library
is enough whose few functions do nothing: this compiles one. ``tests/targets/test_trt_versions.py`` compares the record
with what the code uses. Usage: ``python scripts/tensorrt_api.py`` downloads the bindings and writes the record.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "tests/data/tensorrt_api.json"
# The folders whose code uses TensorRT.
SOURCES = (ROOT / "medusa_export/targets/tensorrt", ROOT / "runtime/medusa_runtime/backends/tensorrt")
# By flavor: the module, the wheel of its bindings, and the versions.
FLAVORS = {
    "tensorrt": (
        "tensorrt_bindings",
        "tensorrt_cu13_bindings",
        ("10.15.1.29", "10.16.1.11", "11.0.0.114", "11.1.0.106", "11.2.1.2", "11.3.0.99", "11.4.0.106"),
    ),
    "tensorrt-rtx": (
        "tensorrt_rtx_bindings",
        "tensorrt_rtx_cu13_bindings",
        ("1.4.0.76", "1.5.0.114", "1.6.1.120", "1.7.1.116"),
    ),
}
# The classes that the code has objects or members of.
CLASSES = frozenset({
    "Builder", "BuilderFlag", "ComputeCapability", "DataType",
    "DynamicShapesKernelSpecializationStrategy", "EngineInvalidityDiagnostics", "EngineValidity",
    "ExecutionContextAllocationStrategy", "IAttention", "IAttentionInputLayer", "IBuilderConfig", "ICudaEngine",
    "IExecutionContext", "IHostMemory", "ILayer", "ILogger", "INetworkDefinition", "IOptimizationProfile",
    "IProgressMonitor", "IRuntimeCache", "IRuntimeConfig", "ITensor", "ITimingCache", "LayerType",
    "NetworkDefinitionCreationFlag", "OnnxParser", "ParserError", "Runtime", "TensorIOMode",
})  # fmt: skip


def used_names() -> set[str]:
    """Every name that follows a dot, or is given to ``getattr`` or ``hasattr``, in code that uses TensorRT."""
    names: set[str] = set()
    for path in (path for folder in SOURCES for path in folder.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                names.add(node.attr)
            elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr"):
                names |= {part.value for part in node.args if isinstance(part, ast.Constant)}
    return names


def api_of(module: ModuleType) -> dict[str, str]:
    """``CLASSES``, their members and the types of data in a module, with signatures; empty where there is none."""
    found = {}
    types = set(module.DataType.__members__)
    for name, value in vars(module).items():
        if name in CLASSES or name.lower() in {kind.lower() for kind in types}:
            found[name] = "class" if isinstance(value, type) else ""
        if name in CLASSES:
            members = {member: inner for member, inner in vars(value).items() if not member.startswith("_")}
            found |= {f"{name}.{member}": _signature(inner) for member, inner in members.items()}
    return dict(sorted(found.items()))


def _signature(value: Any) -> str:
    """The parameters that the bindings' documentation gives a function; the type of a property or a constant."""
    if isinstance(value, property):
        return "property" if value.fset is not None else "read-only property"
    lines = (getattr(value, "__doc__", None) or "").strip().split("\n")
    signatures = [line.split(". ", 1)[-1] for line in lines if re.match(r"(\d+\. )?\w+\(.*\)", line)]
    # Later versions write the same types in other words.
    words = {
        r"[\w.]*tensorrt\w*\.": "",
        r"<[^>]*>": "",
        r"typing\.SupportsInt": "int",
        r"typing_extensions\.Buffer": "buffer",
    }
    for pattern, word in words.items():
        signatures = [re.sub(pattern, word, line) for line in signatures]
    return " | ".join(signatures[1:] if len(signatures) > 1 else signatures)


def main() -> None:
    """Writes the record: by member and signature, the versions that have it."""
    if sys.argv[1:2] == ["--print"]:
        module = __import__(sys.argv[2])
        print(json.dumps(api_of(module)))
        return
    record: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for flavor, (module, wheel, versions) in FLAVORS.items():
        for version in versions:
            with tempfile.TemporaryDirectory() as scratch:
                found = _recorded(Path(scratch), module, f"{wheel}=={version}")
            print(flavor, version, len(found))
            for member, signature in found.items():
                record[member][signature].append(f"{flavor} {version}")
    RECORD.write_text(json.dumps(_shortened(record), indent=0, sort_keys=True) + "\n", encoding="utf-8")


def _shortened(record: Mapping[str, Mapping[str, list[str]]]) -> dict[str, dict[str, str]]:
    """The record with versions as one text, ``all`` for all of them."""
    every = [f"{flavor} {version}" for flavor, (_, _, versions) in FLAVORS.items() for version in versions]
    return {
        member: {signature: "all" if found == every else ", ".join(found) for signature, found in signatures.items()}
        for member, signatures in record.items()
    }


def _recorded(folder: Path, module: str, wheel: str) -> dict[str, str]:
    """The API of one version, from its bindings in a process of their own."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "-q",
        "--no-deps",
        "--only-binary=:all:",
        "-d",
        str(folder),
        wheel,
    ]
    subprocess.run(command, check=True)  # noqa: S603  # names of packages
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as archive:
        archive.extractall(folder)  # a wheel that pip has checked
    (library,) = (folder / module).glob("*.so")
    compile_stubs(library, folder / "stubs")
    environment = {
        **os.environ,
        "PYTHONPATH": str(folder),
        "LD_LIBRARY_PATH": str(folder / "stubs"),
    }
    command = [sys.executable, "-S", __file__, "--print", module]
    found = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)  # noqa: S603
    api: dict[str, str] = json.loads(found.stdout)
    return api


def compile_stubs(library: Path, folder: Path) -> None:
    """Compiles libraries whose functions do nothing, in the place of those that the bindings need."""
    folder.mkdir()
    dynamic, symbols = (
        subprocess.run([*tool, library], check=True, capture_output=True, text=True).stdout  # noqa: S603  # fixed tools
        for tool in (("readelf", "-d"), ("nm", "-D", "--undefined-only"))
    )
    missing = re.findall(
        r" U (\w*(?:INTERNAL|PluginRegistry|NvOnnxParserVersion|NvInferPlugins))$", symbols, re.MULTILINE
    )
    source = folder / "stubs.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in missing), encoding="utf-8")
    for name in re.findall(r"\[(lib(?:nv|tensorrt)\S+)\]", dynamic):
        command = ["cc", "-shared", "-fPIC", "-o", str(folder / name), str(source), f"-Wl,-soname,{name}"]
        subprocess.run(command, check=True)  # noqa: S603
        source.write_text("", encoding="utf-8")  # the first library has all of them


if __name__ == "__main__":
    main()
