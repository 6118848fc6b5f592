"""Identifiers of requests, answers and calls."""

from __future__ import annotations

import os
import re

import pytest

from medusa_runtime.server.ids import random_hex


@pytest.mark.parametrize("digits", [1, 9, 24, 48])
def test_an_identifier_has_its_number_of_digits(digits: int) -> None:
    assert all(re.fullmatch(f"[0-9a-f]{{{digits}}}", random_hex(digits)) for _ in range(100))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_made_by_fork_has_identifiers_of_its_own() -> None:
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write, random_hex(24).encode())
        os._exit(0)  # nothing of the test runner's may run in the child
    os.waitpid(child, 0)
    assert os.read(read, 24).decode() != random_hex(24)
