"""Regressions with a linear predictor: what a model's program observes, each as a likelihood of one scalar.

A program says which distribution has made each observation, and not of which scalar it is a function. It is found by
trying: of the distribution's parameters the one that moves with the latents, and of the links the one under which it is
affine in them, eta = a'z + b. The likelihood of eta is then the same distribution with the inverse link of eta for that
parameter, and no more of the program is needed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from inspect import signature
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax.scipy.special import expit, logit, ndtr, ndtri

from toolkit.compilation import QUICK
from toolkit.modelling.model import Model
from toolkit.modelling.observations import seen_by
from toolkit.modelling.once import once_a_chart
from toolkit.modelling.points import log_density_at
from toolkit.modelling.sites import OBSERVED
from toolkit.modelling.space import Space, latent_space
from toolkit.variational.gaussians import DENSE_LIMIT
from toolkit.variational.quadratic_priors import Quadratic, gaussian_prior, placed_trace

LINKS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "identity": (lambda value: value, lambda eta: eta),
    "log": (jnp.log, jnp.exp),
    "logit": (logit, expit),
    "probit": (ndtri, ndtr),
}
"""Link name to link and inverse link, in the order in which they are tried."""

ROWS = 33
"""Values of eta for each observation in one call of a compiled likelihood."""

_STEPS = (-2.0, -1.0, 0.5, 1.0, 2.0)  # of the linear predictor that moves most: where a link is tried
_DIRECTIONS = 3
_AFFINE = 1e-7  # of a linear predictor: rounding, where a probability near 1 is turned back by its link
_DENSITY = 1e-8  # of a log density: what the parts may miss of the whole by rounding


@dataclass(frozen=True, eq=False)
class Likelihood:
    """The observations of one site, each a function of its own linear predictor eta.

    Attributes:
        site: The observed site.
        parameter: Of its distribution, what the linear predictor enters by.
        link: The name of the link, one of `LINKS`.
        design: The gradients a of eta, `(observation, coordinate)`; masked observations are left out.
        offset: What eta is at the origin of unconstrained space, b, `(observation,)`.
        family: The distribution's class.
        others: Its other parameters, `(observation, ...)` each.
        values: What was observed, `(observation,)`.
        weights: How often each counts (`numpyro.handlers.scale`), `(observation,)`.
    """

    site: str
    parameter: str
    link: str
    design: np.ndarray
    offset: np.ndarray
    family: type
    others: Mapping[str, np.ndarray]
    values: np.ndarray
    weights: np.ndarray

    def log_likelihood(self, eta: np.ndarray) -> np.ndarray:
        """Log p(y | eta) in nats at values of the linear predictors, `(row, observation)`; NaN where undefined."""
        rows = -(-len(eta) // ROWS) * ROWS
        padded = np.concatenate([eta, np.broadcast_to(eta[:1], (rows - len(eta), eta.shape[1]))])
        pieces = [self._many(piece) for piece in padded.reshape(-1, ROWS, eta.shape[1])]
        return np.concatenate(pieces)[: len(eta)]

    def derivatives(self, eta: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Log p(y | eta), its first and its second derivative in eta, `(observation,)` each."""
        return self._derivatives(eta)

    @cached_property
    def _many(self) -> Callable[[np.ndarray], np.ndarray]:
        example = np.zeros((ROWS, len(self.values)))
        return self._compiled(lambda eta, given: jax.vmap(lambda row: self._one(row, *given))(eta), example)

    @cached_property
    def _derivatives(self) -> Callable[[np.ndarray], Any]:
        def thrice(eta: Any, given: Any) -> Any:
            ones = jnp.ones_like(eta)

            def first(eta: Any) -> Any:
                return jax.jvp(lambda eta: self._one(eta, *given), (eta,), (ones,))

            (value, slope), (_, bend) = jax.jvp(first, (eta,), (ones,))
            return value, slope, bend

        return self._compiled(thrice, np.zeros(len(self.values)))

    def _compiled(self, function: Callable[..., Any], example: np.ndarray) -> Callable[[np.ndarray], Any]:
        given = (dict(self.others), self.values, self.weights)
        with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):
            program = jax.jit(function).lower(example, given).compile(QUICK)

        def run(eta: np.ndarray) -> Any:
            with jax.enable_x64(True):
                return jax.device_get(program(np.ascontiguousarray(eta), given))

        return run

    def _one(self, eta: Any, others: Mapping[str, Any], values: Any, weights: Any) -> Any:
        return weights * self.family(**{**others, self.parameter: LINKS[self.link][1](eta)}).log_prob(values)


