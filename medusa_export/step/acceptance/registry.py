"""The acceptance rules by name."""

from __future__ import annotations

from collections.abc import Sequence

from medusa_export.common.registry import Registry
from medusa_export.step.acceptance.exact import ExactRule
from medusa_export.step.acceptance.rule import AcceptanceRule
from medusa_export.step.acceptance.typical import TypicalRule

_RULES: Registry[AcceptanceRule] = Registry("acceptance rule", "medusa_export.acceptance_rules")


def register_rule(rule: AcceptanceRule) -> AcceptanceRule:
    """Makes a rule available by its name.

    Raises:
        ExtensionError: Another rule has that name.
    """
    return _RULES.register(rule.name, rule)


def rules_named(names: Sequence[str]) -> tuple[AcceptanceRule, ...]:
    """The rules of some names.

    Raises:
        ExtensionError: There is no rule of a name.
    """
    return tuple(_RULES.get(name) for name in names)


register_rule(ExactRule())
register_rule(TypicalRule())
