"""Checks and measures what this machine's GPU can run, in stages.

Each stage runs in a process of its own, under a time limit, and writes its own report. The reports of all stages so far
are joined to ``gpu_check.json``, ``gpu_check.md`` and ``gpu_check.png``. ``gpu_check.sh`` prepares a machine and runs
this script.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import signal
import subprocess
import sys
import time
import tomllib
import traceback
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from packaging.requirements import Requirement

from gpu_stages.context import Context
from gpu_stages.report import as_markdown, outcome, plot, publish
from medusa_export.common.errors import MissingExtraError
from medusa_export.common.files import write_text

PACKAGES = (
    "torch", "transformers", "onnx", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx-cu13", "cuda-bindings",
)  # fmt: skip
ROOT = Path(__file__).parents[1]
# A stage that has less time does not begin: PyTorch and transformers take some seconds to import.
_LEAST_SECONDS = 30.0


@dataclass(frozen=True)
class Stage:
    """A stage of the check.

    Attributes:
        function: Its function, as ``module:name`` in ``gpu_stages``.
        limit: Seconds after which it is stopped.
        dry_limit: The same in a dry run, whose sizes are small.
    """

    function: str
    limit: float
    dry_limit: float = 300


# In the order in which they run. The last ones need packages that a machine may lack.
STAGES = {
    "torch-steps": Stage("torch_steps:run", 150),
    "torch-exact": Stage("torch_exact:run", 120),
    "torch-training": Stage("torch_training:run", 260),
    "torch-heads": Stage("torch_training:run_heads", 420),
    "export": Stage("backends:run_export", 240),
    "onnxruntime-cuda": Stage("backends:run_onnxruntime", 240),
    "tensorrt-rtx": Stage("backends:run_tensorrt_rtx", 120),
    "tensorrt": Stage("backends:run_tensorrt", 300),
}


def main() -> int:
    """Runs stages, and joins the reports.

    Returns:
        The exit code: 0 if a stage ran and none failed or disagrees, 3 if no stage could run, otherwise 1.
    """
    options = _options()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.run is not None:
        return run_stage(options)
    for words in lacking():
        print(f"note: {words}", file=sys.stderr)
    ends = time.monotonic() + (options.total or float("inf"))
    for name in selected(options.stages):
        print(f"{name} …", file=sys.stderr, flush=True)
        stage = supervise(name, options, ends)
        print(f"{name}: {outcome(stage)}, {stage['wall_seconds']:.0f} s", file=sys.stderr, flush=True)
    report = joined(options)
    write_text(options.out / "gpu_check.json", json.dumps(report, indent=1) + "\n")
    write_text(options.out / "gpu_check.md", as_markdown(report))
    plotted: Path | None = options.out / "gpu_check.png"
    try:
        plot(report, plotted)
    except ImportError as error:
        print(f"note: no plot, because {error}", file=sys.stderr)
        plotted = None
    if options.publish:
        publish(report, plotted, ROOT / "docs")
    print((options.out / "gpu_check.md").read_text(encoding="utf-8"))
    return exit_code(report)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", help="cuda; cpu is a dry run with small sizes")
    parser.add_argument("--stages", default=",".join(STAGES), help="names or their beginnings, such as torch")
    parser.add_argument("--out", type=Path, default=Path(".cache/gpu_check"), help="the folder for reports")
    parser.add_argument("--model", help="the base model; a random one of the sizes of SmolLM2-135M by default")
    parser.add_argument("--heads", help="its heads")
    parser.add_argument("--bundle", type=Path, help="a bundle of them, instead of an export here")
    parser.add_argument("--seconds", type=float, help="time of a measurement of throughput; 60, or 1 in a dry run")
    parser.add_argument("--limit", type=float, help="the most seconds of a stage, below its own limit")
    parser.add_argument("--total", type=float, help="the most seconds of all stages together; later ones are cut")
    parser.add_argument("--publish", action="store_true", help="put the report into docs/")
    parser.add_argument("--run", choices=STAGES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.seconds is None:
        options.seconds = 60.0 if options.device != "cpu" else 1.0
    return options


def selected(wanted: str) -> list[str]:
    """The stages whose names begin with one of the wanted words.

    Raises:
        SystemExit: There is no stage of a name.
    """
    words = [word for word in wanted.split(",") if word]
    for word in words:
        if not any(name.startswith(word) for name in STAGES):
            raise SystemExit(f"There is no stage {word!r}: choose some of {', '.join(STAGES)}.")
    exact = {word for word in words if word in STAGES}
    return [name for name in STAGES if name in exact or any(name.startswith(w) for w in words if w not in exact)]


def supervise(name: str, options: argparse.Namespace, ends: float = float("inf")) -> dict[str, Any]:
    """Runs a stage in a process of its own, stops it at its limit, and returns its report.

    Args:
        name: The stage.
        options: The options of the command.
        ends: The time of ``time.monotonic`` at which all stages must have ended.
    """
    stage, started = STAGES[name], time.monotonic()
    limit = min(stage.dry_limit if options.device == "cpu" else stage.limit, options.limit or float("inf"))
    file = options.out / f"{name}.json"
    if ends - started < min(limit, _LEAST_SECONDS):
        facts = {"refused": f"`--total` left no time: `--stages {name}` runs it.", "wall_seconds": 0.0, "limit": limit}
        if not file.exists():  # else what an earlier run found is kept
            write_text(file, json.dumps(facts, indent=1) + "\n")
        return facts
    limit = min(limit, ends - started)
    file.unlink(missing_ok=True)
    command = [sys.executable, __file__, *sys.argv[1:], "--run", name]
    process = subprocess.Popen(command, start_new_session=True)  # noqa: S603  # this script itself
    facts = {}
    try:
        code = process.wait(limit)
        if code:
            facts["failed"] = f"The process ended with code {code}."
    except subprocess.TimeoutExpired:
        facts["stopped"] = True
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # it leads a group of its own
            process.wait()
    found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    facts = facts | found | {"wall_seconds": time.monotonic() - started, "limit": limit}
    write_text(file, json.dumps(facts, indent=1) + "\n")
    return facts


def run_stage(options: argparse.Namespace) -> int:
    """Runs one stage in this process. What stops it is in its report, with its words."""
    # A dry run has small sizes, so it doesn't take the model that is at hand.
    model, heads, bundle = (None,) * 3 if options.device == "cpu" else (options.model, options.heads, options.bundle)
    context = Context(torch.device(options.device), options.out, options.run, model, heads, bundle, options.seconds)
    if options.device != "cpu" and not torch.cuda.is_available():
        context.note(refused=f"PyTorch {torch.__version__} finds no GPU.")
        return 0
    if context.is_dry:
        torch.set_num_threads(1)  # sizes are small, and threads would wait for each other
    module, function = STAGES[options.run].function.split(":")
    try:
        getattr(importlib.import_module(f"gpu_stages.{module}"), function)(context)
    except Exception as error:  # noqa: BLE001  # the report keeps it, and other stages go on
        if names_missing_package(error):
            context.note(refused=f"A package is missing. {error}")
            return 0
        traceback.print_exc()
        context.note(failed=f"{type(error).__name__}: {error}", traceback=traceback.format_exc())
        return 1
    return 0


def names_missing_package(error: Exception) -> bool:
    """True if an error says that a package that the project needs is not installed."""
    own = ("medusa_export", "medusa_runtime", "gpu_stages")
    module = (error.name or "").split(".")[0] if isinstance(error, ModuleNotFoundError) else None
    return isinstance(error, MissingExtraError) or (module is not None and module not in own)


def lacking() -> list[str]:
    """Sentences about packages that the project needs and that this machine lacks, or has in another version."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = []
    for requirement in map(Requirement, [*project["dependencies"], *project["optional-dependencies"]["export"]]):
        try:
            there = version(requirement.name)
        except PackageNotFoundError:
            found.append(f"{requirement.name} is not installed; the project needs {requirement}.")
            continue
        if not requirement.specifier.contains(there, prereleases=True):
            found.append(f"This is {requirement.name} {there}; the project needs {requirement}.")
    return found


