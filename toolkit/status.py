"""How a fit or a reference ended, as values whose texts are the sentences a reader sees."""

from __future__ import annotations

from enum import Enum


class Status(Enum):
    """The outcome of a fit or of a reference; the value is the sentence that the report prints.

    A statistical failure is a value and not an exception, so that one guide's failure never loses
    another guide's work. `Status.ok` tells whether numbers may be read as what they are named, `Status.has_optimum`
    whether a fit's ELBO means anything.
    """

    ARRIVED = "the optimiser arrived: going on no longer raises the ELBO"
    BUDGET = "the optimiser used up its budget before the ELBO was known to have stopped rising"
    UNPROVEN = "the limit on how far the family's best may lie above is higher than the tolerance"
    TOO_FEW_DRAWS = "draws are too few for the family's parameters: they can be fitted to any draws that are affordable"
    AWAY = "some units were not found at their modes, so that the family is not the one that was meant"
    NOISY = "the ELBO is too noisy to tell whether it still rises"
    BELOW_SMALLER_FAMILY = "a smaller family that this one contains has a higher ELBO: the optimiser is at fault"
    NO_VALID_START = "no start was found at which the model's density is finite"
    UNBOUNDED = "the ELBO has no upper bound: the density rises without end, as where a scale shrinks onto a data point"
    IMPROPER = "location or scale grow without end: the posterior may be improper"
    FLAT = "the density is the same all along a line: the posterior is improper"
    DIVERGED = "the ELBO became NaN or infinite and did not recover"
    WEIGHTS = "its importance weights rest on few draws and cannot repair it"
    FAILED = "an error stopped it"

    EXACT = "independent draws from the exact posterior, which is known for this model"
    PASSED = "NUTS passed every check"
    LOADED = "draws from elsewhere passed every check that draws alone allow"
    RHAT = "the chains disagree (R-hat above the limit)"
    FEW_DRAWS = "too few effective draws"
    DIVERGENCES = "NUTS met divergent transitions"
    LOW_ENERGY = "the energy was explored too slowly (E-BFMI below the limit)"

    @property
    def ok(self) -> bool:
        """Whether the numbers that come with this status may be used for a verdict."""
        return self in _OK

    def sentence(self, *, climbs: bool = True) -> str:
        """The sentence of a fit that ended so; another one where its algorithm does not climb the ELBO."""
        return self.value if climbs else _UNCLIMBED.get(self, self.value)

    @property
    def has_optimum(self) -> bool:
        """Whether a fit that ended so had an optimum to go to; else its numbers only say where it was stopped."""
        return self not in _NO_OPTIMUM


_OK = frozenset({Status.ARRIVED, Status.UNPROVEN, Status.EXACT, Status.PASSED, Status.LOADED})
_UNCLIMBED = {
    Status.ARRIVED: "the algorithm settled: going on no longer changes the approximation",
    Status.BUDGET: "the budget was used up before the algorithm had settled",
    Status.UNPROVEN: "the algorithm settled in part: what is left open is said beside it",
    Status.DIVERGED: "the algorithm did not settle",
}
_NO_OPTIMUM = frozenset(
    {Status.NO_VALID_START, Status.UNBOUNDED, Status.IMPROPER, Status.FLAT, Status.DIVERGED, Status.FAILED}
)
