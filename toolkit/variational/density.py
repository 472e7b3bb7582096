"""A model's log density with its gradient, at a few points or at many: all that the Gaussian solvers ask of a model.

Everything else (draws, factors, entropies) is algebra outside the compiled programs. One pair of programs therefore
serves all Gaussian guides, starts, seeds and tolerances, and every dataset of the same shapes.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Hashable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.infer.reparam import Reparam

from toolkit.compilation import QUICK, peak_bytes
from toolkit.modelling.enumeration import SummedOut
from toolkit.modelling.model import Model
from toolkit.modelling.space import Space, latent_space

_BATCH = 128  # points side by side: more no longer paid on the curated models
_FEW, _FEW_SCALARS = 8, 128_000  # the same where few are asked for: with so many scalars a point alone is as cheap
_WORTH_MANY = 0.25  # of a batch, from which on the program for many is the cheaper one
_BATCH_SCALARS = 2_000_000  # all sites counted, in one batch; 16 MB each
_KEPT = 16  # pairs of programs in a process
_DIFFERENCE = 1e-4  # of a coordinate, or of one: a step where no scale is known


@dataclass(frozen=True)
class _Programs:
    """The compiled pair, and what keeps the key's identities alive."""

    few: Any
    many: Any
    width: int
    batch: int
    peak_bytes: int
    holds: tuple[Any, ...]


_programs: OrderedDict[Hashable, _Programs] = OrderedDict()


class LogDensity:
    """Log p(x, z) of a model in a chart, in nats, over unconstrained vectors, with its gradient.

    Args:
        model: The model.
        chart: Which chart; the model's own choice if None.

    Attributes:
        space: The latent sites that a vector holds.
        evaluations: Gradients asked for so far.
        compile_seconds: Spent on tracing and compiling; 0 where programs of these shapes were there already.
        peak_bytes: What the larger program holds at once.
    """

    def __init__(self, model: Model, chart: str | None = None) -> None:
        self.space: Space = latent_space(model, chart)
        self.evaluations = 0
        with jax.enable_x64(True):
            self._arrays = jax.device_put(model.arrays)
            begun = time.perf_counter()
            self._programs, fresh = _found(model, model.chart if chart is None else chart, self.space, self._arrays)
        self.compile_seconds = time.perf_counter() - begun if fresh else 0.0
        self.peak_bytes = self._programs.peak_bytes

    @property
    def size(self) -> int:
        """How many unconstrained coordinates there are."""
        return self.space.size

    def over(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Values (n,) and gradients (n, size) at points (n, size)."""
        self.evaluations += len(points)
        values, gradients = np.empty(len(points)), np.empty(points.shape)
        programs, begin = self._programs, 0
        with jax.enable_x64(True):
            while begin < len(points):
                left = len(points) - begin
                many = left > programs.width and left > _WORTH_MANY * programs.batch
                program, batch = (programs.many, programs.batch) if many else (programs.few, programs.width)
                piece = points[begin : begin + batch]
                missing = batch - len(piece)
                if missing:
                    piece = np.concatenate([piece, np.broadcast_to(piece[:1], (missing, self.size))])
                found = np.asarray(program(piece, self._arrays))[: batch - missing]
                rows = slice(begin, begin + batch - missing)
                values[rows], gradients[rows] = found[:, 0], found[:, 1:]
                begin += batch
        return values, gradients


def central_differences(
    density: LogDensity, loc: np.ndarray, steps: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The Hessian (size, size) of log p at a point and the gradient there (size,), from gradients around it.

    Args:
        density: Log p(x, z).
        loc: The point, (size,).
        steps: To both sides along each coordinate, (size,); `difference_steps` if None.
    """
    steps = difference_steps(loc) if steps is None else steps
    apart = np.diag(steps)
    _, gradients = density.over(np.concatenate([loc + apart, loc - apart]))
    above, below = np.split(gradients, 2)
    hessian = (above - below) / (2 * steps[:, None])
    return (hessian + hessian.T) / 2, (above + below).mean(0) / 2


def difference_steps(loc: np.ndarray) -> np.ndarray:
    """Steps (size,) for differences at a point around which no scale is known."""
    return _DIFFERENCE * np.maximum(np.abs(loc), 1.0)


def _found(model: Model, chart: str, space: Space, arrays: Any) -> tuple[_Programs, bool]:
    """The programs for a model, made if no model of the same code, static values and shapes had them made before."""
    key, holds = _key(model, chart, space)
    fresh = key not in _programs
    if fresh:
        _programs[key] = _compiled(model, chart, space, arrays, holds)
        if len(_programs) > _KEPT:
            _programs.popitem(last=False)
    _programs.move_to_end(key)
    return _programs[key], fresh


def _key(model: Model, chart: str, space: Space) -> tuple[Hashable, tuple[Any, ...]]:
    """What decides the compiled programs, and the objects that are named in it by their identity."""
    shapes = tuple((name, np.shape(value), str(np.asarray(value).dtype)) for name, value in model.arrays.items())
    static = tuple(sorted(model.dataset.static.items()))
    reparameterisers = tuple(sorted(model.charts[chart].items()))
    holds = (model.fn, *(value for _, value in static), *(value for _, value in reparameterisers))
    named = tuple(name for name, _ in (*static, *reparameterisers))
    return (named, tuple(_identity(value) for value in holds), chart, space, shapes), holds


def _identity(value: Any) -> Hashable:
    """What tells a value from others that mean another program: numbers and texts by value, most objects by identity.

    Those that models make anew each time, although they mean the same, are told by what they hold.
    """
    if isinstance(value, str | int | float | bool | type(None)):
        return (type(value).__name__, value)
    if isinstance(value, tuple | list):
        return (type(value).__name__, *(_identity(part) for part in value))
    if isinstance(value, Reparam | SummedOut):
        return (type(value), *((name, _identity(part)) for name, part in sorted(vars(value).items())))
    return id(value)


def _compiled(model: Model, chart: str, space: Space, arrays: Any, holds: tuple[Any, ...]) -> _Programs:
    def log_density(vector: Any, arrays: Any) -> Any:
        return model.log_density(space.unravel(vector), arrays, chart)

    both = jax.jit(jax.value_and_grad(log_density))  # traced once for the two programs

    def log_density_and_gradient(vector: Any, arrays: Any) -> Any:
        """Value and gradient in one vector (1 + size,): to fetch a second array takes as long as a small program."""
        value, gradient = both(vector, arrays)
        return jnp.concatenate([value[None], gradient])

    scalars = sum(math.prod(site.shape) for site in model.sites.values())
    width, batch = (
        1 << (int(np.clip(at_once // scalars, least, most)).bit_length() - 1)
        for at_once, least, most in ((_FEW_SCALARS, 1, _FEW), (_BATCH_SCALARS, _FEW, _BATCH))
    )
    # Tracing shares NumPyro's one stack of handlers; compiling does not.
    abreast = jax.jit(jax.vmap(log_density_and_gradient, in_axes=(0, None)))
    lowered = [abreast.lower(np.zeros((count, space.size)), arrays) for count in (width, batch)]
    with ThreadPoolExecutor(2) as pool:
        # At XLA's own level the program for many runs up to 1.7 times as fast, and the one for few does not.
        few, many = pool.map(lambda lowered, options: lowered.compile(options), lowered, (QUICK, {}))
    return _Programs(few, many, width, batch, peak_bytes(many), holds)
