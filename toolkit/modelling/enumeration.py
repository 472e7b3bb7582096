"""Discrete latent sites, summed out by NumPyro's enumeration."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpyro
from numpyro import handlers


def sum_out_discrete(fn: Callable[..., Any], discrete: tuple[str, ...]) -> Callable[..., Any]:
    """A callable with the same continuous sites whose likelihood is summed over the discrete ones.

    The continuous sites keep their priors; a factor named `summed_out` carries the rest. It needs every discrete
    site's support to be finite and no continuous site's prior to depend on a discrete one.

    Raises:
        ValueError: funsor, which NumPyro enumerates with, is not installed.
    """
    if importlib.util.find_spec("funsor") is None:
        raise ValueError(
            f"Expected continuous latent sites; {', '.join(map(repr, discrete))} is discrete: sum it out of the likelihood "
            "(numpyro.distributions.MixtureSameFamily does it for mixtures), or install the extra 'elbowroom[enumeration]'."
        )
    from numpyro.contrib.funsor import config_enumerate, enum, log_density

    def summed(**kwargs: Any) -> None:
        hidden = handlers.block(handlers.substitute(fn, substitute_fn=_first_value(discrete)), hide_fn=_not_continuous)
        with handlers.trace() as trace:
            hidden(**kwargs)
        latents = {name: m["value"] for name, m in trace.items() if m["type"] == "sample"}
        prior = sum(jnp.sum(m["fn"].log_prob(m["value"])) for m in trace.values() if m["type"] == "sample")
        with handlers.block():
            enumerated = enum(
                config_enumerate(handlers.seed(fn, rng_seed=0)),
                first_available_dim=-1 - _plate_depth(fn, kwargs),
            )
            joint, _ = log_density(enumerated, (), kwargs, latents)
        numpyro.factor("summed_out", joint - prior)

    summed.__name__ = getattr(fn, "__name__", "model")
    return summed


def _not_continuous(message: Mapping[str, Any]) -> bool:
    if message["type"] == "sample":
        return message["is_observed"] or message["fn"].support.is_discrete
    return message["type"] not in ("param",)


def _first_value(discrete: tuple[str, ...]) -> Callable[[Mapping[str, Any]], Any]:
    def substitute(message: Mapping[str, Any]) -> Any:
        if message["type"] == "sample" and message["name"] in discrete:
            return message["fn"].enumerate_support(expand=True)[0]
        return None

    return substitute


def _plate_depth(fn: Callable[..., Any], kwargs: Mapping[str, Any]) -> int:
    with handlers.block(), handlers.trace() as trace:
        handlers.seed(fn, rng_seed=0)(**kwargs)
    return max((len(m["fn"].batch_shape) for m in trace.values() if m["type"] == "sample"), default=0)
