"""What the optimiser climbs: estimators of the ELBO and of its gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
from numpyro.distributions import Delta
from numpyro.handlers import replay, seed, substitute, trace
from numpyro.infer.elbo import ELBO
from numpyro.infer.util import log_density

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
    sites = trace(seed(substitute(guide, data=dict(params)), guide_key)).get_trace(**kwargs)
    # Sites that follow from others (a transform of an auxiliary one) are left for the second run to work out.
    latents = {
        name: site["value"]
        for name, site in sites.items()
        if site["type"] == "sample" and not site["is_observed"] and not isinstance(site["fn"], Delta)
    }
    # Without the barrier the compiler works the draws out again wherever they are used: twice the program.
    latents = jax.lax.optimization_barrier(latents)
    log_q, drawn = log_density(seed(guide, guide_key), (), dict(kwargs), {**params, **latents})
    if hold_guide:
        held = jax.lax.stop_gradient(dict(params))
        log_q, _ = log_density(seed(guide, guide_key), (), dict(kwargs), {**held, **latents})
    log_p, _ = log_density(seed(replay(model, drawn), model_key), (), dict(kwargs), dict(params))
    return log_p - log_q
