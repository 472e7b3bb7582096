"""The latent sites of a model as one vector in unconstrained space."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from toolkit.modelling.model import Model
from toolkit.modelling.once import once_a_chart


@dataclass(frozen=True)
class Space:
    """The latent sites of a model in a chart, in program order, as one vector in unconstrained space."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @cached_property
    def size(self) -> int:
        """How many unconstrained coordinates there are."""
        return sum(int(np.prod(shape)) for shape in self.shapes)

    def unravel(self, vector: Any) -> dict[str, Any]:
        """Site name to value, from one vector of shape (size,)."""
        values, begin = {}, 0
        for name, shape in zip(self.names, self.shapes, strict=True):
            end = begin + int(np.prod(shape))
            values[name] = vector[begin:end].reshape(shape)
            begin = end
        return values

    def ravel(self, values: Any) -> Any:
        """One vector of shape (size,), from site name to value."""
        return jnp.concatenate([jnp.ravel(values[name]) for name in self.names])


@once_a_chart
def latent_space(model: Model, chart: str) -> Space:
    """The model's latent sites in a chart and their unconstrained shapes, in program order."""
    names: list[str] = []

    def point() -> dict[str, Any]:
        values = model.start(jax.random.PRNGKey(0), model.arrays, chart=chart)
        names.extend(values)
        return values

    shapes = jax.eval_shape(point)
    return Space(tuple(names), tuple(tuple(shapes[name].shape) for name in names))
