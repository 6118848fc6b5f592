"""The budget of chat templates: templates that take endless work are refused, and usual templates are not."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterable
from typing import Any

import pytest

from medusa_runtime import RequestError
from medusa_runtime.text.chat_template import render

DOUBLE = "{% set ns = namespace(x=SEED) %}{% for i in range(100) %}{% set ns.x = STEP %}{% endfor %}{{ ns.x }}"
BIG = "{% set big = 'xy' * 500000 %}"


def doubling(seed: str, step: str) -> str:
    return DOUBLE.replace("SEED", seed).replace("STEP", step)


BOMBS = {
    "nested loops": "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "a filtered loop": "{% for i in range(100000) %}{% for j in range(100000) if false %}{% endfor %}{% endfor %}",
    "a recursive loop": "{% for i in [[[]]] recursive %}{{ loop([[], []]) }}{% endfor %}",
    "loops with text": "{% for i in range(100000) %}{{ loop.length }}{% for j in range(99) %}x{% endfor %}{% endfor %}",
    "text in loops": "{% for i in range(100000) %}" + "x" * 10_000 + "{% endfor %}",
    "text in loops of a block": "{% set x %}{% for i in range(100000) %}" + "x" * 10_000 + "{% endfor %}{% endset %}",
    "a macro that calls itself": "{% macro m(n) %}{{ m(n - 1) * 2 + m(n - 1) if n }}{% endmacro %}{{ m(60) }}",
    "a caller": "{% macro m(n) %}{{ caller() }}{{ caller() }}{% endmacro %}"
    + "{% call m(1) %}" * 15 + "x" * 100_000 + "{% endcall %}" * 15,
    "blocks": "{% block a %}{{ self.b() * 2 }}{% endblock %}{% block b %}{{ self.a() * 2 }}{% endblock %}",
    "repetition": "{{ 'a' * 10 ** 9 }}",
    "repetition from the right": "{{ 10 ** 9 * 'a' }}",
    "a constant": "{% set x = 'a' * 1000000000 %}",
    "a constant filter": "{{ 'a'|center(1000000000) }}",
    "a constant of an option": "{% autoescape 'a'|center(1000000000) %}{% endautoescape %}",
    "ljust": "{{ 'a'.ljust(10 ** 9) }}",
    "center of bytes": "{{ 'a'.encode().center(10 ** 9) }}",
    "zfill": "{{ 'a'.zfill(10 ** 9) }}",
    "expandtabs": "{{ '\t'.expandtabs(10 ** 9) }}",
    "many tabs": BIG + "{{ ('\t' * 100000).expandtabs(10000) }}",
    "padded HTML": "{{ ('a'|safe).ljust(10 ** 9) }}",
    "replacement": BIG + "{{ big.replace('x', big) }}",
    "replacement of nothing": BIG + "{{ big.replace('', big) }}",
    "the filter of it": BIG + "{{ big|replace('y', big) }}",
    "translation": BIG + "{{ big.translate({120: big}) }}",
    "a table": BIG + "{% for i in range(90) %}{{ ''.maketrans(big, big) }}{% endfor %}",
    "join": BIG + "{{ big.join(range(10000)|map('string')) }}",
    "the filter join": BIG + "{{ range(10000)|join(big) }}",
    "join of one text": BIG + "{{ ([big] * 50000)|join }}",
    "concatenation": BIG + "{{ " + " ~ ".join(["big"] * 1000) + " }}",
    "addition": BIG + "{{ " + " + ".join(["big"] * 150) + " }}",
    "output": BIG + "{% set x %}" + "{{ big }}" * 1000 + "{% endset %}",
    "plain output": BIG + "{{ big }}" * 1000,
    "format": "{{ '{:1000000000}'.format(1) }}",
    "format of a width": "{{ '{:{}}'.format(1, 10 ** 9) }}",
    "format of one text": BIG + "{{ '" + "{0}" * 1000 + "'.format(big) }}",
    "format_map": "{{ '{x:1000000000}'.format_map({'x': 1}) }}",
    "per cent": "{{ '%1000000000d' % 1 }}",
    "per cent by name": "{{ '%(a)1000000000d' % {'a': 1} }}",
    "per cent by a name in brackets": "{{ '%(a(b))1000000000d' % {'a(b)': 1} }}",
    "per cent with zeros": "{{ '%01000000000d' % 1 }}",
    "precision": "{{ '%.1000000000f' % 1 }}",
    "per cent of a width": "{{ '%*d' % (10 ** 9, 1) }}",
    "per cent of one text": BIG + "{{ '" + "%(x)s" * 1000 + "' % {'x': big} }}",
    "the filter format": "{{ '%1000000000d'|format(1) }}",
    "indent": BIG + "{{ ('\n' * 100000)|indent(10000, blank=true) }}",
    "indent by a text": BIG + "{{ ('x\n' * 100000)|indent(big) }}",
    "wordwrap": BIG + "{{ big|wordwrap(1, wrapstring=big) }}",
    "tojson": "{{ [1]|tojson(indent=10 ** 9) }}",
    "tojson of a deep list": doubling("[]", "[ns.x]") + "{{ (range(90000)|list + [ns.x])|tojson(indent=9999) }}",
    "separators": BIG + "{{ range(100000)|list|tojson(separators=(big, big)) }}",
    "batch": "{{ [1]|batch(10 ** 9, 0)|list }}",
    "slice": "{{ [1]|slice(10 ** 9)|list }}",
    "round": "{{ 5|round(-10 ** 9) }}",
    "sum of lists": "{{ (range(100000)|batch(1)|list)|sum(start=[])|length }}",
    "bytes of a number": "{{ (5).to_bytes(10 ** 9, 'little') }}",
    "bytes of a number by name": "{{ (5).to_bytes(length=10 ** 9, byteorder='little') }}",
    "a power": "{{ 10 ** (10 ** 8) }}",
    "lipsum": "{{ lipsum(10 ** 9) }}",
    "long lipsum": "{{ lipsum(1, false, 10 ** 8, 10 ** 9) }}",
    "twice the text": doubling("'ab'", "ns.x + ns.x"),
    "twice the text by ~": doubling("'ab'", "ns.x ~ ns.x"),
    "twice the text by format": doubling("'ab'", "'%s%s' % (ns.x, ns.x)"),
    "twice the text by a block": "{% set ns = namespace(x='ab') %}{% for i in range(100) %}"
    "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}{% endfor %}",
    "twice the list": doubling("[1]", "ns.x + ns.x"),
    "twice the number": doubling("3", "ns.x * ns.x"),
    "a list of itself": doubling("[1]", "[ns.x, ns.x]"),
    "a tuple of itself": doubling("(1,)", "(ns.x, ns.x)"),
    "a dictionary of itself": doubling("{}", "{1: ns.x, 2: ns.x}"),
    "dict()": doubling("{}", "dict(a=ns.x, b=ns.x)"),
    "views": doubling("{1: 2}", "{1: ns.x.items(), 2: ns.x.items()}"),
    "a product of a list": doubling("[1]", "[ns.x] * 2"),
    "slices": doubling("[1]", "[ns.x, ns.x[:]]"),
    "batches": doubling("[1]", "[ns.x, ns.x]|batch(1)|list"),
    "comparisons": doubling("[1]", "[ns.x, ns.x]") + "{{ ns.x == ns.x }}",
    "a path": "{% set ns = namespace() %}{% set ns.a = ns %}"
    "{{ range(100000)|map('string')|list|map(attribute='" + "a." * 1000 + "a')|list|length }}",
    "a search from the right": BIG + "{% set part = 'z' + 'xy' * 200000 %}{{ big.rfind(part) }}",
    "a split": "{% set x = 'é,' * 1000000 %}{% for i in range(99) %}{% set y = x.split(',') %}{% endfor %}",
    "elements of a text": BIG + "{% for i in range(99) %}{% set y = big|list %}{% endfor %}",
    "tags": "{{ ('<!---->' * 100000)|striptags }}",
    "links": BIG + "{{ ('http://a.b ' * 100000)|urlize }}",
    "pprint": "{{ range(100000)|list|pprint }}",
    "undone": "{% for i in range(1000) %}{{ range(100000)|list|sort|length }}{% endfor %}",
}  # fmt: skip


SLOW = {"a filtered loop", "a macro that calls itself", "a path", "dict()", "loops with text", "undone", "views"}

CHILD = """
import json, resource, sys, time
from medusa_runtime.text.chat_template import render
from medusa_runtime.errors import MedusaError

