"""The best ELBO of each Gaussian family on each posterior, from a long run of a method of its own.

    python benchmarks/yardsticks.py [POSTERIOR ...] [--guides full_rank ...] [--out benchmarks/yardsticks.csv]

What the toolkit's own fits are measured against, so that nothing of `toolkit.variational` is used here: of the toolkit
only `Model`'s log density. Families are NumPyro's, in unconstrained coordinates: AutoNormal (mean_field),
AutoLowRankMultivariateNormal with its default rank (low_rank), AutoMultivariateNormal (full_rank). Rows that are in
the table are skipped; each is written as soon as it is there.

Method. Coordinates y = C^-1 (z - m), with m and C C' from reference draws (or, without any, from the mean Hessian at
a first factorised fit). There q is N(a, T T'): T = L, lower triangular; T = C^-1 S, S diagonal; or T = [C^-1 S, V]
with V of `rank` columns; each is exactly the family. Adam climbs the reparameterised ELBO with the exact entropy on
antithetic draws, fresh in every step. The quadratic -1/2 (y - a)' A (y - a), whose mean is known, is taken out of every
estimate (a control variate); A is minus the mean Hessian of log p under q once there is a q. Steps fall by three
powers of ten in each round, and the iterates of the round's last quarter are averaged.

1. 20 starts: one from the best Gaussian fit to the reference (or to the full-rank optimum), 19 dispersed (reference
   draws, or random points up to 8 reference sds away; widths from 0.03 to 1 of the reference). All short, side by side.
   From d = 300 on there are only 4, whose columns but `starts` are empty.
2. The best three of them longer; only one of those that have arrived at the same height (within 0.05 nats).
3. The best of the three in rounds of 10,000 steps until `newton_gap` is within 0.01 nats of zero and known to that (its
   error at most 0.005), or `--rounds` are done.

Columns: `elbo` and `se` on 524,288 fresh antithetic draws. `newton_gap`: how many nats a Newton step from there
promises, 1/2 g' H^-1 g, with g the gradient on other 131,072 draws (in 8 batches, products only between different
ones, so that noise does not read as gap; its `newton_gap_se` by jackknife) and H the ELBO's curvature in location and
scale, that of a Gaussian target with the mean Hessian of this one; for full rank in the scale it is the Fisher
metric. `last_gain`: what the last round gained, paired on common draws. `starts`, of which `arrived` had come within
0.3 nats of an optimum by their own newton_gap; `optima_found`, how many different heights (0.5 nats apart) these had;
`at_best`, how many of them had the best; `spread`, best minus worst height among them. `bad_draws`: draws without a
finite density among the 524,288. `note` says where the run did not arrive. `seconds` were measured beside other work.

Settings changed while the table grew; every row stands by its own newton_gap. Short runs had 1,500 steps of 8 draws
in rows of 11,500 and 21,500 steps (3,000 of 16 now). Rounds had 20,000 steps in rows whose command says `--rounds 4`;
the six of them with 27,000 steps also had 64 draws a step, and 2,000 steps of 16 draws in the short runs.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import math
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp
import jax.scipy.sparse.linalg
import numpy as np
import optax
import scipy.linalg
import scipy.optimize
import targets_large
from numpyro.infer.util import unconstrain_fn

import models
from toolkit import Model

GUIDES = ("mean_field", "full_rank", "low_rank")  # in this order: low rank starts from full rank's optimum
CURATED: dict[str, tuple[str, dict[str, str]]] = {
    "collinear_logistic": ("collinear_logistic", {}),
    "poisson_glm": ("poisson_glm", {}),
    "hierarchical_regression": ("hierarchical_regression", {}),
    "linear_gaussian_ssm-unknown": ("linear_gaussian_ssm", {"scales": "unknown"}),
}
COLUMNS = (
    *("posterior", "guide", "d", "rank", "elbo", "se", "newton_gap", "newton_gap_se", "last_gain", "last_gain_se"),
    *("starts", "arrived", "optima_found", "at_best", "spread", "bad_draws", "steps", "seconds", "note", "command"),
)

SHORT_STEPS = 3_000
MIDDLE_STEPS = 4_000
LONG_STEPS = 10_000  # a round
BLOCK = 500  # steps in one compiled call
CHUNK = 512  # draws in one evaluation of gradients
BATCHES = 8
FINAL_DRAWS = 524_288
CHECK_DRAWS = 131_072
GAIN_DRAWS = 32_768
START_DRAWS = 4_096
DRAWS = 32  # in each step of a long run; the control variate leaves little noise
SHORT_DRAWS = 16  # twice as many from d = 100 on; with 8, full rank at d = 45 does not arrive
ARRIVED = 0.01  # nats
FAR = 8.0  # reference sds
LARGE = 300  # dimensions from which on there are fewer starts
DENSE = 700  # parameters up to which the scales' curvature is written down

Parameters = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """A posterior as a function of one flat vector.

    Attributes:
        name: The posterior's name.
        model: The model.
        shapes: Site name to the shape of its unconstrained value, in program order.
        draws: Reference draws in unconstrained space, `(draw, d)`; None where there are none.
    """

    name: str
    model: Model
    shapes: Mapping[str, tuple[int, ...]]
    draws: np.ndarray | None

    @property
    def size(self) -> int:
        """How many unconstrained scalars there are."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def log_density(self, flat: Any, arrays: Mapping[str, Any]) -> Any:
        """Log p(x, z) at one flat vector, in nats."""
        sites, first = {}, 0
        for name, shape in self.shapes.items():
            last = first + math.prod(shape)
            sites[name], first = flat[first:last].reshape(shape), last
        return self.model.log_density(sites, arrays)

    def flatten(self, sites: Mapping[str, Any]) -> Any:
        """Sites with any common leading axes as flat vectors with these axes."""
        lead = next(np.ndim(sites[name]) - len(shape) for name, shape in self.shapes.items())
        return jnp.concatenate([sites[n].reshape(*sites[n].shape[:lead], -1) for n in self.shapes], axis=-1)


