"""The quadratic nearest to log p under a Gaussian, from draws of it.

By Stein's identities its slope is E_q[grad log p], and its curvature E_q[(grad log p) s'], s = covariance^-1 (z - loc).
Both are taken of what a quadratic at hand does not explain, which leaves them less noise, none at all where log p is
that quadratic.
"""

from __future__ import annotations

import numpy as np

from toolkit.variational.density import LogDensity
from toolkit.variational.draws import Key, base_draws
from toolkit.variational.gaussians import Family, Member, Quadratic


def project(
    density: LogDensity, family: Family, member: Member, around: Quadratic, *, key: Key, draws: int
) -> Quadratic:
    """The quadratic nearest to log p under a member: the best control variate for it.

    Args:
        density: Log p(x, z).
        family: The family.
        member: Under which Gaussian.
        around: The quadratic at hand, which is returned where draws have no finite density.
        key: Random key.
        draws: How many, a power of two.
    """
    _, near = nearest_quadratic(density, family, member, around, base_draws(draws, family.base, key=key))
    return around if near is None else near


def nearest_quadratic(
    density: LogDensity, family: Family, member: Member, around: Quadratic, base: np.ndarray
) -> tuple[np.ndarray, Quadratic | None]:
    """What the quadratic at hand leaves of log p at each draw, (n,), in nats, and the quadratic nearest to log p.

    Args:
        density: Log p(x, z).
        family: The family.
        member: Under which Gaussian.
        around: The quadratic at hand.
        base: Base draws, (n, family.base).

    Returns:
        The rests, and the quadratic; None where what is left is not finite.
    """
    points = family.points(member, base)
    values, gradients = density.over(points)
    known, slopes = around.at(points)
    with np.errstate(over="ignore", invalid="ignore"):
        rests, left = values - known, gradients - slopes
    if not (np.isfinite(rests).all() and np.isfinite(left).all()):
        return rests, None
    _, at_loc = around.at_one(member.loc)
    scores = family.scores(member, base)
    if around.precision.ndim == 1:
        return rests, Quadratic(member.loc, at_loc + left.mean(0), around.precision - (left * scores).mean(0))
    bend = left.T @ scores / len(base)
    return rests, Quadratic(member.loc, at_loc + left.mean(0), around.precision - (bend + bend.T) / 2)
