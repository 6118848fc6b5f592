"""The report of a GPU check: its facts as Markdown and as a plot, and the table of all cards for the documentation."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from string import Formatter
from typing import Any

PLAIN = "tree size 1"
# Sentences about the findings of a stage. A stage that lacks a finding has no such sentence.
_FACTS = (
    "weights of {weight_bytes:,} bytes, {context_tokens:,} tokens before each step",
    "a copy moves {copy_bytes_per_second:,.0f} bytes/s, so reading the weights takes {least_ms:.2f} ms",
    "{name}: a bundle of {bytes:,} bytes with a tree of {nodes} nodes",
    "exported in {seconds:.0f} s, as greedy only in {greedy_only_seconds:.0f} s",
    "an engine of {network_layers:,} layers, built in {build_seconds:.0f} s",
    "{compared:,} comparisons with PyTorch",
    "{nodes_per_step:.1f} nodes per step with `auto`",
)
_BLOCK = re.compile(r"(<!-- gpu checks: begin -->\n).*?(<!-- gpu checks: end -->)", re.DOTALL)


def as_markdown(report: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    lines = [f"# GPU check: {_card(report)}", "", f"{report['date']}. Versions:", ""]
    lines += [f"- {package} {number or 'not installed'}" for package, number in report["machine"]["versions"].items()]
    lines += [f"- {words}" for words in report["machine"].get("lacking", [])]
    if report["dry"]:
        lines += [
            "",
            "**This is a dry run on a CPU with small sizes. It shows that the stages work; its times mean nothing.**",
        ]
    lines += ["", "| stage | seconds | limit | outcome |", "|---|---|---|---|"]
    for name, stage in report["stages"].items():
        lines.append(f"| {name} | {stage['wall_seconds']:.0f} | {stage['limit']:.0f} | {outcome(stage)} |")
    for name, stage in report["stages"].items():
        lines += ["", f"## {name}", "", *_details(stage)]
    return "\n".join(lines) + "\n"


def outcome(stage: Mapping[str, Any]) -> str:
    """The outcome of a stage in a few words."""
    if stage.get("stopped"):
        return "stopped at its limit; the report holds what was found by then"
    if stage.get("failed"):
        return "FAILED"
    if "refused" in stage:
        return "not run"
    if "agrees" in stage:
        return "tokens agree" if stage["agrees"] else "TOKENS DIFFER"
    return "done"


def _details(stage: Mapping[str, Any]) -> list[str]:
    lines = [f"{stage[key].strip()}\n" for key in ("refused", "failed") if key in stage]
    lines += [
        "- " + words.format_map(stage)
        for words in _FACTS
        if all(field in stage for _, field, _, _ in Formatter().parse(words) if field)
    ]
    return lines + _times(stage) + _findings(stage)


def _times(stage: Mapping[str, Any]) -> list[str]:
    if "step_ms" in stage:
        return ["", *_step_table(stage)]
    launched = stage.get("launched_step_ms") or {}
    return [f"- {size} nodes without CUDA graphs: {ms:.2f} ms" for size, ms in launched.items()]


def _findings(stage: Mapping[str, Any]) -> list[str]:
    lines = []
    for family, ways in (stage.get("families") or {}).items():
        words = [f"{way}: {'equal' if isinstance(rows, list) and all(rows) else rows}" for way, rows in ways.items()]
        lines.append(f"- tokens of {family} against transformers, {'; '.join(words)}")
    if stage.get("not_on_the_gpu") == {}:
        lines.append("- all nodes are on the GPU")
    for key, title in (("tokens_per_second", "tokens/s"), ("not_on_the_gpu", "not on the GPU"), ("top1", "top-1")):
        if isinstance(stage.get(key), Mapping):
            lines += [f"- {title}, {name}: {_short(value)}" for name, value in stage[key].items()]
    for name in ("distill", "train", "calibrate", "transformers"):
        if isinstance(stage.get(name), Mapping):
            facts = {key: value for key, value in stage[name].items() if key != "heldout"}
            lines.append(f"- {name}: " + ", ".join(f"{key} {_short(value)}" for key, value in facts.items()))
    for size, gap in (stage.get("host_gap") or {}).items():
        lines.append(f"- {size} nodes: the host's part of a step that it reads is {100 * gap['share']:.1f} %")
    for size, times in (stage.get("fixed_step_ms") or {}).items():
        lines.append(
            f"- {size} nodes of fixed sizes: {times['launched']:.2f} ms, as a CUDA graph {times['captured']:.2f} ms"
        )
    if "capture_refused" in stage:
        lines.append(f"- no CUDA graphs: {stage['capture_refused']}")
    if "host_gap_ms" in stage:
        lines.append(f"- the host's part of a plain step is {stage['host_gap_ms']:.3f} ms")
    lines += [
        f"- steps of {one['tree_size']} are no CUDA graphs: {one['words']}" for one in stage.get("uncaptured", [])
    ]
    lines += [f"- {note}" for note in stage.get("notes", [])]
    return lines


def _step_table(stage: Mapping[str, Any]) -> list[str]:
    """A table of milliseconds per step by tree size, with and without CUDA graphs, and of overheads."""
    times, launched = stage["step_ms"], stage.get("launched_step_ms") or {}
    lines = [f"| nodes | {' | '.join(map(str, times))} |", "|---" * (len(times) + 1) + "|"]
    lines.append(f"| step, ms | {' | '.join(f'{ms:.2f}' for ms in times.values())} |")
    first = next(iter(times.values()))
    lines.append(f"| against the first | {' | '.join(f'{ms / first:.2f}' for ms in times.values())} |")
    if launched:
        cells = (f"{launched[size]:.2f}" if size in launched else "" for size in times)
        lines.append(f"| without CUDA graphs, ms | {' | '.join(cells)} |")
    return [*lines, ""]


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.1f}" if abs(value) >= 10 else f"{value:.3f}"
    if isinstance(value, list):
        return ", ".join(map(_short, value))
    return f"{value:,}" if isinstance(value, int) else str(value)


def _card(report: Mapping[str, Any]) -> str:
    facts = report["machine"]
    return f"{facts['gpu']}, driver {facts['driver']}" if facts["gpu"] else "no GPU"


def plot(report: Mapping[str, Any], target: Path) -> None:
    """Plots step times over tree sizes against a plain step, for all stages that have some."""
    from matplotlib.figure import Figure  # noqa: PLC0415  # a machine may lack it

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, stage in report["stages"].items():
        times = {int(size): ms for size, ms in (stage.get("step_ms") or {}).items()}
        if times:
            first = times[min(times)]
            axes.plot([*times], [ms / first for ms in times.values()], "o-", label=f"{name} ({first:.2f} ms)")
    axes.axhline(1.0, color="grey", linewidth=0.8)
    axes.set(xlabel="nodes of a step", ylabel="time against a plain step", title=_card(report), xscale="log")
    if axes.get_lines()[1:]:
        axes.legend()
    figure.savefig(target, dpi=110)


def publish(report: Mapping[str, Any], plotted: Path | None, docs: Path) -> None:
    """Puts a report into the documentation: its files beside the page, and the table of all cards into it.

    Args:
        report: The report.
        plotted: Its plot; None without one.
        docs: The folder ``docs``.
    """
    folder = docs / "gpu_checks"
    folder.mkdir(exist_ok=True)
    name = re.sub(r"[^a-z0-9]+", "-", (report["machine"]["gpu"] or "none").lower()).strip("-")
    (folder / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (folder / f"{name}.md").write_text(as_markdown(report), encoding="utf-8")
    if plotted is not None:
        (folder / f"{name}.png").write_bytes(plotted.read_bytes())
    page = docs / "gpu.md"
    page.write_text(with_cards(page.read_text(encoding="utf-8"), sorted(folder.glob("*.json"))), encoding="utf-8")


def with_cards(page: str, reports: Iterable[Path]) -> str:
    """The page with the table of the newest report of each card."""
    rows = []
    for path in reports:
        report = json.loads(path.read_text(encoding="utf-8"))
        stages = report["stages"]
        overhead = stages.get("torch-steps", {}).get("overhead", {}).get("64")
        rates = [
            f"{name} {stages[name]['tokens_per_second']['auto']:.0f}"
            for name in ("tensorrt", "tensorrt-rtx", "onnxruntime-cuda")
            if "tokens_per_second" in stages.get(name, {})
        ]
        cells = [f"[{_card(report)}](gpu_checks/{path.stem}.md)", report["date"]]
        cells += ["" if overhead is None else f"{overhead:.2f}", ", ".join(rates)]
        rows.append(f"| {' | '.join(cells)} |\n")
    table = "No card has been measured yet.\n"
    if rows:
        table = "| card | date | 64 nodes against one, 7B sizes | tokens/s |\n|---|---|---|---|\n" + "".join(rows)
    return _BLOCK.sub(lambda match: f"{match[1]}{table}{match[2]}", page)