render("{{ x|tojson }}{{ 'a'|wordwrap|urlize }}{{ lipsum() }}", x=1)  # imports the modules that these filters need
with open("/proc/self/statm") as file:
    present = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (present + 200 * 10**6,) * 2)
outcomes = {}
for name, bomb in json.load(sys.stdin).items():
    started = time.thread_time()
    try:
        said = f"gave {len(render(bomb, messages=[]))} characters"
    except MedusaError as error:
        said = str(error)
    outcomes[name] = said, time.thread_time() - started
print(json.dumps(outcomes))
"""


def exploded(names: Iterable[str]) -> list[str]:
    """Prints the bombs that took more than 5 seconds or 200 MB, or were not refused."""
    bombs = json.dumps({name: BOMBS[name] for name in names})
    result = subprocess.run([sys.executable, "-c", CHILD], input=bombs, capture_output=True, text=True, check=True)
    return [
        f"{name}: {seconds:.1f} s, {said}"
        for name, (said, seconds) in json.loads(result.stdout).items()
        if seconds > 5 or not re.search("too much work|maximum recursion depth", said)
    ]


@pytest.mark.slow
def test_bombs() -> None:
    assert not exploded(BOMBS.keys() - SLOW)


@pytest.mark.slow
def test_bombs_that_take_a_second() -> None:
    """These use up the whole budget."""
    assert not exploded(SLOW)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ ('a', 1) }}{{ [1, 'x'][1] }}{{ {'k': 2}.k }}", "('a', 1)x2"),
        ("{{ 'a' ~ 1 ~ [2] }}{{ '%s-%05d' % ('x', 7) }}{{ '{:>4}|{}'.format(1, 'y') }}", "a1[2]x-00007   1|y"),
        ("{{ '%(n)s' % {'n': 1} }}{{ '100000 of %s' % 5 }}{{ '%s *all*' % 3 }}", "1100000 of 53 *all*"),
        (
            "{{ 'a,b'.split(',')|join('+') }}{{ 'a b'.split() }}{{ 'x=y=z'.rsplit('=', 1) }}",
            "a+b['a', 'b']['x=y', 'z']",
        ),
        ("{{ [3, 1]|sort|list }}{{ [1, 2]|sum }}{{ [[1], [2]]|sum(start=[]) }}{{ 2 ** 10 }}", "[1, 3]3[1, 2]1024"),
        ("{{ 'x'.center(5) }}|{{ 'a\nb'|indent(2) }}|{{ 'abc'.replace('b', 'xx') }}", "  x  |a\n  b|axxc"),
        ("{{ [1, 2, 3][1:] }}{{ (1, 2) == (1, 2) }}{{ 'b' in 'abc' }}{{ 2 is eq 2 }}", "[2, 3]TrueTrueTrue"),
        ("{{ {'a': [1, 'é']}|tojson }}{{ {'a': 1}|tojson(indent=1) }}", '{"a": [1, "é"]}{\n "a": 1\n}'),
        ("{% for i in [1, 2, 3] if i != 2 %}{{ loop.index }}:{{ i }}{{ ',' if not loop.last }}{% endfor %}", "1:1,2:3"),
        ("{% for i in [1, [2]] recursive %}{{ loop(i) if i is sequence else i }}{% endfor %}", "12"),
        ("{% macro m(a, b=2) %}{{ a }}{{ b }}{{ caller() }}{% endmacro %}{% call m(1) %}c{% endcall %}", "12c"),
        ("{% set x %}a{{ 1 }}{% endset %}{{ x|upper }}{% filter upper %}b{{ x }}{% endfilter %}", "A1BA1"),
        ("{{ range(3)|map('string')|join }}{{ [{'a': {'b': 5}}]|map(attribute='a.b')|list }}", "012[5]"),
        ("{{ ('<b>'|e) ~ ('{}'|safe).format('<') }}{{ namespace(a=1).a }}", "&lt;b&gt;&lt;1"),
        ("{% set a, b = 1, 2 %}{{ a }}{{ b }}{% for k, v in {'x': 1}.items() %}{{ k }}{{ v }}{% endfor %}", "12x1"),
        ("{{ ''.join(range(3)|map('string')) }}{{ 'a'|list }}{{ undefined_name }}{{ none }}", "012['a']None"),
    ],
)
def test_usual_templates_are_not_changed_by_the_budget(template: str, expected: str) -> None:
    assert render(template, messages=[]) == expected


def test_long_chats_are_rendered() -> None:
    template = (
        "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content|trim + '<|im_end|>' }}"
        "{% for later in messages[loop.index:loop.index + 5] %}{{ later.role[0] }}{% endfor %}{% endfor %}"
    )
    messages: list[dict[str, Any]] = [{"role": "user", "content": "word " * 2_000}] * 200
    assert len(render(template, messages=messages)) > 2_000_000
    messages = [{"role": "user", "content": "word"}] * 20_000
    assert render(template, messages=messages).count("im_end") == 20_000


def test_concurrent_renders_have_a_budget_each() -> None:
    """A bomb in one thread does not use the budget of another thread's chat."""
    failed: list[Exception] = []

    def bomb() -> None:
        with pytest.raises(RequestError):
            render(BOMBS["twice the text"], messages=[])

    def chat() -> None:
        for _ in range(20):
            try:
                render("{{ 'x' * 1000000 }}", messages=[])
            except RequestError as error:
                failed.append(error)

    threads = [threading.Thread(target=target) for target in (bomb, chat, bomb, chat)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_a_templates_own_message_is_shortened() -> None:
    with pytest.raises(RequestError, match="refused") as caught:
        render("{{ raise_exception('x' * 1000000) }}", messages=[])
    assert len(str(caught.value)) < 2_000
    with pytest.raises(RequestError, match="could not render") as caught:
        render("{{ ('x' * 100000).missing.more }}", messages=[])
    assert len(str(caught.value)) < 2_000
    with pytest.raises(RequestError, match="could not render"):
        render("{{ strftime_now('%A' * 100000) }}", messages=[])
