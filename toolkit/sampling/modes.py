"""Why chains disagree: one is stuck, they sit in several modes, or labels have switched."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from arviz_stats.base import array_stats
from scipy.optimize import linear_sum_assignment

from toolkit.modelling.model import Model
from toolkit.modelling.scalars import Scalars

APART = 3.0
"""Within-chain sds between two neighbouring groups of chain means: what lies between them, no chain has visited."""

AT_EASE = 1.1
"""R-hat of a chain's own halves up to which it counts as agreeing with itself (Gelman & Rubin's first limit)."""

_STUCK = 0.05  # of the other chains' sds
_MOST_LABELS = 12  # nobody looks through more
_SAME = 1.0  # within-chain sds that relabelled chains may be apart on average


def tell_disagreement(model: Model, draws: Mapping[str, np.ndarray], scalars: Scalars) -> tuple[str, ...]:
    """A sentence where a chain is stuck, or where each agrees with itself and not all with each other; none else.

    Args:
        model: Whose draws they are.
        draws: Site name to `(chain, draw, ...)`.
        scalars: The same, scalar by scalar.
    """
    means, sds = scalars.values.mean(axis=1), scalars.values.std(axis=1)
    if len(means) < 2 or not np.isfinite(means).all():
        return ()
    within = np.sqrt(np.square(sds).mean(axis=0))
    varies = within > 0
    if not varies.any():
        return ()
    stuck = _stuck(sds[:, varies])
    if stuck:
        return (stuck,)
    ordered = np.sort(means[:, varies], axis=0)
    gaps = np.diff(ordered, axis=0) / within[varies]
    place, column = np.unravel_index(int(np.argmax(gaps)), gaps.shape)
    if gaps[place, column] < APART:
        return ()
    scalar = int(np.flatnonzero(varies)[column])
    if not _at_ease(scalars.values[:, :, scalar]):
        return ()
    low = means[:, scalar] <= ordered[place, column]
    sentence = (
        f"{_chains(np.flatnonzero(low))} and {_chains(np.flatnonzero(~low))} each agree with themselves and not with "
        f"each other: {scalars.names[scalar]} lies near {means[low, scalar].mean():.3g} in the ones and near "
        f"{means[~low, scalar].mean():.3g} in the others, {gaps[place, column]:.3g} within-chain sds apart. The "
        "posterior has several modes, and these chains do not tell how much of it lies in each."
    )
    switched = "" if model.labels else _switched(model, draws)
    return (sentence, switched) if switched else (sentence,)


def _stuck(sds: np.ndarray) -> str:
    """Which chain has hardly moved where the others did, by sds (chain, scalar); empty if none."""
    for chain, own in enumerate(sds):
        others = np.median(np.delete(sds, chain, axis=0), axis=0)
        moved = own[others > 0] / others[others > 0]
        if moved.size and np.median(moved) < _STUCK:
            return (
                f"Chain {chain + 1} has hardly moved: in half of all scalars its sd is below {_STUCK:.0%} of the other "
                "chains'. It is stuck, as where a step size fits one part of the posterior and not another: run it "
                "again with another seed, a longer warm-up or a higher target acceptance."
            )
    return ""


def _at_ease(values: np.ndarray) -> bool:
    """Whether the halves of each chain (chain, draw) agree with each other."""
    half = values.shape[1] // 2
    halves = np.stack([values[:, :half], values[:, half : 2 * half]], axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        own = array_stats.rhat(halves, chain_axis=1, draw_axis=2)
    return bool((np.nan_to_num(own, nan=math.inf) < AT_EASE).all())


def _chains(numbers: np.ndarray) -> str:
    names = [str(number + 1) for number in numbers]
    joined = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    return f"Chain {joined}" if len(names) == 1 else f"Chains {joined}"


def _switched(model: Model, draws: Mapping[str, np.ndarray]) -> str:
    """The site and axis by which another order of its elements reconciles the chains; empty if none does."""
    for name in model.latents:
        values = np.asarray(draws[name])
        for axis in range(2, values.ndim):
            count = values.shape[axis]
            if not 2 <= count <= _MOST_LABELS:
                continue
            rows = np.moveaxis(values, axis, 2).reshape(*values.shape[:2], count, -1)
            means, sds = rows.mean(axis=1), np.sqrt(np.square(rows.std(axis=1)).mean(axis=0)) + 1e-300
            before, after = _distances(means / sds.mean(axis=0))
            if before > APART and after < _SAME:
                place = axis - values.ndim
                return (
                    f"In another order of the {count} elements of '{name}' the chains agree: its labels have switched. "
                    f"Declare them, Labels({{'{name}': {place}, ...}}, by='{name}', count={count}) with every site "
                    "that carries the label, or give the elements an order in the model."
                )
    return ""


def _distances(means: np.ndarray) -> tuple[float, float]:
    """How far chains' means (chain, label, value) are apart at most, in sds: as they are, and in their best order."""
    before = after = 0.0
    for other in means[1:]:
        cost = np.square(means[0][:, None] - other[None]).mean(axis=-1)
        rows, columns = linear_sum_assignment(cost)
        before = max(before, math.sqrt(np.diagonal(cost).mean()))
        after = max(after, math.sqrt(cost[rows, columns].mean()))
    return before, after
