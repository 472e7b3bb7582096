"""What the optimiser climbs: estimators of the ELBO and of its gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
from numpyro.distributions import Delta
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
        again = _Redrawn(seed(guide, guide_key), drawn_once.values)
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

    def postprocess_message(self, msg: Any) -> None:
        # A point mass follows from other sites or from parameters; nothing is drawn there.
        if msg["type"] == "sample" and not msg["is_observed"] and not isinstance(msg["fn"], Delta):
            msg["value"], msg["intermediates"] = jax.lax.optimization_barrier((msg["value"], msg["intermediates"]))
            self.values[msg["name"]] = msg["value"]


class _Redrawn(Messenger):
    """A program whose sites take the values that were drawn before.

    By value alone: where a transform has parameters, what lies before it does not move with the draw when these are
    held, as it does when they are not.
    """

    def __init__(self, fn: Program, values: Mapping[str, Any]) -> None:
        super().__init__(fn)
        self.values = values

    def process_message(self, msg: Any) -> None:
        if msg["type"] == "sample" and msg["name"] in self.values:
            msg["value"] = self.values[msg["name"]]