def curated(name: str) -> Model:
    """A curated model with the options that its name stands for."""
    model, options = CURATED[name]
    return models.load(model).model(**options)


def load(name: str) -> Target:
    """A posterior by its name, with its reference draws where there are any.

    Raises:
        ValueError: There is none of that name.
    """
    if name in CURATED:
        model, reference = curated(name), None
    elif name in targets_large.names():
        model, reference = targets_large.load(name), None
        if model.exact:
            drawn = model.exact(jax.random.PRNGKey(0), 4_000)
            reference = {site: np.asarray(value)[None] for site, value in drawn.items()}
    else:
        posteriors = importlib.import_module("posteriors")
        model, reference = posteriors.load(name), posteriors.reference_draws(name)
    point = model.start(jax.random.PRNGKey(0), model.arrays)
    target = Target(name, model, {site: np.shape(value) for site, value in point.items()}, None)
    return target if reference is None else Target(name, model, target.shapes, _unconstrained(target, reference))


def _unconstrained(target: Target, reference: Mapping[str, np.ndarray]) -> np.ndarray:
    missing = [site for site in target.shapes if site not in reference]
    if missing:
        raise ValueError(f"Expected reference draws of {', '.join(target.shapes)}; {target.name} lacks {missing}.")
    rows = {site: reference[site].reshape(-1, *reference[site].shape[2:]) for site in target.shapes}
    bound, arrays = target.model.bound(), target.model.arrays
    back = jax.vmap(lambda sites: target.flatten(unconstrain_fn(bound, (), arrays, sites)))
    flat = np.asarray(back({site: jnp.asarray(value, float) for site, value in rows.items()}))
    bad = ~np.isfinite(flat).all(axis=1)
    if bad.any():
        raise ValueError(f"Expected reference draws inside their supports; {bad.sum()} of {target.name} are not.")
    return flat


