"""How much the gradients that stochastic optimisers climb by vary, by estimator and number of draws."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from jax.flatten_util import ravel_pytree
from numpyro.distributions import Distribution
from scipy.stats import t

from toolkit.compilation import QUICK
from toolkit.estimate import Estimate
from toolkit.modelling.completion import BATCH
from toolkit.modelling.model import Model
from toolkit.modelling.space import latent_space
from toolkit.variational.autoguides import gaussian_form
from toolkit.variational.building import build_guide
from toolkit.variational.draws import check_key
from toolkit.variational.fits import Fit
from toolkit.variational.gradient_estimators import (
    BATCHES,
    ESTIMATORS,
    NEED_OTHERS,
    NEED_SCORE,
    REPARAMETERISED,
    SCORE,
    STICK_THE_LANDING,
    Pieces,
    Sums,
    add_batch,
    by_leaving_out,
    leave_out_error,
)
from toolkit.variational.guide_gradients import GuideGradients, Single, element_names, guide_gradients, moves
from toolkit.variational.guides import Guide, find_guide

_Z = 2.0  # standard errors below which a squared length is not told from zero
_ROUNDING = 1e-20  # of a variance: what is left of squares that cancel
_SURELY = 1e-6  # probability of any mean being told from zero that is zero; for one parameter about 5.8 errors
_SCORE_ROUNDING = 1e-9  # of the largest mean of a batch
_ASKED_AGAIN = 100_000  # draws
_MOST_PARAMETERS = 20_000  # means and squares of which, batch by batch, come to 200 MB
_COLUMNS = ("estimator", "draws", "parameter", "element", "mean", "mean_se", "variance", "variance_se")


@dataclass(frozen=True, eq=False, repr=False)
class GradientNoise:
    """How much estimators of one gradient vary, by how many draws each gradient is made from.

    Attributes:
        table: One row for each estimator, number of draws and parameter: `estimator`, `draws`, `parameter` (its name),
            `element` (such as `"[2]"`; empty for a number), `mean` of the gradient with `mean_se`, and `variance` of a
            single gradient with `variance_se`. All estimators of a gradient have the same mean.
        totals: One row for each estimator and number of draws: `variance`, the sum over parameters, with `variance_se`,
            and `relative`, that sum in units of `square`, with `relative_se`: below 1 a gradient is more signal than
            noise. NaN where the gradient itself is not told from zero, as at an optimum.
        square: The squared length of the gradient, by the estimator that varies least; noise can make it negative
            where the gradient is zero.
        absent: Estimators that there are none of, with the reason: they would be wrong for this guide, or some draw has
            no finite gradient.
        estimates: Gradients behind the variances for the largest number of draws; more for smaller ones.
    """

    table: pd.DataFrame
    totals: pd.DataFrame
    square: Estimate
    absent: Mapping[str, str]
    estimates: int
    _sums: Mapping[tuple[str, int], Sums] = field(default_factory=dict)

    def __repr__(self) -> str:
        """Such as `<GradientNoise: score, reparameterised from 1, 4 draws>`."""
        names, counts = (list(dict.fromkeys(self.totals[column])) for column in ("estimator", "draws"))
        return f"<GradientNoise: {', '.join(names)} from {', '.join(map(str, counts))} draws>"

    def equivalent_draws(self, estimator: str, of: str = REPARAMETERISED) -> Estimate:
        """How many draws of one estimator vary as little as one draw of another, all parameters together.

        Variances fall as one over the number of draws, which for estimators with a baseline holds when draws are many:
        these are taken at their largest number, the others at their smallest, of which most gradients are known.

        Args:
            estimator: Whose draws are counted.
            of: Whose one draw is to be matched.

        Raises:
            ValueError: One of them is not among the estimators here, or the other does not vary at all.
        """
        ends = []
        for name in (estimator, of):
            counts = [draws for known, draws in self._sums if known == name]
            if not counts:
                there = ", ".join(dict.fromkeys(known for known, _ in self._sums))
                raise ValueError(f"Expected an estimator that there is, one of {there}; got '{name}'.")
            count = max(counts) if name in NEED_OTHERS else min(counts)
            (_, whole), (_, without) = self._sums[name, count].moments()
            ends.append((count * whole.sum(), count * without.sum(1)))
        (above, above_without), (below, below_without) = ends
        if not below > 0:
            raise ValueError(f"Expected an estimator that varies, to count draws by; '{of}' does not: take another.")
        return by_leaving_out(above / below, above_without / below_without)


def gradient_noise(
    model: Model,
    guide: str | Guide,
    *,
    key: jax.Array,
    at: Fit | Mapping[str, Any] | None = None,
    moved: float = 0.0,
    draws: Sequence[int] = (1, 4, 16, 64),
    repeats: int = 400,
) -> GradientNoise:
    """How much each estimator of the ELBO's gradient varies, at a fit or at any other parameters of a guide.

    The gradient is that in the guide's unconstrained parameters, as NumPyro's SVI has them (a scale's is its softplus's
    inverse), in nats per unit of each. Parameters of the model itself, where its chart has any, are held.

    Args:
        model: The model.
        guide: A `Guide`, or its name.
        key: Random key.
        at: Where: a fit of this guide, or the guide's parameters by NumPyro's name, constrained, as `Fit.params` has
            them; those that are not given, or all if None, are where the guide begins.
        moved: Every location of a Gaussian guide is moved by so many of the guide's own sds first.
        draws: How many draws a gradient is made from.
        repeats: How many gradients of the largest number of draws are compared, at least 40; rounded up to a multiple
            of it.

    Raises:
        ValueError: An argument is not what it should be, the fit is of another model or guide, has failed, or the guide
            is a point mass, whose gradient has no noise.

    Reference:
        Mohamed, Rosca, Figurnov & Mnih (2020), Monte Carlo gradient estimation in machine learning.
    """
    guide = find_guide(guide, model)
    check_key(key)
    counts = _checked_counts(draws, repeats)
    program, params, guide = place(model, guide, at)
    with jax.enable_x64(True):
        found = guide_gradients(model, guide, program, params)
        if moved:
            found = found.at(_moved(model, guide, found, moved))
        return _measured(found.single, found.vector, found.names, found.absent, key, counts, repeats)


def expectation_gradients(
    f: Callable[[Any], Any],
    law: Callable[[Mapping[str, Any]], Distribution],
    params: Mapping[str, Any],
    *,
    key: jax.Array,
    draws: Sequence[int] = (1, 4, 16, 64),
    repeats: int = 400,
) -> GradientNoise:
    """How much each estimator of the gradient of E[f(z)] varies, for any f and any of NumPyro's distributions.

    Args:
        f: A number from a draw z; where it jumps, the reparameterised gradient leaves the jumps out and is wrong.
        law: The distribution of z, from the parameters, such as `lambda p: Normal(p["mu"], p["sigma"])`.
        params: Where; the gradient is that in these numbers as they are.
        key: Random key.
        draws: How many draws a gradient is made from.
        repeats: How many gradients of the largest number of draws are compared, at least 40; rounded up to a multiple
            of it.

    Raises:
        ValueError: An argument is not what it should be.
    """
    check_key(key)
    counts = _checked_counts(draws, repeats)
    with jax.enable_x64(True):
        vector, unravel = ravel_pytree({name: jnp.asarray(value, float) for name, value in params.items()})
        absent = {STICK_THE_LANDING: "f holds no log density of the draws, which is what it would hold fixed"}
        name = type(law(dict(params))).__name__
        if not law(dict(params)).has_rsample:
            absent[REPARAMETERISED] = f"{name} has no draws that move with its parameters"
        if moves(lambda _: lambda v: law(unravel(v)).support, vector):
            absent |= dict.fromkeys(NEED_SCORE, f"the support of {name} moves with its parameters")

        def single(vector: Any, key: Any) -> tuple[Any, Any, Any]:
            held, score, path = jax.lax.stop_gradient(law(unravel(vector)).sample(key)), None, None
            if SCORE not in absent:
                score = jax.grad(lambda v: jnp.sum(law(unravel(v)).log_prob(held)))(vector)
            if REPARAMETERISED not in absent:
                path = jax.grad(lambda v: jnp.sum(f(law(unravel(v)).sample(key))))(vector)
            return jnp.sum(f(held)), score, path

        return _measured(single, vector, element_names(unravel(vector)), absent, key, counts, repeats)


def _checked_counts(draws: Sequence[int], repeats: int) -> tuple[int, ...]:
    counts = tuple(draws) if isinstance(draws, Sequence) and not isinstance(draws, str) else (draws,)
    if not counts or not all(isinstance(count, Integral) and count > 0 for count in counts):
        raise ValueError(f"Expected draws to be positive whole numbers, such as (1, 16); got {draws!r}.")
    if not isinstance(repeats, Integral) or repeats < BATCHES:
        raise ValueError(f"Expected repeats to be a whole number of at least {BATCHES}; got {repeats!r}.")
    return tuple(sorted(set(counts)))


def place(
    model: Model, guide: Guide, at: Fit | Mapping[str, Any] | None
) -> tuple[Callable[..., Any], Mapping[str, Any], Guide]:
    """The guide's NumPyro program, the parameters that are given, and the guide as it was fitted."""
    if isinstance(at, Fit):
        if at.model is not model or at.guide.name != guide.name:
            raise ValueError(
                f"Expected a fit of '{guide.name}' to this very model '{model.name}'; got one of '{at.guide.name}' to "
                f"'{at.model.name}'."
            )
        if not at.usable:
            raise ValueError(f"Expected a fit that has parameters; '{guide.name}' has none: {at.status.value}.")
        return at.autoguide, at.params, at.guide
    if not isinstance(at, Mapping | None):
        raise ValueError(  # noqa: TRY004 - misuse is a ValueError everywhere
            f"Expected at to be a fit, or parameters by name; got {at!r}."
        )
    space = latent_space(model, guide.chart or model.chart)
    return build_guide(model, guide, space.unravel(np.zeros(space.size))), at or {}, guide


