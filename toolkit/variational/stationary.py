"""Whether a state is the maximum that it is claimed to be: no parameter of the guide, moved alone, raises the ELBO."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro import handlers
from numpyro.distributions import biject_to, constraints

_STEP = 1e-3  # in unconstrained units: of a difference quotient
_FARTHEST = 1.0  # that a parameter is moved
_MOST = 200  # numbers that are moved, of each parameter


def what_moving_gains(
    program: Callable[..., Any],
    arrays: Mapping[str, Any],
    state: Mapping[str, np.ndarray],
    elbo: Callable[[dict[str, np.ndarray]], float],
    names: Collection[str],
) -> dict[str, float]:
    """The most that moving one number of each parameter raises the ELBO by, in nats; 0 where it does not.

    Each number is moved in unconstrained space, so that variances stay positive and probabilities sum to one, to where
    the parabola through three ELBOs is highest. Of parameters with more than 200 numbers that many are moved.

    Args:
        program: The guide's program, with the constraint of each parameter.
        arrays: What it takes.
        state: Its parameters by name.
        elbo: The ELBO of a state in nats, in closed form.
        names: Of the parameters to move.

    Returns:
        Parameter name to what was gained.

    Raises:
        ValueError: The ELBO fails at a value that the program's constraint allows.
    """
    with jax.enable_x64(True):
        trace = handlers.trace(handlers.seed(program, 0)).get_trace(**arrays)
        height, gains = elbo(dict(state)), dict[str, float]()
        for name in [name for name, site in trace.items() if site["type"] == "param" and name in names]:
            support = trace[name]["kwargs"].get("constraint", constraints.real)
            transform = biject_to(support)
            value = jnp.asarray(state[name])
            place = np.asarray(transform.inv(value))
            if not np.isfinite(place).all():  # on the edge of its support, where nothing can be moved
                continue

            def moved(steps: np.ndarray, name: str = name, place: Any = place, transform: Any = transform) -> float:
                there = np.asarray(transform(jnp.asarray(place + steps.reshape(place.shape))))
                try:
                    return float(elbo({**state, name: there}))
                except (ValueError, ArithmeticError, np.linalg.LinAlgError) as error:
                    raise ValueError(
                        f"Expected an ELBO wherever the program's constraint allows '{name}' to be; at {there} it "
                        f"fails ({error}): give '{name}' its constraint in the program, such as constraints.positive."
                    ) from error

            back = float(moved(np.zeros(place.size)) - height)  # there and back again costs rounding
            numbers = np.arange(place.size)
            if place.size > _MOST:
                numbers = np.sort(np.random.default_rng(0).choice(place.size, _MOST, replace=False))
            gains[name] = max((_gain(moved, height, int(one), place.size) for one in numbers), default=0.0) - abs(back)
    return {name: max(gain, 0.0) for name, gain in gains.items()}


def _gain(moved: Callable[[np.ndarray], float], height: float, number: int, size: int) -> float:
    """What moving one number gains."""
    along = np.zeros(size)
    along[number] = 1.0
    above, below = moved(_STEP * along), moved(-_STEP * along)
    slope, bend = (above - below) / (2 * _STEP), (above + below - 2 * height) / _STEP**2
    if not (math.isfinite(slope) and math.isfinite(bend)) or slope == 0:
        return 0.0
    step = min(abs(slope / bend), _FARTHEST) if bend < 0 else _FARTHEST
    gain = moved(math.copysign(step, slope) * along) - height
    return max(gain, above - height, below - height) if math.isfinite(gain) else max(above, below) - height