class Family:
    """A Gaussian family in whitened coordinates: y = a + T noise, z = m + C y, frame = {m, C, inverse of C}."""

    def __init__(self, guide: str, size: int):
        self.guide, self.size = guide, size
        self.rank = {"mean_field": 0, "full_rank": size, "low_rank": int(round(size**0.5))}[guide]
        self.noises = size + self.rank if guide == "low_rank" else size

    def factor(self, given: Parameters, frame: Parameters) -> Any:
        """T, shape (d, noises)."""
        if self.guide == "full_rank":
            return jnp.tril(given["lower"], -1) + jnp.diag(jnp.exp(given["log_scale"]))
        scaled = frame["inverse"] * jnp.exp(given["log_scale"])
        return scaled if self.guide == "mean_field" else jnp.concatenate([scaled, given["columns"]], axis=1)

    def log_volume(self, given: Parameters, frame: Parameters) -> Any:
        """1/2 log det of q's covariance in the model's own unconstrained coordinates."""
        total = given["log_scale"].sum()
        if self.guide == "full_rank":
            return total + jnp.log(jnp.diag(frame["root"])).sum()
        if self.guide == "low_rank":
            outer = frame["root"] @ given["columns"] / jnp.exp(given["log_scale"])[:, None]
            total += jnp.linalg.slogdet(jnp.eye(self.rank) + outer.T @ outer)[1] / 2
        return total

    def gaussian_elbo(self, scales: Parameters, frame: Parameters, precision: Any) -> Any:
        """The scales' part of the ELBO on a Gaussian target of that precision (in y), up to a constant."""
        factor = self.factor(scales, frame)
        return self.log_volume(scales, frame) - (factor * (precision @ factor)).sum() / 2

    def fitted(self, frame: Parameters, loc: np.ndarray, precision: np.ndarray) -> Parameters:
        """The best of the family on the Gaussian N(loc, precision^-1) (in y)."""
        if self.guide == "full_rank":
            # precision = U' U with U lower triangular, so that U^-1 is a lower factor of the covariance.
            flipped = np.linalg.cholesky(precision[::-1, ::-1])[::-1, ::-1].T
            lower = scipy.linalg.solve_triangular(flipped, np.eye(self.size), lower=True)
            return {"a": loc, "log_scale": np.log(np.diag(lower)), "lower": np.tril(lower, -1)}
        inverse = np.asarray(frame["inverse"])
        plain = inverse.T @ precision @ inverse
        scale = 1 / np.sqrt(np.diag(plain))
        if self.guide == "mean_field":
            return {"a": loc, "log_scale": np.log(scale)}
        values, vectors = scipy.linalg.eigh(plain * np.outer(scale, scale), subset_by_index=(0, self.rank - 1))
        widths = np.sqrt(np.maximum(1 / np.maximum(values, 1e-12) - 1, 1e-2))
        start = {"log_scale": np.log(scale), "columns": inverse @ (scale[:, None] * vectors * widths)}
        return {"a": loc} | self._climbed(start, frame, precision)

    def _climbed(self, start: Parameters, frame: Parameters, precision: np.ndarray) -> Parameters:
        flat, back = jax.flatten_util.ravel_pytree(jax.tree.map(jnp.asarray, start))
        loss = jax.jit(jax.value_and_grad(lambda x: -self.gaussian_elbo(back(x), frame, precision)))
        found = scipy.optimize.minimize(loss, np.asarray(flat), jac=True, method="L-BFGS-B", options={"maxiter": 2_000})
        return jax.tree.map(np.asarray, back(jnp.asarray(found.x)))

    def moved(self, given: Parameters, old: Parameters, new: Parameters) -> Parameters:
        """The same Gaussian in another frame."""
        turn = new["inverse"] @ old["root"]
        moved = dict(given) | {"a": turn @ given["a"] + new["inverse"] @ (old["centre"] - new["centre"])}
        if self.guide == "full_rank":
            lower = turn @ np.asarray(self.factor(given, old))
            moved |= {"log_scale": np.log(np.diag(lower)), "lower": np.tril(lower, -1)}
        elif self.guide == "low_rank":
            moved["columns"] = turn @ given["columns"]
        return moved

    def dispersed(self, best: Parameters, loc: np.ndarray, width: float, random: np.random.Generator) -> Parameters:
        """A start at `loc`, `width` times as wide as the best Gaussian fit, with random low-rank columns."""
        start = dict(best) | {"a": loc, "log_scale": best["log_scale"] + np.log(width)}
        if self.guide == "full_rank":
            start["lower"] = best["lower"] * width
        if self.guide == "low_rank":
            start["columns"] = width * random.standard_normal((self.size, self.rank)) / np.sqrt(self.size)
        return start


def frame_of(centre: np.ndarray, root: np.ndarray) -> Parameters:
    """Centre, root (lower triangular) and its inverse, of whitened coordinates."""
    inverse = scipy.linalg.solve_triangular(root, np.eye(len(root)), lower=True)
    return {"centre": centre, "root": root, "inverse": inverse}


@dataclass
class Moments:
    """What draws say of one Gaussian: `values` (log density minus quadratic, one a pair), gradients by batch.

    `locations` is the mean gradient in a, `(batch, d)`, `factors` in T, `(batch, d, noises)`, without the entropy's.
    """

    values: np.ndarray
    locations: np.ndarray
    factors: np.ndarray

    def halved(self) -> Moments:
        """The same with two batches."""
        two = lambda batches: batches.reshape(2, -1, *batches.shape[1:]).mean(axis=1)  # noqa: E731
        return Moments(self.values, two(self.locations), two(self.factors))


