"""Checks of a verification, their tolerances, and the outcome."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Tolerances:
    """Largest differences between a bundle and its reference that pass.

    Attributes:
        max_abs: Largest absolute difference of a logit.
        cosine: Smallest cosine between the logits of one token.
        norm_ratio: Largest distance from 1 of the ratio between the norms of one token's logits.
        margin: Largest difference between two logits of the reference that makes the choice between them a tie.
        outliers: Largest share of tokens whose logits may differ by more, since rounding is coarse for a few of them.
            Numbers must be finite in any case.
    """

    max_abs: float
    cosine: float
    norm_ratio: float
    margin: float
    outliers: float = 0.0

    @classmethod
    def of(cls, dtype: str, *, rounds_activations: bool = False, kv_cache: str | None = None) -> Tolerances:
        """Returns the differences that rounding explains.

        In a cache of integers, a difference in the last bit of a key or value may become one of a 127th of the largest.

        Args:
            dtype: Type that the bundle computes in, such as ``float16``.
            rounds_activations: Products round their inputs to 8 bits, as they do with matrices of integers.
            kv_cache: Type that keys and values are stored in; None for ``dtype``.
        """
        if rounds_activations:
            return cls(max_abs=3.0, cosine=0.98, norm_ratio=0.1, margin=1.5, outliers=0.01)
        if kv_cache is not None:
            return cls(max_abs=1.5, cosine=0.995, norm_ratio=0.1, margin=0.5)
        if dtype == "float32":
            return cls(max_abs=1e-2, cosine=0.99999, norm_ratio=1e-3, margin=1e-4)
        return cls(max_abs=0.5, cosine=0.999, norm_ratio=2e-2, margin=0.25)


@dataclass
class Check:
    """A comparison and its result.

    Attributes:
        name: The name of what is compared.
        compared: Number of compared values or tokens. A check that compared none fails.
        mismatches: Number of them that were wrong.
        figures: Further figures, by name.
        notes: Sentences on ties, with their margins, and on the first mismatches.
    """

    name: str
    compared: int = 0
    mismatches: int = 0
    figures: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """True if something was compared and nothing was wrong."""
        return self.compared > 0 and self.mismatches == 0


@dataclass(frozen=True)
class Verification:
    """The outcome of a verification.

    Attributes:
        checks: The comparisons.
        tolerances: Differences that pass.
        not_run: The reason if this machine can't run the backend; otherwise None.
        rounded: Differences that pass where products may round their inputs to 8 bits; None if they do so nowhere.
    """

    checks: list[Check]
    tolerances: Tolerances
    not_run: str | None = None
    rounded: Tolerances | None = None

    @property
    def passed(self) -> bool:
        """True if the backend could run, and there was at least one check, and all passed."""
        return self.not_run is None and bool(self.checks) and all(check.passed for check in self.checks)
