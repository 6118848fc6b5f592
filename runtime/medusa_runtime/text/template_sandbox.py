"""Bounds on what a chat template may do: a template is a program, and came with the model.

Jinja's sandbox keeps a template from reaching other objects. It does not keep it from running for ever, or from making
strings of gigabytes. So each operation of a render is charged for: a step of a loop, a call, a filter, an operator and
a piece of output by a constant, and what it makes by its size in bytes. What can make more than it is given (a width, a
repetition, a replacement) is charged before it is done. CPU time is bounded besides, for what is slow for its size.
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
from medusa_runtime.text.template_work import NODE, STEP, work

COMPARISONS = ("==", "!=", "<", "<=", ">", ">=", "eq", "equalto", "ne", "lt", "lessthan", "le", "gt", "greaterthan")
_TABLES = (str.maketrans, bytes.maketrans)
_DIGITS = re.compile(r"\d+")


def _charged_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    cost = FILTER_COSTS.get(name)
    first = 1 if getattr(function, "jinja_pass_arg", None) is not None else 0

    @wraps(function)
    def charged(*args: Any, **kwargs: Any) -> Any:
        purse, passed, values = work(), args[:first], list(args[first:])
        purse.spend(STEP)
        check_paths([*(values[1:] if name in OF_PATHS else values[2:3] if name == "join" else ()), *kwargs.values()])
        if name in OF_ELEMENTS and values:
            if isinstance(values[0], str):
                purse.spend((NODE + 16) * len(values[0]))
            elif not isinstance(values[0], Sized) and isinstance(values[0], Iterable):
                values[0] = purse.made(list(values[0]))
        if cost is not None and values:
            purse.spend(cost(*values, **kwargs))
        return purse.made(function(*passed, *values, **kwargs))

    return charged


def _charged_test(function: Any) -> Callable[..., Any]:
    @wraps(function)
    def charged(*args: Any, **kwargs: Any) -> Any:
        work().spend(STEP)
        return function(*args, **kwargs)

    return charged


class _BoundedFields(Formatter):
    """Fields of bearable widths."""

    def format_field(self, value: Any, format_spec: str) -> Any:
        for width in _DIGITS.findall(format_spec):
            checked_number(int(width[:9]))
        work().spend(work().weigh(value))
        return work().made(super().format_field(value, format_spec))


class _BoundedFormatter(_BoundedFields, SandboxedFormatter):
    """``str.format``, bounded."""


class _BoundedEscapeFormatter(_BoundedFields, SandboxedEscapeFormatter):
    """The same for text that is HTML."""


class _ChargedCode(CodeGenerator):
    """Python code of a template that charges for what it does by itself, without a call or a filter."""

    def _output_const_repr(self, group: Iterable[Any]) -> str:
        return f"environment.made({''.join(map(str, group))!r})"

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802 - Jinja's name
        self.write("environment.joined((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def visit_Call(self, node: nodes.Call, frame: Frame, forward_caller: bool = False) -> None:  # noqa: N802
        if isinstance(node.node, nodes.EnvironmentAttribute):  # a template has none: it is ours
            self.write(f"environment.{node.node.name}()")
        else:
            super().visit_Call(node, frame, forward_caller=forward_caller)

    def visit_Compare(self, node: nodes.Compare, frame: Frame) -> None:  # noqa: N802
        self._wrapped("stepped", super().visit_Compare, node, frame)

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:  # noqa: N802
        if isinstance(node.arg, nodes.Slice):
            self._wrapped("sliced", super().visit_Getitem, node, frame)
        else:
            super().visit_Getitem(node, frame)

    def visit_List(self, node: nodes.List, frame: Frame) -> None:  # noqa: N802
        self._wrapped("made", super().visit_List, node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:  # noqa: N802
        self._wrapped("made", super().visit_Dict, node, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:  # noqa: N802
        if node.ctx == "load":
            self._wrapped("made", super().visit_Tuple, node, frame)
        else:
            super().visit_Tuple(node, frame)

    def _wrapped(self, name: str, visit: Callable[..., None], node: nodes.Expr, frame: Frame) -> None:
        self.write(f"environment.{name}(")
        visit(node, frame)
        self.write(")")


@pass_context
def _written(_: Context, value: Any) -> str:
    """A value as it is put out."""
    purse = work()
    if not isinstance(value, str):
        purse.spend(purse.weigh(value))
        value = str(value)
    purse.spend(STEP + sys.getsizeof(value))
    return value  # type: ignore[no-any-return]


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, in which templates are compiled and rendered inside of ``bounded_work``."""

    code_generator_class = _ChargedCode
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, **options: Any) -> None:
        # Nothing is reckoned beforehand, where no operation is charged for.
        super().__init__(optimized=False, finalize=_written, **options)
        self.globals["lipsum"] = _lipsum

    def charge_filters(self) -> None:
        """Has all filters and comparing tests charged for, once there are all of them."""
        for name, function in list(self.filters.items()):
            self.filters[name] = _charged_filter(name, function)
        for name in (*COMPARISONS, "ge", "in"):
            self.tests[name] = _charged_test(self.tests[name])

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        template = super()._parse(source, name, filename)
        for loop in template.find_all(nodes.For):
            loop.body.insert(0, nodes.ExprStmt(_step_call()))
            if loop.test is not None:
                loop.test = nodes.And(_step_call(), loop.test)
        return template

    def step(self) -> bool:
        """A step of a loop."""
        work().spend(STEP)
        return True

    def stepped(self, value: Any) -> Any:
        """What a comparison gave."""
        work().spend(STEP)
        return value

    def made(self, value: Any) -> Any:
        """What an expression made."""
        return work().made(value)

    def sliced(self, value: Any) -> Any:
        """A part of a sequence, whose elements are there already."""
        work().spend(sys.getsizeof(value))
        return value

    def joined(self, parts: tuple[Any, ...]) -> str:
        """What ``~`` makes of several values."""
        work().spend(2 * work().weigh(parts))
        return str(str_join(parts))

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Calls something from a template."""
        purse = work()
        purse.spend(STEP)
        owner = getattr(function, "__self__", None)
        if function in _TABLES:
            purse.spend(table_cost(*args))
        elif isinstance(owner, (str, bytes)):
            cost = METHOD_COSTS.get(function.__name__)
            if cost is not None:
                if function.__name__ == "join" and args and not isinstance(args[0], Sized):
                    args = (purse.made(list(args[0])), *args[1:])
                purse.spend(cost(owner, *args, **{key: kwargs[key] for key in kwargs if not key.startswith("_")}))
        elif isinstance(owner, int):
            for number in (*args, *kwargs.values()):
                checked_number(number)
        return purse.made(super().call(context, function, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Applies an operator that may make more than it is given."""
        purse = work()
        if operator == "+" and isinstance(left, str) and isinstance(right, str):
            purse.spend(STEP + sys.getsizeof(left) + sys.getsizeof(right))
            return left + right
        purse.spend(STEP + OPERATOR_COSTS[operator](left, right))
        return purse.made(super().call_binop(context, operator, left, right))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """``str.format`` and ``str.format_map``, bounded."""
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


def _step_call() -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute("step"), [], [], None, None)


def _lipsum(n: int = 5, html: bool = True, min: int = 20, max: int = 100) -> str:  # noqa: A002 - Jinja's names
    work().spend(16 * checked_number(n) * checked_number(max))
    return generate_lorem_ipsum(n, html, min, max)
