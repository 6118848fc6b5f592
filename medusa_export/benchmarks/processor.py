"""The processor of a bench, and its instructions that matter for the speed of matrix products."""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass
from pathlib import Path

# By the names that Linux has for them.
_INSTRUCTIONS = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_bf16": "AVX-512 BF16",
    "avx512_fp16": "AVX-512 FP16",
    "avx512_vnni": "AVX-512 VNNI",
    "avx_vnni": "AVX-VNNI",
    "amx_int8": "AMX INT8",
    "amx_bf16": "AMX BF16",
    "asimddp": "dot product",
    "i8mm": "I8MM",
    "sve": "SVE",
}


@dataclass(frozen=True)
class Processor:
    """A processor.

    Attributes:
        name: Its name.
        instructions: Its instructions for matrix products, such as ``AVX2``; None if they are not known.
    """

    name: str
    instructions: tuple[str, ...] | None


def processor(facts: Path = Path("/proc/cpuinfo")) -> Processor:
    """Returns this machine's processor.

    Args:
        facts: The system's description of its processors.
    """
    try:
        text = facts.read_text(encoding="utf-8")
    except OSError:  # not Linux
        return Processor(platform.processor() or platform.machine(), None)
    named = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*: (.*)$", text, re.MULTILINE)
    name = named.group(1) if named else platform.machine()
    found = set(flags.group(1).split()) if flags else set[str]()
    return Processor(name, tuple(text for flag, text in _INSTRUCTIONS.items() if flag in found))