def joined(options: argparse.Namespace) -> dict[str, Any]:
    """The reports of all stages that ran so far, in this call or in earlier ones."""
    stages = {}
    for name in STAGES:
        file = options.out / f"{name}.json"
        if file.exists():
            stages[name] = json.loads(file.read_text(encoding="utf-8"))
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "dry": options.device == "cpu",
        "machine": machine(),
        "stages": stages,
    }


def machine() -> dict[str, Any]:
    """Facts about this machine: the GPU, if there is one, and versions of packages."""
    facts: dict[str, Any] = {"python": platform.python_version(), "gpu": None, "driver": None, "lacking": lacking()}
    facts["versions"] = {}
    for package in PACKAGES:
        try:
            facts["versions"][package] = version(package)
        except PackageNotFoundError:
            facts["versions"][package] = None
    facts["versions"]["torch"] = torch.__version__
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "gpu": properties.name,
            "architecture": f"sm{properties.major}{properties.minor}",
            "memory_bytes": properties.total_memory,
            "driver": driver(),
        }
    return facts


def driver() -> str:
    """The version of the NVIDIA driver; empty if ``nvidia-smi`` is missing."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603  # a fixed command
    except (OSError, subprocess.CalledProcessError):
        return ""
    return found.stdout.split("\n")[0].strip()


def exit_code(report: dict[str, Any]) -> int:
    """0 if a stage ran and none failed or disagrees, 3 if none could run, otherwise 1."""
    stages = report["stages"].values()
    if any("failed" in stage or "stopped" in stage or stage.get("agrees") is False for stage in stages):
        return 1
    return 0 if any("refused" not in stage for stage in stages) else 3


if __name__ == "__main__":
    raise SystemExit(main())