def _moved(model: Model, guide: Guide, found: GuideGradients, sds: float) -> dict[str, Any]:
    """The guide's parameters with every location moved by so many of its own sds."""
    if isinstance(sds, bool) or not isinstance(sds, Real):
        raise ValueError(  # noqa: TRY004 - misuse is a ValueError everywhere
            f"Expected moved to be a number of sds; got {sds!r}."
        )
    form = gaussian_form(found.program, latent_space(model, guide.chart or model.chart))
    if form is None or form.around is not None or not math.isfinite(sds):
        raise ValueError(
            f"Expected a Gaussian guide and a finite number of sds to move it by; got '{guide.name}' and {sds}: give "
            "the parameters themselves instead."
        )
    member = form.member(found.params)
    return form.params(replace(member, loc=member.loc + sds * np.sqrt(member.variances)))


def _measured(
    single: Single,
    vector: Any,
    names: Sequence[tuple[str, str]],
    absent: Mapping[str, str],
    key: jax.Array,
    draws: tuple[int, ...],
    repeats: int,
) -> GradientNoise:
    """The noise of every estimator that can be had."""
    if len(names) > _MOST_PARAMETERS:
        raise ValueError(f"Expected a guide of at most {_MOST_PARAMETERS:,} parameters; got {len(names):,}.")
    left, sums, score_means = set(ESTIMATORS) - absent.keys(), dict[tuple[str, int], Sums](), list[np.ndarray]()
    most, rows = max(draws), -(-repeats // BATCHES)
    lost = {REPARAMETERISED: 0, SCORE: 0}  # draws without a finite gradient along the path, and by the score
    for value, score, path in _pieces(single, vector, key, rows * most) if left else ():
        for name, part in ((REPARAMETERISED, path), (SCORE, score)):
            if part is not None:
                lost[name] += int((~(np.isfinite(value) & np.isfinite(part).all(1))).sum())
        if score is not None:
            score_means.append(score.mean(0))
        if not any(lost.values()):
            parts = [part if part is None else part.reshape(rows, most, *part.shape[1:]) for part in (score, path)]
            add_batch(sums, Pieces(value.reshape(rows, most), *parts), draws, left)
    told = dict(absent)
    if any(lost.values()):
        reason = f"of {BATCHES * rows * most:,} draws, {max(lost.values()):,} have no finite value or gradient"
        told, sums = told | dict.fromkeys(left, reason), {}
    elif score_means and _off_zero(np.stack(score_means)) and (biased := _surely_off_zero(single, vector, key)):
        reason = (
            f"the score's own mean is not 0 but, over the draws, {biased[1]} in {''.join(names[biased[0]])}: a support "
            "or a point mass moves with the parameters, or a density is wrong"
        )
        told |= dict.fromkeys(left & NEED_SCORE, reason)
        sums = {known: total for known, total in sums.items() if known[0] not in NEED_SCORE}
    return _told(sums, names, {name: told[name] for name in ESTIMATORS if name in told})


def _off_zero(means: np.ndarray) -> tuple[int, Estimate] | None:
    """The first parameter whose score surely has a mean, from means of batches (batch, parameter), with that mean.

    A score of which a mean is left is that of a law whose support moves, be it declared or not, and biases all that
    uses it.
    """
    count, size = means.shape
    mean, se = means.mean(0), means.std(0, ddof=1) / count**0.5
    # A constant score has an error of rounding alone; so may have one that cancels to zero.
    rounding = _SCORE_ROUNDING * float(np.abs(means).max())
    off = np.flatnonzero(np.abs(mean) > float(t.isf(_SURELY / (2 * size), count - 1)) * se + rounding)
    return (int(off[0]), Estimate(float(mean[off[0]]), float(se[off[0]]))) if off.size else None


def _surely_off_zero(single: Single, vector: Any, key: jax.Array) -> tuple[int, Estimate] | None:
    """The same over many fresh draws: few draws of a skewed score would seem off too often."""
    pieces = _pieces(single, vector, jax.random.fold_in(key, 1), _ASKED_AGAIN // BATCHES)
    return _off_zero(np.stack([score.mean(0) for _, score, _ in pieces]))


def _pieces(single: Single, vector: Any, key: jax.Array, count: int) -> Iterator[tuple[Any, Any, Any]]:
    """What is known of so many draws, batch by batch."""

    def many(keys: Any, vector: Any) -> Any:
        return jax.lax.map(lambda one: single(vector, one), keys, batch_size=BATCH)

    keys = jax.random.split(key, BATCHES * count)
    keys = keys.reshape(BATCHES, count, *keys.shape[1:])
    program = jax.jit(many).lower(keys[0], vector).compile(QUICK)
    for batch in keys:
        yield jax.device_get(program(batch, vector))


def _told(
    sums: Mapping[tuple[str, int], Sums], names: Sequence[tuple[str, str]], absent: Mapping[str, str]
) -> GradientNoise:
    """Sums as tables."""
    square, square_without = _square(sums)
    tables, totals = [], []
    largest = max((float(total.moments()[0][1].sum()) for total in sums.values()), default=0.0)
    rounding = _ROUNDING * largest  # of means whose terms cancel
    for (name, draws), total in sums.items():
        (mean, variance), (_, without) = total.moments()
        tables.append(
            pd.DataFrame(
                {
                    "estimator": name,
                    "draws": draws,
                    "parameter": [parameter for parameter, _ in names],
                    "element": [element for _, element in names],
                    "mean": mean[0],
                    "mean_se": np.sqrt(variance[0] / total.estimates),
                    "variance": variance[0],
                    "variance_se": leave_out_error(without),
                }
            )
        )
        whole = by_leaving_out(variance.sum(), without.sum(1))
        relative = Estimate(math.nan, math.nan)
        if square.value > max(_Z * square.se, rounding):
            relative = by_leaving_out(whole.value / square.value, without.sum(1) / square_without)
        totals.append((name, draws, *whole, *relative))
    columns = ["estimator", "draws", "variance", "variance_se", "relative", "relative_se"]
    table = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=list(_COLUMNS))
    fewest = min((total.estimates for total in sums.values()), default=0)
    return GradientNoise(table, pd.DataFrame(totals, columns=columns), square, absent, fewest, sums)


def _square(sums: Mapping[tuple[str, int], Sums]) -> tuple[Estimate, np.ndarray]:
    """The squared length of the mean gradient by the estimator that varies least, and without each batch in turn."""
    if not sums:
        return Estimate(math.nan, math.nan), np.empty(0)

    def length(moments: tuple[np.ndarray, np.ndarray], count: Any) -> np.ndarray:
        mean, variance = moments
        return np.asarray(np.square(mean).sum(1) - variance.sum(1) / count)  # the mean's own noise is taken off

    best = min(sums.values(), key=lambda total: float(total.moments()[0][1].sum()) / total.estimates)
    whole, without = best.moments()
    left_out = length(without, best.estimates - np.array(best.counts))
    return by_leaving_out(float(length(whole, best.estimates)[0]), left_out), left_out
