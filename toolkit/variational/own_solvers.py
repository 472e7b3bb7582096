"""What a guide that brings its own algorithm is given, and what it gives back.

Coordinate ascent, expectation propagation, moment matching and sparse natural gradients are no cases of the solvers in
`toolkit.variational.solvers`: each knows more of its family, or maximises something else than the ELBO. Such a guide
has `Guide.solve`, a function from a `Problem` to a `Solved`; the rest (draws, densities, the ELBO on fresh draws, the
comparison) is that of any guide.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from toolkit.modelling.model import Model
from toolkit.modelling.space import Space
from toolkit.progress import Progress, silent
from toolkit.status import Status
from toolkit.variational.certificates import Certificate
from toolkit.variational.solvers.svi import Trace

if TYPE_CHECKING:
    from toolkit.variational.fits import Fit
    from toolkit.variational.starts import Starts


def check_chart(model: Model, chart: str, name: str) -> None:
    """Nothing, if a guide of that name, which brings its own algorithm, can look at the chart.

    Raises:
        ValueError: The chart has parameters of its own, which such an algorithm would leave where they begin.
    """
    if own := model.parameters(chart):
        raise ValueError(
            f"Expected a chart without parameters of its own for '{name}', whose algorithm does not learn them; "
            f"'{chart}' has {', '.join(own)}: take another one."
        )


@dataclass(frozen=True, eq=False)
class Problem:
    """A model and a family, for an algorithm that finds a member.

    Attributes:
        model: The model.
        chart: The model's chart that the guide looks at.
        space: The latent sites there.
        program: What the guide's `build` has made: a NumPyro guide, set up where it is an autoguide.
        key: Random key.
        tolerance: In nats: a gain that is no longer worth a step.
        max_gradients: The budget, in gradients of the log density at one point each.
        progress: Called between pieces of work.
        starts: The modes that searches led to, for a guide with `from_gaussian`; None for others.
        gaussian: The best full-rank Gaussian, usable, for such a guide; None for others.
        contained: Locations and sds, (size,) each, of factorised Gaussians fitted to the model before, which the family
            contains: none of them may end above.
    """

    model: Model
    chart: str
    space: Space
    program: Any
    key: jax.Array
    tolerance: float
    max_gradients: int
    progress: Progress = silent
    starts: Starts | None = None
    gaussian: Fit | None = None
    contained: tuple[tuple[np.ndarray, np.ndarray], ...] = ()


@dataclass(frozen=True, eq=False)
class Solved:
    """What an algorithm of a guide's own has found.

    Attributes:
        params: Parameters of the guide's program by name, constrained; empty if there is no approximation.
        status: How it ended.
        message: A detail on the status.
        solver: What the algorithm is called, such as `"coordinate ascent"`.
        why: What it does, for the report.
        trace: Its course; what `elbo` is there is said by `why` where it is no ELBO.
        certificate: How far the family's best may lie above; None where that is not known.
        elbo: The ELBO in nats, where the algorithm has it in closed form; it is held against fresh draws.
        log_evidence: The algorithm's own approximation of log p(x) in nats, which bounds nothing; None if it has none.
        optima: What the algorithm raises, in nats, at each distinct optimum that its starts led to, the one behind
            `params` first; empty if it does not tell optima apart.
        reached: How many starts led to each of `optima`.
        other_traces: The courses to the other optima.
        gradients: Gradients of the log density at one point each, or what took as long.
        compile_seconds: Spent on tracing and compiling.
        peak_bytes: What the largest program holds at once; 0 if not known.
    """

    params: dict[str, Any]
    status: Status
    message: str = ""
    solver: str = ""
    why: str = ""
    trace: Trace | None = None
    certificate: Certificate | None = None
    elbo: float | None = None
    log_evidence: float | None = None
    optima: tuple[float, ...] = ()
    reached: tuple[int, ...] = ()
    other_traces: tuple[Trace, ...] = ()
    gradients: int = 0
    compile_seconds: float = 0.0
    peak_bytes: int = 0
