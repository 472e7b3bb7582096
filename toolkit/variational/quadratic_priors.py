"""Whether a model's prior is Gaussian in unconstrained space, and which Gaussian it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from numpyro import handlers
from numpyro.distributions import biject_to

from toolkit.compilation import QUICK
from toolkit.modelling.model import Model
from toolkit.modelling.sites import FACTOR
from toolkit.modelling.space import Space, latent_space

_SCALES = 10.0 ** np.arange(-1, 5)  # of the lines along which a log prior is looked at
_LINES = 3  # at each scale
_NEAR = 3  # scales that every transform to unconstrained space bears
_ROUNDING = 1e-9  # of the log prior's size: what a third difference of a quadratic may have


@dataclass(frozen=True, eq=False)
class Quadratic:
    """The function constant + linear' z - z' precision z / 2 of unconstrained vectors, in nats.

    Attributes:
        constant: At the origin.
        linear: Its gradient there, `(coordinate,)`.
        precision: Minus its Hessian, `(coordinate, coordinate)`; singular where the prior is flat.
    """

    constant: float
    linear: np.ndarray
    precision: np.ndarray

    def __call__(self, vector: np.ndarray) -> float:
        """The value at a vector, in nats."""
        return float(self.constant + self.linear @ vector - 0.5 * vector @ self.precision @ vector)

    @property
    def centre(self) -> np.ndarray:
        """Where it is highest, `(coordinate,)`; the nearest such point to the origin where it is flat."""
        return highest(self.precision, self.linear)

    def seen_from(self, vector: np.ndarray) -> Quadratic:
        """The same function of z - vector."""
        return Quadratic(self(vector), self.linear - self.precision @ vector, self.precision)


def highest(precision: np.ndarray, linear: np.ndarray) -> np.ndarray:
    """Where linear' z - z' precision z / 2 is highest, `(coordinate,)`; where that is no point, by least squares."""
    try:  # which units do not matter to, as they do to least squares
        return scipy.linalg.cho_solve(scipy.linalg.cho_factor(precision, lower=True), linear)
    except np.linalg.LinAlgError:
        return np.linalg.lstsq(precision, linear, rcond=None)[0]


def placed_trace(model: Model, chart: str, space: Space, vector: Any, arrays: Mapping[str, Any]) -> dict[str, Any]:
    """The trace of a model's program in a chart with its latent sites at a vector of unconstrained space."""
    point = space.unravel(vector)

    def placed(site: Mapping[str, Any]) -> Any:
        if site["type"] == "sample" and site["name"] in point:
            return biject_to(site["fn"].support)(point[site["name"]])
        return None

    program = handlers.seed(handlers.substitute(model.bound(chart), substitute_fn=placed), rng_seed=0)
    with handlers.block(), handlers.trace() as trace:
        program(**arrays)
    return dict(trace)


def gaussian_prior(model: Model, chart: str) -> Quadratic:
    """The log prior, factors included, as a quadratic of unconstrained vectors.

    Raises:
        ValueError: It is none; the sentence names the first site at fault, in program order.
    """
    space = latent_space(model, chart)

    def by_site(vector: Any, arrays: Any) -> dict[str, Any]:
        return _log_prior(model, chart, space, vector, arrays)

    def whole(vector: Any, arrays: Any) -> Any:
        return sum(by_site(vector, arrays).values(), jnp.zeros(()))

    lines = _lines(space.size)
    many = jax.jit(lambda vectors, arrays: jax.lax.map(lambda vector: by_site(vector, arrays), vectors))
    vectors = lines.reshape(-1, space.size)
    seen = jax.device_get(many.lower(vectors, model.arrays).compile(QUICK)(vectors, model.arrays))
    for name in _program_order(model, chart, space, seen):
        values = np.asarray(seen[name]).reshape(lines.shape[:2])
        # What lies far out cannot be turned into a number and back where a site is positive, say.
        near = len(values) if _is_real(model, name) else _LINES * _NEAR
        if not _is_quadratic(values[:near]):
            raise ValueError(_sentence(model, name))
    origin = np.zeros(space.size)

    def expanded(vector: Any, arrays: Any) -> Any:
        return jax.value_and_grad(whole)(vector, arrays), jax.hessian(whole)(vector, arrays)

    program = jax.jit(expanded).lower(origin, model.arrays).compile(QUICK)
    (constant, linear), hessian = jax.device_get(program(origin, model.arrays))
    return Quadratic(float(constant), np.asarray(linear), -0.5 * (np.asarray(hessian) + np.asarray(hessian).T))


def _log_prior(model: Model, chart: str, space: Space, vector: Any, arrays: Any) -> dict[str, Any]:
    """Log density by latent site in unconstrained space, the Jacobian included, and by factor, in nats."""
    point, found = space.unravel(vector), {}
    for name, site in placed_trace(model, chart, space, vector, arrays).items():
        if site["type"] != "sample" or not (name in point or _is_factor(model, name)):
            continue
        density = site["fn"].log_prob(site["value"])
        density = jnp.sum(density if site["scale"] is None else site["scale"] * density)
        if name in point:
            jacobian = biject_to(site["fn"].support).log_abs_det_jacobian(point[name], site["value"])
            density = density + jnp.sum(jacobian)
        found[name] = density
    return found


def _is_real(model: Model, name: str) -> bool:
    """Whether a site is its own place in unconstrained space; a chart's own sites are."""
    return name not in model.sites or model.sites[name].kind == FACTOR or model.sites[name].support == "real"


def _is_factor(model: Model, name: str) -> bool:
    return name in model.sites and model.sites[name].kind == FACTOR


def _lines(size: int) -> np.ndarray:
    """Four points in equal steps along random lines of many scales, `(line, point, coordinate)`."""
    source = np.random.default_rng(0)
    scales = np.repeat(_SCALES, _LINES)[:, None]
    begin, step = (scales * source.standard_normal((len(scales), size)) for _ in range(2))
    return begin[:, None] + np.arange(4.0)[None, :, None] * step[:, None]


def _is_quadratic(values: np.ndarray) -> bool:
    """Whether the third differences along all lines, `(line, 4)`, vanish to rounding."""
    with np.errstate(invalid="ignore"):
        apart = np.abs(np.diff(values, 3, axis=1)[:, 0])
        return bool((apart <= _ROUNDING * (1.0 + np.abs(values).max(1))).all())


def _program_order(model: Model, chart: str, space: Space, seen: Mapping[str, Any]) -> list[str]:
    """The names in program order: what came out of a compiled program is in the alphabet's."""
    return [*space.names, *(name for name in seen if name not in space.names)]


def _sentence(model: Model, name: str) -> str:
    if _is_factor(model, name):
        what = f"factor '{name}' is not quadratic in the latents"
    else:
        site = model.sites.get(name)
        kind = f" ({site.distribution})" if site is not None and site.distribution else ""
        what = f"that of site '{name}'{kind} is not, given the sites before it"
    return (
        f"Expected a prior that is Gaussian in unconstrained space, for expectation propagation; {what}: "
        "take full_rank, or fix the sites that make it so."
    )
