"""A Jinja sandbox that bounds the work of a chat template: a template is a program that came with the model.

Jinja's own sandbox keeps a template from reaching other objects. It does not keep a template from running for ever, or
from making strings of gigabytes. So each operation of a render is charged to a budget:

- Each step of a loop, call, filter, operator and piece of output costs a constant.
- The result of an operation costs its size in bytes.
- Operations whose results can be much larger than their inputs (a width, a repetition, a replacement) are charged
  before they run.

The CPU time is bounded as well, for operations that are slow for their size.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Sized
from functools import wraps
from string import Formatter
from typing import Any

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.runtime import Context, str_join
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedEscapeFormatter, SandboxedFormatter
from jinja2.utils import generate_lorem_ipsum, pass_context
from markupsafe import Markup

from medusa_runtime.text.template_budget import NODE, STEP, render_budget
from medusa_runtime.text.template_costs import (
    FILTER_COSTS,
    METHOD_COSTS,
    OF_ELEMENTS,
    OF_PATHS,
    OPERATOR_COSTS,
    check_paths,
    checked_number,
    table_cost,
)

COMPARISONS = ("==", "!=", "<", "<=", ">", ">=", "eq", "equalto", "ne", "lt", "lessthan", "le", "gt", "greaterthan")
_TABLES = (str.maketrans, bytes.maketrans)
_DIGITS = re.compile(r"\d+")


def _charged_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    cost = FILTER_COSTS.get(name)
    first = 1 if getattr(function, "jinja_pass_arg", None) is not None else 0

    @wraps(function)
    def charged(*args: Any, **kwargs: Any) -> Any:
        budget, passed, values = render_budget(), args[:first], list(args[first:])
        budget.spend(STEP)
        check_paths([*(values[1:] if name in OF_PATHS else values[2:3] if name == "join" else ()), *kwargs.values()])
        if name in OF_ELEMENTS and values:
            if isinstance(values[0], str):
                budget.spend((NODE + 16) * len(values[0]))
            elif not isinstance(values[0], Sized) and isinstance(values[0], Iterable):
                values[0] = budget.charge(list(values[0]))
        if cost is not None and values:
            budget.spend(cost(*values, **kwargs))
        return budget.charge(function(*passed, *values, **kwargs))

    return charged


def _charged_test(function: Any) -> Callable[..., Any]:
    @wraps(function)
    def charged(*args: Any, **kwargs: Any) -> Any:
        render_budget().spend(STEP)
        return function(*args, **kwargs)

    return charged


class _BoundedFields(Formatter):
    """Formats the fields of ``str.format``: charges each, and bounds its width."""

    def format_field(self, value: Any, format_spec: str) -> Any:
        for width in _DIGITS.findall(format_spec):
            checked_number(int(width[:9]))
        render_budget().spend(render_budget().written_size(value))
        return render_budget().charge(super().format_field(value, format_spec))


class _BoundedFormatter(_BoundedFields, SandboxedFormatter):
    """``str.format`` with bounded fields."""


class _BoundedEscapeFormatter(_BoundedFields, SandboxedEscapeFormatter):
    """``str.format`` of HTML text with bounded fields."""


class _ChargedCode(CodeGenerator):
    """Compiles templates to Python code that also charges operations other than calls and filters."""

    def _output_const_repr(self, group: Iterable[Any]) -> str:
        return f"environment.charged({''.join(map(str, group))!r})"

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802 - Jinja's name
        self.write("environment.concatenated((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def visit_Call(self, node: nodes.Call, frame: Frame, forward_caller: bool = False) -> None:  # noqa: N802
        if isinstance(node.node, nodes.EnvironmentAttribute):  # templates can't write such a node: _parse added it
            self.write(f"environment.{node.node.name}()")
        else:
            super().visit_Call(node, frame, forward_caller=forward_caller)

    def visit_Compare(self, node: nodes.Compare, frame: Frame) -> None:  # noqa: N802
        self._wrapped("charged_comparison", super().visit_Compare, node, frame)

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:  # noqa: N802
        if isinstance(node.arg, nodes.Slice):
            self._wrapped("charged_slice", super().visit_Getitem, node, frame)
        else:
            super().visit_Getitem(node, frame)

    def visit_List(self, node: nodes.List, frame: Frame) -> None:  # noqa: N802
        self._wrapped("charged", super().visit_List, node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:  # noqa: N802
        self._wrapped("charged", super().visit_Dict, node, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:  # noqa: N802
        if node.ctx == "load":
            self._wrapped("charged", super().visit_Tuple, node, frame)
        else:
            super().visit_Tuple(node, frame)

    def _wrapped(self, name: str, visit: Callable[..., None], node: nodes.Expr, frame: Frame) -> None:
        self.write(f"environment.{name}(")
        visit(node, frame)
        self.write(")")


@pass_context
def _written(_: Context, value: Any) -> str:
    """A value as text of the output, charged."""
    budget = render_budget()
    if not isinstance(value, str):
        budget.spend(budget.written_size(value))
        value = str(value)
    budget.spend(STEP + sys.getsizeof(value))
    return value  # type: ignore[no-any-return]


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with charged operations. Templates are compiled and rendered inside ``bounded_render``."""

    code_generator_class = _ChargedCode
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, **options: Any) -> None:
        # Without the optimizer, which computes constant expressions while it compiles: these would not be charged.
        super().__init__(optimized=False, finalize=_written, **options)
        self.globals["lipsum"] = _lipsum

    def charge_filters(self) -> None:
        """Makes all filters and comparison tests charge the budget. Call it after the last filter was added."""
        for name, function in list(self.filters.items()):
            self.filters[name] = _charged_filter(name, function)
        for name in (*COMPARISONS, "ge", "in"):
            self.tests[name] = _charged_test(self.tests[name])

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        template = super()._parse(source, name, filename)
        for loop in template.find_all(nodes.For):
            loop.body.insert(0, nodes.ExprStmt(_charge_step_call()))
            if loop.test is not None:
                loop.test = nodes.And(_charge_step_call(), loop.test)
        return template

    def charge_step(self) -> bool:
        """Charges a step of a loop. Returns True, so that a loop's condition can contain the call."""
        render_budget().spend(STEP)
        return True

    def charged_comparison(self, value: Any) -> Any:
        """Charges a comparison and returns its result."""
        render_budget().spend(STEP)
        return value

    def charged(self, value: Any) -> Any:
        """Charges the value that an expression made, and returns it."""
        return render_budget().charge(value)

    def charged_slice(self, value: Any) -> Any:
        """Charges a slice of a sequence and returns it. Its elements exist already and cost nothing."""
        render_budget().spend(sys.getsizeof(value))
        return value

    def concatenated(self, parts: tuple[Any, ...]) -> str:
        """Concatenates values, as Jinja's ``~`` does, and charges the result."""
        render_budget().spend(2 * render_budget().written_size(parts))
        return str(str_join(parts))

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Calls a function for a template, and charges it."""
        budget = render_budget()
        budget.spend(STEP)
        owner = getattr(function, "__self__", None)
        if function in _TABLES:
            budget.spend(table_cost(*args))
        elif isinstance(owner, (str, bytes)):
            cost = METHOD_COSTS.get(function.__name__)
            if cost is not None:
                if function.__name__ == "join" and args and not isinstance(args[0], Sized):
                    args = (budget.charge(list(args[0])), *args[1:])
                budget.spend(cost(owner, *args, **{key: kwargs[key] for key in kwargs if not key.startswith("_")}))
        elif isinstance(owner, int):
            for number in (*args, *kwargs.values()):
                checked_number(number)
        return budget.charge(super().call(context, function, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Applies an operator whose result may be larger than its operands, and charges it."""
        budget = render_budget()
        if operator == "+" and isinstance(left, str) and isinstance(right, str):
            budget.spend(STEP + sys.getsizeof(left) + sys.getsizeof(right))
            return left + right
        budget.spend(STEP + OPERATOR_COSTS[operator](left, right))
        return budget.charge(super().call_binop(context, operator, left, right))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """``str.format`` and ``str.format_map`` with bounded fields; None for other functions."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        text = value.__self__

        @wraps(wrapped)
        def bounded(*args: Any, **kwargs: Any) -> str:
            if value.__name__ == "format_map":
                (kwargs,), args = args, ()
            if isinstance(text, Markup):
                return Markup(  # noqa: S704 - as Jinja does
                    _BoundedEscapeFormatter(self, escape=text.escape).vformat(text, args, kwargs)
                )
            return _BoundedFormatter(self).vformat(text, args, kwargs)

        return bounded


def _charge_step_call() -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute("charge_step"), [], [], None, None)


def _lipsum(n: int = 5, html: bool = True, min: int = 20, max: int = 100) -> str:  # noqa: A002 - Jinja's names
    render_budget().spend(16 * checked_number(n) * checked_number(max))
    return generate_lorem_ipsum(n, html, min, max)
