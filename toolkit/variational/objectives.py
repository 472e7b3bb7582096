"""What the optimiser climbs: estimators of the ELBO and of its gradient."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from numpyro.distributions import Delta, TransformedDistribution
from numpyro.distributions.constraints import Constraint
from numpyro.distributions.transforms import Transform
from numpyro.handlers import replay, seed
from numpyro.infer.elbo import ELBO
from numpyro.infer.util import log_density
from numpyro.primitives import Messenger

Program = Callable[..., Any]


class StickTheLandingELBO(ELBO):
    """The negative ELBO in nats, with the gradient that vanishes where the guide equals the posterior.

    The guide's log density is differentiated through the draw only, not through the parameters; what is left out has
    expectation zero. Near the optimum of a rich family the gradient's variance goes to zero.

    Reference: Roeder, Wu & Duvenaud (2017), Sticking the landing, section 3.
    """

    def loss_with_mutable_state(
        self,
        rng_key: jax.Array,
        param_map: Mapping[str, Any],
        model: Program,
        guide: Program,
        *args: Any,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """NumPyro's interface to an objective: the loss averaged over the particles."""

        def particle(key: jax.Array) -> Any:
            return -log_weight(key, param_map, model, guide, kwargs, hold_guide=True)

        losses = jax.vmap(particle)(jax.random.split(rng_key, self.num_particles))
        return {"loss": losses.mean(), "mutable_state": None}


def log_weight(
    key: jax.Array,
    params: Mapping[str, Any],
    model: Program,
    guide: Program,
    kwargs: Mapping[str, Any],
    *,
    hold_guide: bool = False,
) -> Any:
    """Log p(x, z) - log q(z) at one draw z of the guide, in nats.

    Args:
        key: For the draw.
        params: Parameters of guide and model, constrained.
        model: NumPyro callable.
        guide: Its guide.
        kwargs: Arguments of both.
        hold_guide: Leave the guide's parameters out of log q's gradient.
    """
    guide_key, model_key = jax.random.split(key)
    drawn_once = _DrawnOnce()
    with drawn_once:
        log_q, drawn = log_density(seed(guide, guide_key), (), dict(kwargs), dict(params))
    if hold_guide:
        held = jax.lax.stop_gradient(dict(params))
        again = Redrawn(seed(guide, guide_key), drawn_once.values, drawn_once.intermediates)
        log_q, _ = log_density(again, (), dict(kwargs), held)
    log_p, _ = log_density(seed(replay(model, drawn), model_key), (), dict(kwargs), dict(params))
    return log_p - log_q


class _DrawnOnce(Messenger):
    """Keeps what was drawn, and puts a barrier behind it: the compiler would draw again wherever a draw is used.

    What NumPyro knows of a draw before its transforms stays with the site: inverting them loses digits, and at the edge
    of a simplex all of them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, Any] = {}
        self.intermediates: dict[str, Any] = {}

    def postprocess_message(self, msg: Any) -> None:
        # A point mass follows from other sites or from parameters; nothing is drawn there.
        if msg["type"] == "sample" and not msg["is_observed"] and not isinstance(msg["fn"], Delta):
            msg["value"], msg["intermediates"] = jax.lax.optimization_barrier((msg["value"], msg["intermediates"]))
            self.values[msg["name"]] = msg["value"]
            # Asked here, where the parameters are not held yet.
            self.intermediates[msg["name"]] = msg["intermediates"] if _transforms_stand(msg["fn"]) else []


class Redrawn(Messenger):
    """A program whose sites take the values that were drawn before, with what lies before their transforms.

    By value alone where a transform may have parameters: what lies before it does not move with the draw when these
    are held, as it does when they are not. Where it has none, inverting it would lose digits for nothing.

    Args:
        fn: The program.
        values: By site.
        intermediates: What NumPyro knows of the draws before their transforms, by site.
    """

    def __init__(self, fn: Program, values: Mapping[str, Any], intermediates: Mapping[str, Any]) -> None:
        super().__init__(fn)
        self.values, self.intermediates = values, intermediates

    def process_message(self, msg: Any) -> None:
        """NumPyro's interface to a handler."""
        if msg["type"] == "sample" and msg["name"] in self.values:
            msg["value"] = self.values[msg["name"]]
            if known := self.intermediates.get(msg["name"]):
                msg["intermediates"] = known if _transforms_stand(msg["fn"]) else []


def _transforms_stand(law: Any) -> bool:
    """Whether a law's transforms surely do not move with any parameters."""
    while not isinstance(law, TransformedDistribution) and hasattr(law, "base_dist"):
        law = law.base_dist
    return isinstance(law, TransformedDistribution) and _stands(law.transforms)


def _stands(part: Any) -> bool:
    """Whether a part of a transform is made of known numbers alone; functions may hold parameters."""
    if isinstance(part, Transform):
        inner = dict(vars(part))
        if isinstance(inner.get("_inv"), weakref.ref):
            del inner["_inv"]  # the inverse that it once gave away
        return all(_stands(value) for value in inner.values())
    if isinstance(part, Constraint):
        return not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(part))
    if isinstance(part, list | tuple):
        return all(_stands(value) for value in part)
    known = part is None or isinstance(part, bool | int | float | str | np.ndarray | np.generic | jax.Array)
    return known and not isinstance(part, jax.core.Tracer)