class Climb:
    """The compiled programs of one target and family."""

    def __init__(self, target: Target, family: Family):
        self.target, self.family = target, family
        self.arrays = jax.tree.map(jnp.asarray, target.model.arrays)
        self.gradient = jax.value_and_grad(
            lambda y, frame, arrays: target.log_density(frame["centre"] + frame["root"] @ y, arrays)
        )
        self.alone = jax.jit(partial(self._block, draws=DRAWS))
        self.together = jax.jit(
            jax.vmap(
                partial(self._block, draws=SHORT_DRAWS if target.size < 100 else 2 * SHORT_DRAWS),
                in_axes=((0, 0, 0), None, None, None, None, None, None),
            )
        )
        self.chunk = jax.jit(self._chunk)
        self.value_chunk = jax.jit(self._values)
        self.hessians = jax.jit(self._hessians)
        self.curvature = jax.jit(jax.hessian(self._scale_loss))
        self.solve = jax.jit(self._solve, static_argnums=4)
        self.scale_gradient = jax.jit(self._scale_gradient)
        self.optimiser = optax.chain(optax.clip_by_global_norm(100 * math.sqrt(target.size)), optax.scale_by_adam())

    def _residuals(self, given: Parameters, noise: Any, frame: Any, precision: Any, arrays: Any) -> tuple[Any, ...]:
        """Log densities and gradients without the quadratic, and which draws are good; noise (draw, noises)."""
        offset = noise @ self.family.factor(given, frame).T
        values, gradients = jax.vmap(self.gradient, in_axes=(0, None, None))(given["a"] + offset, frame, arrays)
        pulled = offset @ precision
        good = jnp.isfinite(values) & jnp.isfinite(gradients).all(axis=1)
        values = jnp.where(good, values + (offset * pulled).sum(axis=1) / 2, 0.0)
        return values, jnp.where(good[:, None], gradients + pulled, 0.0), good

    def _ascent(self, given: Parameters, key: Any, frame: Any, precision: Any, arrays: Any, draws: int) -> Parameters:
        half = jax.random.normal(key, (draws // 2, self.family.noises))
        noise = jnp.concatenate([half, -half])
        _, residuals, _ = self._residuals(given, noise, frame, precision, arrays)
        factor, pull = jax.vjp(lambda p: self.family.factor(p, frame), given)
        (gradient,) = pull(residuals.T @ noise / draws - precision @ factor)
        volume = jax.grad(self.family.log_volume)(given, frame)
        return jax.tree.map(jnp.add, gradient, volume) | {"a": residuals.mean(axis=0)}

    def _block(
        self, state: Any, key: Any, rates: Any, weight: Any, frame: Any, precision: Any, arrays: Any, *, draws: int
    ) -> Any:
        def step(carry: Any, given: Any) -> tuple[Any, None]:
            parameters, memory, total = carry
            key, rate = given
            ascent = self._ascent(parameters, key, frame, precision, arrays, draws)
            change, memory = self.optimiser.update(ascent, memory)
            parameters = jax.tree.map(lambda p, c: p + rate * c, parameters, change)
            return (parameters, memory, jax.tree.map(lambda t, p: t + weight * p, total, parameters)), None

        return jax.lax.scan(step, state, (jax.random.split(key, rates.shape[0]), rates))[0]

    def climb(
        self, given: Parameters, frame: Parameters, precision: Any, key: Any, steps: int, rates: tuple[float, float]
    ) -> Parameters:
        """The averaged parameters after so many steps; with a leading axis where there are several starts."""
        together = np.ndim(given["a"]) == 2
        blocks = steps // BLOCK
        schedule = np.geomspace(*rates, blocks * BLOCK).reshape(blocks, BLOCK)
        averaged = max(blocks // 4, 1)
        given = jax.tree.map(jnp.asarray, given)
        memory = jax.vmap(self.optimiser.init)(given) if together else self.optimiser.init(given)
        state = (given, memory, jax.tree.map(jnp.zeros_like, given))
        for number, block in enumerate(schedule):
            key, own = jax.random.split(key)
            weight = jnp.asarray(float(number >= blocks - averaged) / (averaged * BLOCK))
            run = self.together if together else self.alone
            state = run(state, own, jnp.asarray(block), weight, frame, precision, self.arrays)
        return jax.tree.map(np.asarray, state[2])

    def _chunk(self, given: Parameters, key: Any, frame: Any, precision: Any, arrays: Any) -> tuple[Any, ...]:
        half = jax.random.normal(key, (CHUNK // 2, self.family.noises))
        noise = jnp.concatenate([half, -half])
        values, residuals, good = self._residuals(given, noise, frame, precision, arrays)
        pairs = values.reshape(2, -1).sum(axis=0) / jnp.maximum(good.reshape(2, -1).sum(axis=0), 1)
        pairs = jnp.where(good.reshape(2, -1).any(axis=0), pairs, jnp.nan)
        return pairs, residuals.mean(axis=0), residuals.T @ noise / CHUNK

    def _template(self) -> Callable[[Any], Parameters]:
        shapes: Parameters = {"log_scale": jnp.zeros(self.family.size)}
        if self.family.guide == "low_rank":
            shapes["columns"] = jnp.zeros((self.family.size, self.family.rank))
        return jax.flatten_util.ravel_pytree(shapes)[1]

    def _scale_loss(self, flat: Any, frame: Any, precision: Any) -> Any:
        return -self.family.gaussian_elbo(self._template()(flat), frame, precision)

    def _scale_gradient(self, scales: Any, frame: Any, factor: Any) -> Any:
        _, pull = jax.vjp(lambda p: self.family.factor(p, frame), scales)
        volume = jax.grad(self.family.log_volume)(scales, frame)
        return jax.flatten_util.ravel_pytree(jax.tree.map(jnp.add, pull(factor)[0], volume))[0]

    def _solve(self, flat: Any, gradients: Any, frame: Any, precision: Any, solves: int) -> Any:
        slope = jax.grad(self._scale_loss)
        # The damping keeps directions out that have no curvature.
        product = lambda v: jax.jvp(lambda x: slope(x, frame, precision), (flat,), (v,))[1] + 1e-4 * v  # noqa: E731
        return jax.lax.map(lambda g: jax.scipy.sparse.linalg.cg(product, g, maxiter=solves)[0], gradients)

    def moments(self, given: Parameters, frame: Parameters, precision: Any, key: Any, draws: int) -> Moments:
        """Expectations under one Gaussian; the same key gives the same noise."""
        given = jax.tree.map(jnp.asarray, given)
        chunks = max(draws // CHUNK, BATCHES)
        per_batch = chunks // BATCHES
        values = []
        size, noises = self.family.size, self.family.noises
        locations, factors = np.zeros((BATCHES, size)), np.zeros((BATCHES, size, noises))
        for number, own in enumerate(jax.random.split(key, per_batch * BATCHES)):
            pairs, location, factor = self.chunk(given, own, frame, precision, self.arrays)
            values.append(np.asarray(pairs))
            locations[number // per_batch] += np.asarray(location) / per_batch
            factors[number // per_batch] += np.asarray(factor) / per_batch
        factors -= np.asarray(precision @ self.family.factor(given, frame))
        return Moments(np.concatenate(values), locations, factors)

    def _values(self, given: Parameters, key: Any, frame: Any, precision: Any, arrays: Any) -> tuple[Any, Any]:
        half = jax.random.normal(key, (CHUNK // 2, self.family.noises))
        offset = jnp.concatenate([half, -half]) @ self.family.factor(given, frame).T
        points = frame["centre"] + (given["a"] + offset) @ frame["root"].T
        values = jax.vmap(self.target.log_density, in_axes=(0, None))(points, arrays)
        good = jnp.isfinite(values)
        values = jnp.where(good, values + (offset * (offset @ precision)).sum(axis=1) / 2, 0.0).reshape(2, -1)
        count = good.reshape(2, -1).sum(axis=0)
        return jnp.where(count, values.sum(axis=0) / jnp.maximum(count, 1), jnp.nan), (~good).sum()

    def values(self, given: Parameters, frame: Parameters, precision: Any, key: Any, draws: int) -> tuple[Any, int]:
        """Log density minus quadratic, one a pair of draws, and how many draws have no finite one."""
        given = jax.tree.map(jnp.asarray, given)
        parts = [
            self.value_chunk(given, own, frame, precision, self.arrays) for own in jax.random.split(key, draws // CHUNK)
        ]
        return np.concatenate([np.asarray(pairs) for pairs, _ in parts]), sum(int(bad) for _, bad in parts)

    def constant(self, given: Parameters, frame: Parameters, precision: Any) -> float:
        """What the ELBO holds beside the mean of `Moments.values`: the entropy, and the quadratic's own mean."""
        entropy = self.family.size / 2 * math.log(2 * math.pi * math.e)
        return float(self.family.gaussian_elbo(given, frame, precision)) + entropy

    def elbo(self, given: Parameters, frame: Parameters, precision: Any, values: np.ndarray) -> tuple[float, float]:
        """The ELBO with its Monte Carlo error, in nats, from `values` or `Moments.values`."""
        values = values[np.isfinite(values)]
        if not len(values):
            return -math.inf, math.nan
        mean, se = float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values)))
        return self.constant(given, frame, precision) + mean, se

    def _hessians(self, points: Any, frame: Any, arrays: Any) -> Any:
        gradient = jax.grad(lambda y: self.target.log_density(frame["centre"] + frame["root"] @ y, arrays))

        def one(y: Any) -> Any:
            columns = jnp.eye(self.family.size)
            column = lambda v: jax.jvp(gradient, (y,), (v,))[1]  # noqa: E731
            found = jax.lax.map(column, columns, batch_size=min(64, self.family.size))
            return jnp.where(jnp.isfinite(found).all(), found, 0.0), jnp.isfinite(found).all()

        found, good = jax.lax.map(one, points)
        return found.sum(axis=0), good.sum()

    def precision(self, given: Parameters, frame: Parameters, key: Any) -> np.ndarray:
        """Minus the mean Hessian of log p under the Gaussian, in y."""
        draws = 256 if self.family.size < LARGE else 32
        half = np.asarray(jax.random.normal(key, (draws // 2, self.family.noises)))
        offset = np.concatenate([half, -half]) @ np.asarray(self.family.factor(given, frame)).T
        total, good = self.hessians(jnp.asarray(given["a"] + offset), frame, self.arrays)
        mean = -np.asarray(total) / max(int(good), 1)
        return (mean + mean.T) / 2


def has_arrived(gap: float, error: float) -> bool:
    """Whether a Newton gap is small and known to be: noise can make a gap small, or negative, but not its error."""
    return abs(gap) <= ARRIVED and 2 * error <= ARRIVED


def newton_gap(
    climb: Climb, given: Parameters, frame: Parameters, precision: np.ndarray, moments: Moments, solves: int = 100
) -> tuple[float, float]:
    """What a Newton step promises, in nats, with its error; see the file's docstring."""
    family = climb.family
    values, vectors = np.linalg.eigh(precision)
    # A direction in which the mean Hessian is nearly flat or rises counts as a twentieth of the reference's curvature.
    location = moments.locations @ vectors / np.sqrt(np.maximum(values, 0.05))
    products = location @ location.T
    factor = np.asarray(family.factor(given, frame))
    if family.guide == "full_rank":
        seen = factor.T @ moments.factors
        # In the Fisher metric 1/2 |dM|^2 of a symmetric M, the squared gradient is 1/2 |M|^2.
        scale = (np.eye(family.size) + (seen + seen.transpose(0, 2, 1)) / 2).reshape(len(seen), -1)
        products += scale @ scale.T / 2
    else:
        products += _scale_products(climb, given, frame, precision, moments, solves)
    return _half_square(products)


def _scale_products(
    climb: Climb, given: Parameters, frame: Parameters, precision: np.ndarray, moments: Moments, solves: int
) -> np.ndarray:
    """g_i' H^-1 g_j for the gradients in the scales of batches i and j, `(batch, batch)`."""
    scales = {name: jnp.asarray(value) for name, value in given.items() if name != "a"}
    flat, back = jax.flatten_util.ravel_pytree(scales)
    gradients = np.stack([np.asarray(climb.scale_gradient(scales, frame, factor)) for factor in moments.factors])
    turns = np.zeros((len(flat), 0))
    if climb.family.rank > 1:
        turns = scipy.linalg.orth(_rotations(scales).T)
        gradients = gradients - gradients @ turns @ turns.T  # the noise along them means nothing
    if len(flat) > DENSE:
        solved = np.asarray(climb.solve(flat, jnp.asarray(gradients), frame, precision, solves))
        products = gradients @ solved.T
        return (products + products.T) / 2
    keep = scipy.linalg.null_space(turns.T) if turns.size else np.eye(len(flat))
    values, vectors = np.linalg.eigh(keep.T @ np.asarray(climb.curvature(flat, frame, precision)) @ keep)
    held = values > 1e-5 * values.max()
    steps = (gradients @ keep @ vectors[:, held]) / np.sqrt(values[held])
    return steps @ steps.T


def _rotations(scales: Parameters) -> np.ndarray:
    """Directions, one a row, that turn the columns among themselves and leave the Gaussian as it is."""
    columns, rows = np.asarray(scales["columns"]), []
    zero = {name: jnp.zeros_like(value) for name, value in scales.items()}
    for i in range(columns.shape[1]):
        for j in range(i):
            turned = np.zeros_like(columns)
            turned[:, i], turned[:, j] = columns[:, j], -columns[:, i]
            rows.append(np.asarray(jax.flatten_util.ravel_pytree(zero | {"columns": jnp.asarray(turned)})[0]))
    return np.stack(rows)


def _half_square(products: np.ndarray) -> tuple[float, float]:
    """Half the squared mean from `(batch, batch)` products, of different batches only, with a jackknife error."""
    products = products - np.diag(np.diag(products))
    batches = len(products)
    whole = float(products.sum() / (batches * (batches - 1)) / 2)
    if batches < 3:
        return whole, math.nan
    without = (products.sum() - 2 * products.sum(axis=1)) / ((batches - 1) * (batches - 2)) / 2
    return whole, math.sqrt((batches - 1) / batches * ((without - without.mean()) ** 2).sum())


@dataclass
class Search:
    """What the starts found: row columns, and the best three."""

    columns: dict[str, Any]
    best: list[Parameters] = field(default_factory=list)


def prepare(target: Target, key: Any, kept: Path) -> tuple[Parameters, np.ndarray | None]:
    """The frame, and whitened reference draws where there are any."""
    if target.draws is not None and target.size < LARGE:
        root = np.linalg.cholesky(np.cov(target.draws.T).reshape(target.size, target.size))
        frame = frame_of(target.draws.mean(axis=0), root)
        return frame, (target.draws - frame["centre"]) @ frame["inverse"].T
    path = kept / f"{target.name}-frame.npz"
    if path.is_file():
        with np.load(path) as file:
            return frame_of(file["centre"], file["root"]), None
    family = Family("mean_field", target.size)
    climb = Climb(target, family)
    if target.draws is not None:
        frame = frame_of(target.draws.mean(axis=0), np.diag(target.draws.std(axis=0)))
    else:
        start = target.flatten(target.model.start(key, target.model.arrays, radius=0.1))
        frame = frame_of(np.asarray(start), 0.1 * np.eye(target.size))
    given = {"a": np.zeros(target.size), "log_scale": np.log(np.diag(frame["root"]) / 3)}
    identity = np.zeros((target.size, target.size))
    for rates in ((1e-1, 1e-1), (1e-1, 3e-3)):
        given = climb.climb(given, frame, identity, key, 3_000, rates)
    frame = whitened(climb, given, frame, key)
    kept.mkdir(parents=True, exist_ok=True)
    np.savez(path, centre=frame["centre"], root=frame["root"])
    return frame, None


def whitened(climb: Climb, given: Parameters, frame: Parameters, key: Any) -> Parameters:
    """The frame of the mean Hessian under a Gaussian, with curvatures of a thousandth of the median one at least."""
    precision = climb.precision(given, frame, key)
    values, vectors = np.linalg.eigh(precision)
    floor = 1e-3 * np.median(np.abs(values))
    covariance = (vectors / np.maximum(np.abs(values), floor)) @ vectors.T
    root = frame["root"] @ np.linalg.cholesky(covariance)
    return frame_of(np.asarray(frame["centre"] + frame["root"] @ given["a"]), root)


def starts(
    family: Family, frame: Parameters, draws: np.ndarray | None, best: Parameters, count: int
) -> list[Parameters]:
    """The informed start and dispersed ones: from reference draws, and from random points 1 to 8 sds away."""
    random = np.random.default_rng(1)
    found = [best]
    for number in range(1, count):
        if draws is not None and number % 2:
            loc = draws[random.integers(len(draws))]
        else:
            loc = random.standard_normal(family.size) * (1.0, 2.0, 4.0)[number % 3]
        found.append(family.dispersed(best, np.clip(loc, -FAR, FAR), (1.0, 0.3, 0.1, 0.03)[number // 2 % 4], random))
    return found


def search(climb: Climb, frame: Parameters, given: list[Parameters], precision: np.ndarray, key: Any) -> Search:
    """All starts side by side for a short run, judged on common draws."""
    large = climb.family.size >= LARGE
    rate = min(0.1, 1 / math.sqrt(climb.family.size))
    stacked = jax.tree.map(lambda *rows: np.stack(rows), *given)
    ended = climb.climb(stacked, frame, precision, key, SHORT_STEPS, (rate, rate / 100))
    rows = []
    for number in range(len(given)):
        one = jax.tree.map(lambda value, n=number: value[n], ended)
        if not all(np.isfinite(value).all() for value in one.values()):
            continue
        moments = climb.moments(one, frame, precision, jax.random.PRNGKey(7), START_DRAWS)
        height = climb.elbo(one, frame, precision, moments.values)[0]
        gap = math.inf if large else newton_gap(climb, one, frame, precision, moments.halved(), 30)[0]
        if np.isfinite(height):
            rows.append((height, gap, number, one))
    rows.sort(key=lambda row: -row[0])
    heights = np.array([height for height, gap, *_ in rows if abs(gap) < 0.3])
    columns: dict[str, Any] = {"starts": len(given)} if large else {"starts": len(given), "arrived": len(heights)}
    if len(heights):
        columns["optima_found"] = 1 + int((np.diff(heights) < -0.5).sum())
        columns["at_best"] = int((heights > heights[0] - 0.5).sum())
        columns["spread"] = round(float(heights[0] - heights[-1]), 3)
    best: list[tuple[float, float, Parameters]] = []
    for height, gap, _, one in rows[:3]:
        if not any(abs(gap) < 0.3 and abs(other) < 0.3 and abs(h - height) < 0.05 for h, other, _ in best):
            best.append((height, gap, one))
    return Search(columns, [one for *_, one in best])


def long_run(
    climb: Climb, frame: Parameters, found: Search, key: Any, rounds: int
) -> tuple[Parameters, Parameters, np.ndarray, dict[str, Any]]:
    """The winner, its frame and quadratic, and the row's columns on how it got there."""
    size = climb.family.size
    rate = min(0.02, 0.3 / math.sqrt(size))
    precision = np.eye(size)
    given, taken = found.best[0], SHORT_STEPS
    if len(found.best) > 1:
        ended = [climb.climb(one, frame, precision, key, MIDDLE_STEPS, (rate, rate / 100)) for one in found.best]
        values = [climb.values(one, frame, precision, jax.random.PRNGKey(8), GAIN_DRAWS)[0] for one in ended]
        heights = [climb.elbo(one, frame, precision, v)[0] for one, v in zip(ended, values, strict=True)]
        given, taken = ended[int(np.argmax(heights))], taken + MIDDLE_STEPS
    columns: dict[str, Any] = {}
    for number in range(rounds):
        moved = whitened(climb, given, frame, key)
        given, frame = climb.family.moved(given, frame, moved), moved
        before, precision = given, climb.precision(given, frame, jax.random.PRNGKey(9))
        given = climb.climb(given, frame, precision, jax.random.fold_in(key, number), LONG_STEPS, (rate, rate / 1_000))
        taken += LONG_STEPS
        precision = climb.precision(given, frame, jax.random.PRNGKey(10))
        check = jax.random.fold_in(key, 100 + number)
        old, new = (climb.values(one, frame, precision, check, GAIN_DRAWS)[0] for one in (before, given))
        gain = (new - old)[np.isfinite(new - old)]
        constants = [climb.constant(one, frame, precision) for one in (before, given)]
        moments = climb.moments(given, frame, precision, jax.random.fold_in(key, 200 + number), CHECK_DRAWS)
        gap, error = newton_gap(climb, given, frame, precision, moments)
        columns = {
            "newton_gap": gap,
            "newton_gap_se": error,
            "last_gain": float(gain.mean()) + constants[1] - constants[0],
            "last_gain_se": float(gain.std(ddof=1) / math.sqrt(len(gain))),
        }
        print(f"    round {number + 1}: {columns}", flush=True)
        if has_arrived(gap, error):
            break
    return given, frame, precision, columns | {"steps": taken}


def measure(target: Target, guide: str, prepared: Any, rounds: int, kept: Path) -> dict[str, Any]:
    """One row of the table; the optimum's parameters are kept beside it."""
    begun = time.perf_counter()
    frame, draws = prepared
    family = Family(guide, target.size)
    climb = Climb(target, family)
    key = jax.random.PRNGKey(GUIDES.index(guide))
    identity = np.eye(target.size)
    best = family.fitted(frame, *_informed(guide, target, frame, kept))
    given = starts(family, frame, draws, best, 4 if target.size >= LARGE else 20)
    found = search(climb, frame, given, identity, key)
    if not found.best:
        raise RuntimeError(f"no start of {target.name}, {guide}, ended at a finite ELBO")
    given, frame, precision, columns = long_run(climb, frame, found, key, rounds)
    values, bad = climb.values(given, frame, precision, jax.random.fold_in(key, 1_000), FINAL_DRAWS)
    elbo, se = climb.elbo(given, frame, precision, values)
    keep(target, family, given, frame, kept)
    arrived = has_arrived(columns["newton_gap"], columns["newton_gap_se"])
    return {
        "posterior": target.name,
        "guide": guide,
        "d": target.size,
        "rank": "" if guide == "mean_field" else family.rank,
        "elbo": round(elbo, 4),
        "se": f"{se:.2g}",
        **{name: f"{value:.2g}" if isinstance(value, float) else value for name, value in columns.items()},
        **found.columns,
        "bad_draws": bad,
        "seconds": round(time.perf_counter() - begun),
        "note": "" if arrived else "not arrived: newton_gap is beyond 0.01, or its error beyond 0.005",
        "command": f"python benchmarks/yardsticks.py {target.name} --guides {guide} --rounds {rounds}",
    }


def _informed(guide: str, target: Target, frame: Parameters, kept: Path) -> tuple[np.ndarray, np.ndarray]:
    """Mean and precision, in y, of the Gaussian that the first start fits: full rank's optimum for low rank."""
    path = kept / f"{target.name}-full_rank.npz"
    if guide != "low_rank" or not path.is_file():
        return np.zeros(target.size), np.eye(target.size)
    with np.load(path) as file:
        lower = frame["inverse"] @ file["scale_tril"]
        inverse = scipy.linalg.solve_triangular(lower, np.eye(target.size), lower=True)
        return frame["inverse"] @ (file["loc"] - frame["centre"]), inverse.T @ inverse


def keep(target: Target, family: Family, given: Parameters, frame: Parameters, kept: Path) -> None:
    """Writes the optimum in NumPyro's parameters: `loc` with `scale`, `scale` and `cov_factor`, or `scale_tril`."""
    parameters = {"loc": frame["centre"] + frame["root"] @ given["a"]}
    if family.guide == "full_rank":
        parameters["scale_tril"] = frame["root"] @ np.asarray(family.factor(given, frame))
    else:
        parameters["scale"] = np.exp(given["log_scale"])
    if family.guide == "low_rank":
        parameters["cov_factor"] = frame["root"] @ given["columns"] / parameters["scale"][:, None]
    kept.mkdir(parents=True, exist_ok=True)
    np.savez(kept / f"{target.name}-{family.guide}.npz", sites=np.array(list(target.shapes)), **parameters)


def all_names() -> list[str]:
    """Every posterior with a row to come."""
    return [*importlib.import_module("posteriors").names(), *CURATED, *targets_large.names()]


def main() -> None:
    """Append the rows that are not there yet, one posterior after the other, in the order given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("posteriors", nargs="*")
    parser.add_argument("--guides", nargs="+", choices=GUIDES, default=GUIDES)
    parser.add_argument("--rounds", type=int, default=8, help="how many rounds at most")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    parser.add_argument("--kept", type=Path, default=Path(__file__).parents[1] / "build" / "yardsticks")
    given = parser.parse_args()
    failed = []
    with jax.enable_x64(True):
        for target in map(load, given.posteriors or all_names()):
            prepared = None
            for guide in given.guides:
                if (target.name, guide) in _finished(given.out):
                    continue
                print(f"{target.name} {guide} d={target.size}", flush=True)
                try:
                    prepared = prepared or prepare(target, jax.random.PRNGKey(0), given.kept)
                    row = measure(target, guide, prepared, given.rounds, given.kept)
                except Exception:  # told here and at the end; one row must not lose the others
                    traceback.print_exc()
                    failed.append(f"{target.name} {guide}")
                    continue
                _append(given.out, row)
                print(f"    {row}", flush=True)
    if failed:
        raise SystemExit(f"No row for {', '.join(failed)}.")


def _finished(path: Path) -> set[tuple[str, str]]:
    if not path.is_file():
        return set()
    with path.open(newline="") as file:
        return {(row["posterior"], row["guide"]) for row in csv.DictReader(file)}


def _append(path: Path, row: Mapping[str, Any]) -> None:
    new = not path.is_file()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


if __name__ == "__main__":
    main()
