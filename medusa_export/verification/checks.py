"""What a verification consists of: checks, what passes, and the outcome."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Tolerances:
    """How far a bundle may be from its reference.

    Attributes:
        max_abs: Of logits.
        cosine: At least this, between logits of a token.
        norm_ratio: Between logits of a token, at most this far from 1.
        margin: Two logits of the reference that lie no further apart are a tie.
    """

    max_abs: float
    cosine: float
    norm_ratio: float
    margin: float

    @classmethod
    def of(cls, dtype: str) -> Tolerances:
        """What rounding explains, by the dtype of weights and cache."""
        if dtype == "float32":
            return cls(max_abs=1e-2, cosine=0.99999, norm_ratio=1e-3, margin=1e-4)
        return cls(max_abs=0.5, cosine=0.999, norm_ratio=2e-2, margin=0.25)


@dataclass
class Check:
    """One comparison: how much was compared, what came out, and whether that is good enough.

    Attributes:
        name: What was compared.
        compared: How many values or tokens; a check of none fails.
        mismatches: How many were wrong.
        figures: Further figures by name.
        notes: What a person should know: ties with their margins, the first mismatches.
    """

    name: str
    compared: int = 0
    mismatches: int = 0
    figures: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Something was compared, and nothing was wrong."""
        return self.compared > 0 and self.mismatches == 0


@dataclass(frozen=True)
class Verification:
    """The outcome of ``verify_bundle`` or of ``verify_backend``.

    Attributes:
        checks: What was compared.
        tolerances: What passes.
        not_run: Why nothing could be compared on this machine, if so.
    """

    checks: list[Check]
    tolerances: Tolerances
    not_run: str | None = None

    @property
    def passed(self) -> bool:
        """All checks passed, there was at least one, and the backend could be run."""
        return self.not_run is None and bool(self.checks) and all(check.passed for check in self.checks)
