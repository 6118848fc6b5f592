"""A verification as a table, as JSON and as JUnit XML."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from xml.etree import ElementTree

from rich import box
from rich.table import Table

from medusa_export.verification.checks import Check, Verification


def as_table(verification: Verification) -> Table:
    """Returns a table for a terminal, a line per check."""
    table = Table("check", "compared", "wrong", "figures", "", box=box.SIMPLE_HEAD)
    for check in verification.checks:
        verdict = "[green]pass[/green]" if check.passed else "[bold red]FAIL[/bold red]"
        table.add_row(check.name, f"{check.compared:,}", f"{check.mismatches:,}", _figures(check), verdict)
    return table


def _figures(check: Check) -> str:
    accepted = {name: value for name, value in check.figures.items() if name.startswith("accepted_")}
    if accepted:
        steps = ", ".join(f"{name.removeprefix('accepted_')}: {value:.0f}" for name, value in accepted.items())
        return f"steps by tokens accepted: {steps}"
    return ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in check.figures.items())


def as_json(verification: Verification) -> str:
    """Returns JSON with ``passed``, ``not_run``, ``tolerances`` and ``checks`` with their figures."""
    report = {
        "passed": verification.passed,
        "not_run": verification.not_run,
        "tolerances": asdict(verification.tolerances),
        "rounded": None if verification.rounded is None else asdict(verification.rounded),
        "checks": [
            {"passed": check.passed, **asdict(check), "figures": _finite_or_null(check)}
            for check in verification.checks
        ],
    }
    return json.dumps(report, indent=1, allow_nan=False) + "\n"


def _finite_or_null(check: Check) -> dict[str, float | None]:
    """Returns the figures, with None for NaN and infinity, which JSON lacks."""
    return {name: value if math.isfinite(value) else None for name, value in check.figures.items()}


def as_junit(verification: Verification) -> str:
    """Returns JUnit XML for CI systems, a test case per check."""
    skipped = verification.not_run
    failures = sum(not check.passed for check in verification.checks)
    suite = ElementTree.Element(
        "testsuite", name="medusa-export verify", tests=str(len(verification.checks) + (skipped is not None)),
        failures=str(failures), skipped=str(int(skipped is not None)),
    )  # fmt: skip
    if skipped is not None:
        case = ElementTree.SubElement(suite, "testcase", classname="medusa-export.verify", name="backend")
        ElementTree.SubElement(case, "skipped", message=skipped)
    for check in verification.checks:
        case = ElementTree.SubElement(suite, "testcase", classname="medusa-export.verify", name=check.name)
        if not check.passed:
            words = f"{check.mismatches} wrong of {check.compared} compared"
            ElementTree.SubElement(case, "failure", message=words).text = "\n".join(check.notes)
        ElementTree.SubElement(case, "system-out").text = "\n".join([_figures(check), *check.notes])
    ElementTree.indent(suite)
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"
