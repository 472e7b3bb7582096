"""Discrete latent sites, summed out by NumPyro's enumeration."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import numpyro
from numpyro import handlers
from numpyro.infer.util import compute_log_probs
from numpyro.primitives import Messenger

from toolkit.modelling.sites import improper_start

Message = Mapping[str, Any]

_BY_HAND = "sum it out of the likelihood (numpyro.distributions.MixtureSameFamily does it for mixtures)"


@dataclass(frozen=True, eq=False)
class SummedOut:
    """A callable with the continuous sites of another, whose likelihood is summed over the discrete ones.

    The continuous sites keep their priors; a factor named `summed_out` carries the rest.

    Attributes:
        fn: The callable with discrete sites.
        discrete: Their names.
        hidden: What the factor stands for: discrete and observed sites, and deterministic ones that change with them.
        plates: How many batch dimensions the sites have, to the left of which enumeration takes its own.
    """

    fn: Callable[..., Any]
    discrete: tuple[str, ...]
    hidden: tuple[str, ...]
    plates: int

    def __call__(self, **kwargs: Any) -> None:
        """Declare the continuous sites and the factor."""
        chosen = handlers.substitute(self.fn, substitute_fn=_support_value(self.discrete, 0))
        with handlers.trace() as trace:
            # Hidden by name, because outer handlers add sites of their own (Jacobians, reparameterised latents).
            handlers.block(chosen, hide=list(self.hidden))(**kwargs)
        # In another chart a latent of `fn` is a deterministic site by now; its value is what counts here.
        values = {name: m["value"] for name, m in trace.items() if m["type"] in ("sample", "deterministic")}
        numpyro.factor("summed_out", self._likelihood(values, kwargs))

    def _likelihood(self, values: Mapping[str, Any], kwargs: Mapping[str, Any]) -> Any:
        """The log joint density, summed over the discrete sites, less the log prior that the sites add themselves."""
        from numpyro.contrib.funsor import config_enumerate, enum, log_density

        # funsor's plates must see only the enumerated program, not whoever runs this one; a value that is
        # enumerated gains axes on its left, so that programs meet values of unequal rank.
        with _no_handlers(), jax.numpy_rank_promotion("allow"):
            seeded = handlers.seed(self.fn, rng_seed=0)
            first = handlers.substitute(seeded, substitute_fn=_support_value(self.discrete, 0))
            densities, trace = compute_log_probs(first, (), dict(kwargs), dict(values))
            latents = {name: values[name] for name, m in trace.items() if name in values and m["type"] == "sample"}
            enumerated = enum(config_enumerate(_Together(seeded)), first_available_dim=-1 - self.plates)
            joint, _ = log_density(enumerated, (), dict(kwargs), latents)
        return joint - sum(densities[name] for name in latents)


def sum_out_discrete(fn: Callable[..., Any], discrete: tuple[str, ...], kwargs: Mapping[str, Any]) -> SummedOut:
    """The callable with its discrete sites summed out, tried on its arguments.

    Raises:
        ValueError: A discrete site has infinitely many values or an axis without a plate, or funsor, which NumPyro
            enumerates with, is missing.
    """
    names = ", ".join(map(repr, discrete))
    first, last = (_run(fn, discrete, kwargs, end) for end in (0, -1))
    endless = [name for name in discrete if not first[name]["fn"].has_enumerate_support]
    if endless:
        raise ValueError(
            f"Expected discrete latent sites with finitely many values; {', '.join(map(repr, endless))} cannot be "
            f"enumerated: {_BY_HAND}, or give it a continuous form."
        )
    unplated = [name for name in discrete if len(first[name]["fn"].batch_shape) > len(first[name]["cond_indep_stack"])]
    if unplated:
        raise ValueError(
            "Expected a plate around each axis of a discrete latent site, so that its values are summed out singly; "
            f"{', '.join(map(repr, unplated))} has an axis without: put it in a numpyro.plate."
        )
    if importlib.util.find_spec("funsor") is None:
        raise ValueError(
            f"Expected continuous latent sites; {names} is discrete: {_BY_HAND}, or install the extra "
            "'elbowroom[enumeration]'."
        )
    hidden = tuple(name for name, message in first.items() if _depends(message, last[name]))
    plates = max((len(m["fn"].batch_shape) for m in first.values() if m["type"] == "sample"), default=0)
    return SummedOut(fn, discrete, hidden, plates)


class _Together(Messenger):
    """Takes the batch of a site outside every plate as one event; funsor would mix up its axes with a plate's."""

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "sample" and not msg["cond_indep_stack"] and msg["fn"].batch_shape:
            msg["fn"] = msg["fn"].to_event(len(msg["fn"].batch_shape))


def _run(fn: Callable[..., Any], discrete: tuple[str, ...], kwargs: Mapping[str, Any], end: int) -> dict[str, Any]:
    """A trace with every discrete site at one end of its support, all else drawn with the same seed."""
    started = handlers.substitute(handlers.seed(fn, rng_seed=0), substitute_fn=improper_start)
    chosen = handlers.substitute(started, substitute_fn=_support_value(discrete, end))
    with handlers.block(), handlers.trace() as trace:
        chosen(**kwargs)
    return dict(trace)


def _support_value(discrete: tuple[str, ...], end: int) -> Callable[[Message], Any]:
    def substitute(message: Message) -> Any:
        if message["type"] == "sample" and message["name"] in discrete and message["fn"].has_enumerate_support:
            return message["fn"].enumerate_support(expand=True)[end]
        return None

    return substitute


def _depends(message: Message, other: Message) -> bool:
    """Whether a site is summed over with the discrete ones; `other` is the same site at another discrete value."""
    if message["type"] == "sample":
        return bool(message["is_observed"] or message["fn"].support.is_discrete)
    if message["type"] == "deterministic":
        return not np.array_equal(message["value"], other["value"], equal_nan=True)
    return False


@contextmanager
def _no_handlers() -> Iterator[None]:
    """NumPyro's handler stack, empty for a while; NumPyro has no public way to leave its outer handlers."""
    stack = numpyro.primitives._PYRO_STACK
    held = stack[:]
    stack.clear()
    try:
        yield
    finally:
        stack[:] = held