@dataclass(frozen=True, eq=False)
class Regression:
    """A Gaussian prior, and observations of which each sees the latents through one linear predictor.

    Attributes:
        prior: The log prior in unconstrained space.
        likelihoods: By observed site; none where everything is masked.
        compile_seconds: What it took to find out.
    """

    prior: Quadratic
    likelihoods: tuple[Likelihood, ...]
    compile_seconds: float

    @cached_property
    def design(self) -> np.ndarray:
        """The gradients of all linear predictors, `(observation, coordinate)`."""
        empty = np.zeros((0, len(self.prior.linear)))
        return np.concatenate([empty, *(part.design for part in self.likelihoods)])

    @cached_property
    def offset(self) -> np.ndarray:
        """All linear predictors at the origin, `(observation,)`."""
        return np.concatenate([np.zeros(0), *(part.offset for part in self.likelihoods)])

    def log_likelihood(self, eta: np.ndarray) -> np.ndarray:
        """Log p(y | eta) of all observations in nats, `(row, observation)`."""
        parts = [part.log_likelihood(eta[:, places]) for part, places in self._places]
        return np.concatenate([np.zeros((len(eta), 0)), *parts], axis=1)

    def derivatives(self, eta: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Log p(y | eta), its first and its second derivative, of all observations."""
        parts = [part.derivatives(eta[places]) for part, places in self._places]
        value, slope, bend = (np.concatenate([np.zeros(0), *(part[i] for part in parts)]) for i in range(3))
        return value, slope, bend

    @property
    def _places(self) -> list[tuple[Likelihood, slice]]:
        ends = np.cumsum([0, *(len(part.values) for part in self.likelihoods)])
        return [(part, slice(*ends[i : i + 2])) for i, part in enumerate(self.likelihoods)]

    @property
    def words(self) -> str:
        """What was found, such as `each of the 569 observations of y sees the latents through the log of its rate`."""
        clauses = []
        for part in self.likelihoods:
            scalar = part.parameter if part.link == "identity" else f"{part.link} of its {part.parameter}"
            through = f"its {scalar}" if part.link == "identity" else f"the {scalar}"
            each = f"each of the {len(part.values):,} observations" if len(part.values) > 1 else "the one observation"
            clauses.append(f"{each} of {part.site} sees the latents through {through} alone")
        return " and ".join(clauses) or "nothing is observed"


@once_a_chart
def linear_predictor(model: Model, chart: str) -> Regression:
    """The model in a chart as a regression with a linear predictor.

    Raises:
        ValueError: It is none: the prior is not Gaussian in unconstrained space, an observation sees the latents by
            more than one linear combination, or there are too many dimensions. The sentence names the site.
    """
    begun = time.perf_counter()
    space = latent_space(model, chart)
    if model.summed_out:
        raise _no_regression(f"{', '.join(model.summed_out)} of '{model.name}' is discrete and summed out")
    if space.size > DENSE_LIMIT:
        raise _no_regression(f"there are {space.size:,} dimensions, and at most {DENSE_LIMIT:,} can be held")
    prior = gaussian_prior(model, chart)
    likelihoods = _likelihoods(model, chart, space, prior.centre)
    found = Regression(prior, likelihoods, time.perf_counter() - begun)
    _verify(model, chart, found)
    return found


def _no_regression(what: str, instead: str = "take full_rank") -> ValueError:
    return ValueError(
        f"Expected a regression with one linear predictor for each observation, for expectation propagation; {what}: "
        f"{instead}."
    )


@dataclass(frozen=True, eq=False)
class _Observed:
    """What one observed site's distribution is at any vector: its class, and which parameters it has."""

    family: type
    names: tuple[str, ...]


def _read(
    model: Model, chart: str, space: Space, vector: Any, arrays: Any, kinds: dict[str, _Observed]
) -> dict[str, dict[str, Any]]:
    """By observed site: parameters, values, what is seen and weights, one row an observation; `kinds` is filled in."""
    found = {}
    for name, site in placed_trace(model, chart, space, vector, arrays).items():
        if name not in model.sites or model.sites[name].kind != OBSERVED:
            continue
        base = _base(site["fn"])
        if base.event_shape:
            raise _no_regression(f"an observation of site '{name}' is a vector ({type(base).__name__})")
        takes = signature(type(base).__init__).parameters
        given = {arg: getattr(base, arg, None) for arg in base.arg_constraints if arg in takes}
        given = {arg: value for arg, value in given.items() if value is not None}
        if not given:
            raise _no_regression(f"the distribution of site '{name}' ({type(base).__name__}) has no parameter to read")
        kinds[name] = _Observed(type(base), tuple(given))
        shape = jnp.broadcast_shapes(jnp.shape(site["value"]), tuple(site["fn"].shape()))
        batch = shape[: len(shape) - site["fn"].event_dim]
        weights = jnp.ones(batch) if site["scale"] is None else jnp.broadcast_to(site["scale"], batch)
        found[name] = {
            **{f"parameter {arg}": _rows(value, shape, base.arg_constraints[arg]) for arg, value in given.items()},
            "values": jnp.broadcast_to(site["value"], shape).ravel(),
            "seen": jnp.broadcast_to(seen_by(site["fn"]), shape).ravel(),
            "weights": jnp.broadcast_to(weights.reshape(batch + (1,) * site["fn"].event_dim), shape).ravel(),
        }
    return found


def _base(fn: Any) -> Any:
    while isinstance(fn, dist.Independent | dist.ExpandedDistribution | dist.MaskedDistribution):
        fn = fn.base_dist
    return fn


def _rows(value: Any, shape: tuple[int, ...], constraint: Any) -> Any:
    """A distribution's parameter with a row for each observation."""
    value = jnp.asarray(value)
    event = value.shape[value.ndim - constraint.event_dim :]
    return jnp.broadcast_to(value, shape + event).reshape(-1, *event)


def _likelihoods(model: Model, chart: str, space: Space, centre: np.ndarray) -> tuple[Likelihood, ...]:
    if not model.observed:
        return ()
    kinds: dict[str, _Observed] = {}

    def read(vector: Any, arrays: Any) -> Any:
        return _read(model, chart, space, vector, arrays, kinds)

    def moving(vector: Any, arrays: Any) -> Any:
        """What may move with the latents: parameters that are no whole numbers."""
        sites = read(vector, arrays)
        return {
            name: {key: value for key, value in site.items() if jnp.issubdtype(value.dtype, jnp.floating)}
            for name, site in sites.items()
        }

    example, arrays = np.zeros(space.size), model.arrays
    at = jax.jit(read).lower(example, arrays).compile(QUICK)
    sites = jax.device_get(at(centre, arrays))
    many = sum(len(site["values"]) for site in sites.values())
    gradients = (jax.jacfwd if space.size <= many else jax.jacrev)(moving)
    slopes = jax.device_get(jax.jit(gradients).lower(example, arrays).compile(QUICK)(centre, arrays))
    order = [name for name in model.observed if name in sites]

    def reader(name: str) -> Callable[[np.ndarray], Mapping[str, Any]]:
        return lambda vector: at(vector, arrays)[name]

    found = [_likelihood(name, kinds[name], sites[name], slopes[name], centre, reader(name)) for name in order]
    return tuple(one for one in found if one is not None)


def _likelihood(
    name: str,
    kind: _Observed,
    site: Mapping[str, np.ndarray],
    slopes: Mapping[str, np.ndarray],
    centre: np.ndarray,
    read: Callable[[np.ndarray], Mapping[str, Any]],
) -> Likelihood | None:
    """One site as a likelihood of linear predictors; None where all of it is masked.

    Raises:
        ValueError: It is none.
    """
    seen = np.asarray(site["seen"], bool)
    if not seen.any():
        return None
    values = {key: np.asarray(value)[seen] for key, value in site.items()}
    moved = [arg for arg in kind.names if _moves(slopes.get(f"parameter {arg}"), seen)]
    if not moved:
        raise _no_regression(f"no parameter of site '{name}' ({kind.family.__name__}) moves with the latents")
    fixed = {key: value for key, value in values.items() if key not in (f"parameter {moved[0]}", "values", "seen")}
    if len(moved) > 1:
        said = f"both {moved[0]} and {moved[1]}" if len(moved) == 2 else ", ".join(moved)
        raise _no_regression(f"{said} of site '{name}' ({kind.family.__name__}) depend on the latents")
    parameter = f"parameter {moved[0]}"
    if values[parameter].ndim > 1:
        raise _no_regression(f"{moved[0]} of site '{name}' ({kind.family.__name__}) is a vector for each observation")
    slope, others = np.asarray(slopes[parameter])[seen], {}
    for link in LINKS:
        affine = _affine(link, values[parameter], slope, centre, lambda v: np.asarray(read(v)[parameter])[seen])
        if affine is not None:
            break
    else:
        raise _no_regression(
            f"{moved[0]} of site '{name}' ({kind.family.__name__}) is affine in the latents under none of the links "
            f"{', '.join(LINKS)}"
        )
    design, offset = affine
    for point in _around(design, centre):
        there = read(point)
        for key, value in fixed.items():
            if not np.array_equal(np.asarray(there[key])[seen], value, equal_nan=True):
                told = key.removeprefix("parameter ")
                raise _no_regression(f"both {moved[0]} and {told} of site '{name}' depend on the latents")
    others = {key.removeprefix("parameter "): v for key, v in fixed.items() if key.startswith("parameter ")}
    return Likelihood(
        name, moved[0], link, design, offset, kind.family, others, values["values"], values["weights"].astype(float)
    )


def _moves(slope: Any, seen: np.ndarray) -> bool:
    return slope is not None and bool((np.asarray(slope)[seen] != 0).any())


def _affine(
    link: str, value: np.ndarray, slope: np.ndarray, centre: np.ndarray, read: Callable[[np.ndarray], np.ndarray]
) -> tuple[np.ndarray, np.ndarray] | None:
    """The gradients and the offset of a parameter under a link, if it is affine there; None if it is not."""
    with jax.enable_x64(True), np.errstate(all="ignore"):
        forward = LINKS[link][0]
        eta, rate = jax.device_get(jax.jvp(forward, (jnp.asarray(value),), (jnp.ones(value.shape),)))
        if not (np.isfinite(eta).all() and np.isfinite(rate).all()):
            return None
        design = rate[:, None] * slope
        for point in _around(design, centre):
            miss = np.asarray(forward(jnp.asarray(read(point)))) - eta - design @ (point - centre)
            if not (np.abs(miss) <= _AFFINE * (1.0 + np.abs(eta))).all():
                return None
    return design, eta - design @ centre


def _around(design: np.ndarray, centre: np.ndarray) -> Sequence[np.ndarray]:
    """Points in random directions from the centre, at which the linear predictor that moves most has moved by 1 or 2.

    Further out a probability would be 0 or 1, and nearer every function looks affine.
    """
    source = np.random.default_rng(0)
    found = []
    for _ in range(_DIRECTIONS):
        direction = source.standard_normal(len(centre))
        most = np.abs(design @ direction).max()
        found += [centre + step * direction / most for step in _STEPS]
    return found


def _verify(model: Model, chart: str, found: Regression) -> None:
    """Nothing, if the parts add up to the model's own log density.

    Raises:
        ValueError: They do not.
    """
    points = np.array(_around(found.design, found.prior.centre) if len(found.design) else [found.prior.centre])
    whole = log_density_at(model, points, chart)
    likelihood = found.log_likelihood(points @ found.design.T + found.offset).sum(1)
    parts = likelihood + np.array([found.prior(point) for point in points])
    if not (np.abs(parts - whole) <= _DENSITY * (1.0 + np.abs(whole))).all():
        worst = float(np.abs(parts - whole).max())
        raise _no_regression(
            f"the observed sites of '{model.name}', rebuilt from their parameters, miss its log density by up to "
            f"{worst:.2g} nats"
        )
