"""The Gaussian that is nearest to the posterior by KL(p || q): the one with the mean and covariance of its draws.

Other guides are fitted by KL(q || p), which is the ELBO seen from the evidence. Turned round, the divergence is

    KL(p || q)  =  E_p[ log p(z | x) ]  -  E_p[ log q(z) ],

and over an exponential family the second term is least where q has p's own mean statistics: mean and covariance for a
Gaussian, mean and variances for one that factorises. So q covers all of the posterior, also what lies between modes,
where KL(q || p) picks one. It takes draws of the posterior, and is no way to do without them; it shows what a family
could hold, and which of its errors belong to the direction and not to the family. Where the posterior has no variance,
as a Cauchy's, there is no such Gaussian, though any draws have one.

Texts differ in which of the two is called forward; here KL(p || q) is.

References:
    Bishop (2006), Pattern Recognition and Machine Learning, sections 10.1.2 and 10.7 (equation 10.187).
    Minka (2005), Divergence measures and message passing, Microsoft Research technical report 173, section 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from toolkit.modelling.model import Model
from toolkit.modelling.points import points
from toolkit.status import Status
from toolkit.variational.autoguides import gaussian_form
from toolkit.variational.gaussians import Member
from toolkit.variational.guides import GUIDES, Guide
from toolkit.variational.own_solvers import Problem, Solved

FULL_RANK, MEAN_FIELD = "full_rank", "mean_field"
STRUCTURES = (FULL_RANK, MEAN_FIELD)
MOMENTS = "moments"
"""What fits that took their moments from draws have as `Fit.solver`."""

_SINGULAR = 1e-8  # of a coordinate's sd: what the others leave of it where it is no more than rounding


def forward_kl_guide(draws: Mapping[str, Any], *, structure: str = FULL_RANK, name: str = "") -> Guide:
    """The family of Gaussians in unconstrained space, fitted by KL(p || q) to draws of the posterior.

    Args:
        draws: Of every latent site of the model as it is written (the plain chart), in constrained space,
            `(draws, ...)` each; further sites are ignored. Draws other than those with which the fit is compared, or it
            is judged by what it was fitted to.
        structure: `"full_rank"` (mean and covariance) or `"mean_field"` (mean and variances).
        name: What the report calls it; `"forward_"` and the structure if empty.

    Raises:
        ValueError: The structure is neither, or there are no draws, unequally many, or some that are not finite.
    """
    if structure not in STRUCTURES:
        raise ValueError(f"Expected structure to be one of {', '.join(STRUCTURES)}; got '{structure}'.")
    if not isinstance(draws, Mapping):
        raise ValueError(  # noqa: TRY004 - misuse is a ValueError everywhere
            f"Expected draws by site, as {{'mu': values}}; got {type(draws).__name__}."
        )
    kept = {site: np.asarray(values, float) for site, values in draws.items()}
    counts = {site: len(values) if values.ndim else 0 for site, values in kept.items()}
    if len(set(counts.values())) != 1 or not min(counts.values()):
        told = ", ".join(f"{site} {count}" for site, count in counts.items()) or "none"
        raise ValueError(f"Expected equally many draws of each site, as (draws, ...); got {told}.")
    if broken := [site for site, values in kept.items() if not np.isfinite(values).all()]:
        raise ValueError(f"Expected finite draws; got others of {', '.join(broken)}.")
    family = GUIDES[structure]
    return Guide(
        name or f"forward_{structure}",
        family.build,
        label=f"{family.label}, moments",
        solve=_MatchMoments(kept, structure),
        climbs=False,
    )


@dataclass(frozen=True, eq=False)
class _MatchMoments:
    """Gives a Gaussian autoguide the moments of draws, for `Guide.solve`."""

    draws: Mapping[str, np.ndarray]
    structure: str

    def __call__(self, problem: Problem) -> Solved:
        """The member with the draws' moments in the guide's chart.

        Raises:
            ValueError: A latent site is missing or its draws have another shape than it has, the chart cannot be
                inverted, a draw lies on the edge of its support, or a covariance cannot be had from these draws.
        """
        _check_shapes(problem.model, self.draws)
        vectors = points(problem.model, self.draws, problem.chart).vectors
        count, size = vectors.shape
        if not np.isfinite(vectors).all():
            broken = int((~np.isfinite(vectors).all(1)).sum())
            raise ValueError(
                f"Expected draws inside their supports, which unconstrained space has places for; of {count:,} draws, "
                f"{broken:,} lie on an edge or outside."
            )
        form = gaussian_form(problem.program, problem.space)
        assert form is not None
        loc, scale = vectors.mean(0), vectors.std(0)
        full = self.structure == FULL_RANK
        if count <= (size if full else 1) or not (scale > 0).all():
            raise ValueError(
                f"Expected more than {size if full else 1:,} draws, not all alike in any coordinate, for the "
                f"{'covariance' if full else 'variances'} of {size:,} coordinates; got {count:,} draws."
            )
        if full:
            # By QR and not from the covariance itself, which would square the condition number.
            root = np.linalg.qr((vectors - loc) / np.sqrt(count), mode="r").T
            own = np.abs(np.diag(root)) / scale
            if not (own > _SINGULAR).all():
                raise ValueError(
                    f"Expected draws whose {size:,} coordinates vary on their own; coordinate {int(own.argmin())} "
                    "follows from those before it: thin out copies of draws, draw more, or fit structure='mean_field'."
                )
            member = Member(loc, factor=root * np.sign(np.diag(root)))
        else:
            member = Member(loc, scale=scale)
        moments = "mean and covariance" if full else "mean and variances"
        return Solved(
            form.params(member),
            Status.ARRIVED,
            solver=MOMENTS,
            why=f"KL(p || q) is least where q has the {moments} of the posterior, here of {count:,} draws: if they are "
            f"independent, means are known to {count**-0.5:.2g} sd and sds, where tails are those of a Gaussian, to a "
            f"share of {(2 * count) ** -0.5:.2g}, which no error in the tables has in it",
        )


def _check_shapes(model: Model, draws: Mapping[str, np.ndarray]) -> None:
    """Draws of a latent site have the site's shape behind their number."""
    for name in model.latents:
        shape = model.sites[name].shape
        if name in draws and draws[name].shape[1:] != shape:
            wanted = ", ".join(["draws", *map(str, shape)])
            raise ValueError(
                f"Expected draws of '{name}' as ({wanted}); got {draws[name].shape}: flatten the chains first, if that "
                "is what they are."
            )
