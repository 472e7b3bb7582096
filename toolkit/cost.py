"""What an inference cost."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """Time, work and memory of a fit or a reference.

    Attributes:
        compile_seconds: Wall-clock seconds in which programs were traced and compiled.
        run_seconds: Wall-clock seconds in which they ran.
        gradient_evaluations: Evaluations of the log density's gradient, at one point each.
        peak_bytes: The largest compiled program's arguments, results and temporaries, by the compiler's own account.
    """

    compile_seconds: float = 0.0
    run_seconds: float = 0.0
    gradient_evaluations: int = 0
    peak_bytes: int = 0

    @property
    def seconds(self) -> float:
        """Wall-clock seconds in all."""
        return self.compile_seconds + self.run_seconds

    def __add__(self, other: Cost) -> Cost:
        """The cost of both, one after the other: the larger peak counts."""
        return Cost(
            self.compile_seconds + other.compile_seconds,
            self.run_seconds + other.run_seconds,
            self.gradient_evaluations + other.gradient_evaluations,
            max(self.peak_bytes, other.peak_bytes),
        )
