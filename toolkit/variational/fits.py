"""The noun `Fit`: a guide fitted to a model, and what can be asked of it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from numpyro import handlers
from numpyro.distributions import biject_to
from numpyro.infer.autoguide import (
    AutoContinuous,
    AutoDAIS,
    AutoDelta,
    AutoLaplaceApproximation,
)
from numpyro.infer.util import log_density

from toolkit.compilation import QUICK
from toolkit.cost import Cost
from toolkit.estimate import Estimate
from toolkit.modelling.completion import BATCH, complete
from toolkit.modelling.model import Model
from toolkit.modelling.points import points
from toolkit.modelling.space import latent_space
from toolkit.status import Status
from toolkit.variational.autoguides import gaussian_form
from toolkit.variational.certificates import Certificate, Scope
from toolkit.variational.draws import check_key
from toolkit.variational.guides import Guide
from toolkit.variational.objectives import log_weight
from toolkit.variational.solvers.svi import Trace

_SCALARS_AT_ONCE = 32_000_000  # drawn at once, all sites counted: 256 MB


@dataclass(frozen=True, eq=False, repr=False)
class Fit:
    """A guide fitted to a model: it can draw, and where its family has one, give its log density.

    Attributes:
        guide: The family.
        model: The model.
        status: How the optimisation ended.
        message: A detail on the status, for the report; empty if there is none.
        elbo: E_q[log p(x, z) - log q(z)] in nats on draws that the fit has not seen, or in closed form (se 0)
            where the guide's own algorithm has it; None if it could not be had. Where
            `status.has_optimum` is False it says where the fit was stopped and nothing more; so do `optima`.
        fresh_log_weights: Log p(x, z) - log q(z) in nats at the draws behind `elbo`, (draws,); None without a density.
        certificate: How far the family's best may lie above this fit; None where there is none, see `message` or
            `why`.
        log_evidence: The guide's own approximation of log p(x) in nats, where its algorithm has one, as expectation
            propagation has; it bounds nothing and has no known error. None otherwise.
        optima: The ELBO in nats of each distinct optimum that the starts led to, the reported one first; from SVI,
            whose ends scatter, of the end of each start that was followed, whether at one optimum or not. For a point
            mass, which has no ELBO, the log density log p(x, z) in the chart's constrained space.
        reached: How many starts led to each of `optima`, where the guide's own algorithm counts them; empty otherwise.
        solver: What fitted it.
        why: Why that solver.
        traces: The course of the best start to each optimum; from SVI, of each start that the budget paid for.
        invalid_steps: Steps skipped because loss or gradient were NaN or infinite.
        cost: Time, gradient evaluations, memory.
        autoguide: NumPyro's guide; everything that NumPyro does with a guide works with it and `params`.
        params: Its parameters, constrained, and the model's own parameters where its chart has any; empty if the fit
            failed.
        start: A point at which the autoguide can be set up again, unconstrained, by site: a Gaussian's location, and
            where the best search began for other guides.
    """

    guide: Guide
    model: Model
    status: Status
    message: str = ""
    elbo: Estimate | None = None
    fresh_log_weights: np.ndarray | None = None
    certificate: Certificate | None = None
    log_evidence: float | None = None
    optima: tuple[Estimate, ...] = ()
    reached: tuple[int, ...] = ()
    solver: str = ""
    why: str = ""
    traces: tuple[Trace, ...] = ()
    invalid_steps: int = 0
    cost: Cost = field(default_factory=Cost)
    autoguide: Any = None
    params: dict[str, Any] = field(default_factory=dict)
    start: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        """Such as `<Fit of mean_field to line: ARRIVED, ELBO -12.3 ± 0.1 nats, gap at most 0.06 nats>`."""
        elbo = f", ELBO {self.elbo} nats" if self.elbo else ""
        limit = ""
        if self.certificate:
            most = "estimated at" if self.certificate.scope is Scope.ESTIMATE else "at most"
            limit = f", gap {most} {self.certificate.limit:.2g} nats"
        return f"<Fit of {self.guide.name} to {self.model.name}: {self.status.name}{elbo}{limit}>"

    @property
    def chart(self) -> str:
        """The model's chart that the guide looks at."""
        return self.guide.chart or self.model.chart

    @property
    def gap_bound(self) -> Estimate | None:
        """The certificate's gap in nats, how much the family's best may lie above; None without a certificate.

        A bound in expectation, or an estimate where `certificate.scope` says so, with the standard error of its mean:
        `gap_limit` is what to hold against a tolerance.
        """
        return self.certificate.gap if self.certificate else None

    @property
    def gap_limit(self) -> float | None:
        """How much the family's best may lie above this fit at most, in nats; None without a certificate.

        It is the upper 95 % limit `certificate.limit`; what it speaks of, says `certificate.scope`.
        """
        return self.certificate.limit if self.certificate else None

    @property
    def usable(self) -> bool:
        """Whether there is an approximation to draw from."""
        return bool(self.params)

    @property
    def has_density(self) -> bool:
        """Whether the family has a density; a point mass has none."""
        return self.usable and not isinstance(self.autoguide, AutoDelta)

    def draw(self, key: jax.Array, draws: int, sites: tuple[str, ...] | None = None) -> dict[str, np.ndarray]:
        """Independent draws of latent and deterministic sites, `(draws, ...)` each, in constrained space.

        Args:
            key: Random key.
            draws: How many.
            sites: Which sites; all if None. Deterministic ones that are not asked for are not computed.

        Raises:
            ValueError: The fit failed and has nothing to draw from, the key is not one of JAX's, or a site is unknown.
        """
        self._require_usable()
        check_key(key)
        if isinstance(sites, str):
            raise ValueError(  # noqa: TRY004 - misuse is a ValueError everywhere
                f"Expected sites to be a sequence of names; got '{sites}': write ('{sites}',)."
            )
        guide = self._program

        def one(key: jax.Array, params: Any, arrays: Any) -> dict[str, Any]:
            guide_key, _ = jax.random.split(key)  # as `log_weight` does, so that one key means one set of draws
            return _latents(guide, guide_key, params, arrays)

        scalars = sum(math.prod(site.shape) for site in self.model.sites.values())
        pieces = [
            complete(self.model, latents, params=self.params, chart=self.chart, sites=sites)
            for latents in self._map(one, key, draws, at_once=max(BATCH, _SCALARS_AT_ONCE // max(scalars, 1)))
        ]
        return {name: np.concatenate([piece[name] for piece in pieces])[:draws] for name in pieces[0]}

    def log_weights(self, key: jax.Array, draws: int) -> np.ndarray:
        """Log p(x, z) - log q(z) at independent draws z of the guide, shape (draws,), in nats.

        Raises:
            ValueError: The fit failed, or its family has no density.
        """
        self._require_density()
        check_key(key)
        program, guide = self.model.bound(self.chart), self._program
        pieces = self._map(lambda k, params, arrays: log_weight(k, params, program, guide, arrays), key, draws)
        return np.concatenate(list(pieces))[:draws]

    def log_weights_at(self, draws: Mapping[str, Any]) -> np.ndarray:
        """Log p(x, z) - log q(z) at values z of the model's latent sites, shape (draws,), in nats.

        Both densities are the guide's chart's, into which the values are brought. Under the posterior the mean is the
        log evidence plus KL(p || q).

        Args:
            draws: The latent sites of the model as it is written (the plain chart), in constrained space,
                `(draws, ...)` each; further sites are ignored.

        Raises:
            ValueError: The fit failed, its family has no density in closed form, a latent site is missing, or the
                guide's chart cannot be inverted.
        """
        self._require_density()
        found = points(self.model, draws, self.chart, self.params)
        form = gaussian_form(self.autoguide, latent_space(self.model, self.chart))
        if form is not None:
            return found.log_density - form.member(self.params).log_density(found.vectors)
        return found.log_density - found.log_jacobian - self.log_density(found.latents)

    def log_density(self, latents: Mapping[str, Any]) -> np.ndarray:
        """Log q(z) of latent sites `(draws, ...)` in the guide's chart, shape (draws,), in nats; others are ignored.

        The density is with respect to the constrained sites' own volume, as NumPyro's `log_density` has it.

        Raises:
            ValueError: The fit failed, its family has no density in closed form, or a site is missing or of another
                shape.
        """
        self._require_density()
        if isinstance(self.autoguide, AutoDAIS):
            text = f"Expected a density in closed form; '{self.guide.name}' gives weights only."
            raise ValueError(text)  # noqa: TRY004 - the family's limit, not an argument's type
        _ = self._laplace  # before anything is traced, so that it is had once and not for each batch
        with jax.enable_x64(True):
            return np.asarray(jax.lax.map(self._log_density, self._chosen(latents), batch_size=BATCH))

    @cached_property
    def _program(self) -> Callable[..., Any]:
        """The guide as a NumPyro program; a Laplace approximation becomes the Gaussian that it stands for."""
        if self._laplace is None:
            return self.autoguide
        gaussian = copy.copy(self.autoguide)
        gaussian._get_posterior = lambda *args, **kwargs: self._laplace
        return gaussian

    @cached_property
    def _laplace(self) -> Any:
        """The Gaussian that a Laplace approximation stands for; None for any other guide."""
        guide = self.autoguide
        return laplace_gaussian(guide, self.params) if isinstance(guide, AutoLaplaceApproximation) else None

    def _log_density(self, latents: Mapping[str, Any]) -> Any:
        guide = self.autoguide
        if not isinstance(guide, AutoContinuous):
            value, _ = log_density(handlers.seed(guide, 0), (), self.model.arrays, {**self.params, **latents})
            return value
        trace = handlers.trace(
            handlers.seed(handlers.substitute(self.model.bound(self.chart), data={**self.params, **latents}), 0)
        ).get_trace(**self.model.arrays)
        jacobian, unconstrained = 0.0, {}
        for name in guide._init_locs:
            transform = biject_to(trace[name]["fn"].support)
            unconstrained[name] = transform.inv(latents[name])
            jacobian += transform.log_abs_det_jacobian(unconstrained[name], latents[name]).sum()
        # In the guide's own order; its `_unpack_latent.inv` needs an argument that nothing gives (NumPyro 0.22).
        vector = jnp.concatenate([jnp.ravel(value) for value in unconstrained.values()])
        # AutoDiagonalNormal's posterior is a batch of independent normals: the sum is the joint density.
        posterior = guide.get_posterior(self.params) if self._laplace is None else self._laplace
        return posterior.log_prob(vector).sum() - jacobian

    def _map(self, one: Callable[..., Any], key: jax.Array, draws: int, at_once: int = 2**20) -> Iterator[Any]:
        """The results of `one`, at most about so many at once; the last piece has a few more than were asked for."""
        if draws < 1:
            raise ValueError(f"Expected at least 1 draw; got {draws}.")
        # Pieces of one length in whole batches: any other length would be compiled as a program of its own.
        count = -(-draws // at_once)
        length = -(-draws // (count * BATCH)) * BATCH

        def many(keys: Any, params: Any, arrays: Any) -> Any:
            return jax.lax.map(lambda k: one(k, params, arrays), keys, batch_size=BATCH)

        with jax.enable_x64(True):
            keys = jax.random.split(key, count * length)
            keys = keys.reshape(count, length, *keys.shape[1:])  # one number a key, or two of the older kind
            given = (self.params, self.model.arrays)
            program = jax.jit(many).lower(keys[0], *given).compile(QUICK)
        for piece in keys:
            with jax.enable_x64(True):
                yield jax.device_get(program(piece, *given))

    def _require_usable(self) -> None:
        if not self.usable:
            ended = self.status.sentence(climbs=self.guide.climbs)
            raise ValueError(f"Expected a fit that can draw; '{self.guide.name}' has none: {ended}.")

    def _chosen(self, given: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """The chart's latent sites of all that is given, each with its shape behind the number of draws."""
        space, arrays = latent_space(self.model, self.chart), self.model.arrays
        origin = space.unravel(np.zeros(space.size))
        sites = jax.eval_shape(lambda: self.model.constrain(origin, arrays, self.params, chart=self.chart))
        latents = {name: np.asarray(given[name]) for name in space.names if name in given}
        draws = max((len(values) for values in latents.values() if values.ndim), default=0)
        if any(name not in latents or latents[name].shape != (draws, *sites[name].shape) for name in space.names):
            wanted = ", ".join(f"{name} ({', '.join(['draws', *map(str, sites[name].shape)])})" for name in space.names)
            told = ", ".join(f"{name} {values.shape}" for name, values in latents.items()) or "none of them"
            raise ValueError(f"Expected the latent sites of chart '{self.chart}', which are {wanted}; got {told}.")
        return latents

    def _require_density(self) -> None:
        self._require_usable()
        if not self.has_density:
            raise ValueError(f"Expected a family with a density; '{self.guide.name}' is a point mass.")


def _latents(guide: Callable[..., Any], key: jax.Array, params: Any, arrays: Any) -> dict[str, Any]:
    """A guide's draw of the model's latent sites."""
    seeded = handlers.seed(handlers.substitute(guide, data=params), key)
    trace = handlers.trace(seeded).get_trace(**arrays)
    return {
        name: site["value"]
        for name, site in trace.items()
        if site["type"] == "sample" and not site["is_observed"] and not site["infer"].get("is_auxiliary")
    }


def laplace_gaussian(guide: AutoLaplaceApproximation, params: Mapping[str, Any]) -> dist.MultivariateNormal:
    """The Gaussian that a Laplace approximation stands for, in the guide's unconstrained space.

    Where the Hessian is singular it has no width, as in NumPyro, which warns of it.
    """

    def parts(params: Any) -> tuple[Any, Any]:
        found = guide.get_transform(params)
        return found.loc, found.scale_tril

    with jax.enable_x64(True):
        # As one program: the Hessian's operations, compiled one by one, take ten times as long.
        loc, scale_tril = jax.jit(parts)(dict(params))
        if not np.isfinite(scale_tril).all():
            loc, scale_tril = parts(dict(params))
    return dist.MultivariateNormal(np.asarray(loc), scale_tril=np.asarray(scale_tril), validate_args=False)
