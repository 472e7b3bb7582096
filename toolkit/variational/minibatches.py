"""Minibatches: the model on some of its rows, with a density that is right on average.

Where log p(x, z) = log p(z) + the sum of log p(x_i | z) over the rows i of a plate, the same program on B of its N
rows, with every site in that plate counting N / B times, has log p(x, z) as its mean over the rows chosen. Nothing in
the model need be written for it: the arrays that have an entry for each row are cut, and the plate takes its size from
them. That the density is such a sum, and that the right arrays are cut, is not believed but checked, on all rows at one
point.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.infer.util import potential_energy
from numpyro.primitives import Messenger

from toolkit.modelling.model import Model
from toolkit.modelling.sites import Site
from toolkit.modelling.space import Space

Program = Callable[..., Any]

_ROUNDING = 1e-10  # of the terms of a log density or of its gradient, summed over rows in another order


@dataclass(frozen=True)
class Minibatch:
    """How many rows of the data each step sees.

    Attributes:
        size: Rows in a batch.
        rows: Rows in all.
        plate: The plate that they are in.
        arrays: Names of the data arrays that have one entry a row.
    """

    size: int
    rows: int
    plate: str
    arrays: tuple[str, ...]

    @property
    def share(self) -> float:
        """The part of the data in a batch."""
        return self.size / self.rows

    @property
    def words(self) -> str:
        """Such as `"minibatches of 256 of 10,000 rows (plate 'row')"`."""
        return f"minibatches of {self.size:,} of {self.rows:,} rows (plate '{self.plate}')"

    def order(self) -> np.ndarray:
        """The rows in a random order, (rows,), of which every batch is a window."""
        return np.random.default_rng(0).permutation(self.rows)

    def seen(self, key: jax.Array, given: Mapping[str, Any]) -> dict[str, Any]:
        """What a program is given, its `arrays` cut to a random window of its `order`, which is a ring."""
        begin = jax.random.randint(key, (), 0, self.rows)
        rows = given["order"][(begin + jnp.arange(self.size)) % self.rows]
        return {**given, "arrays": self.taken(rows, given["arrays"])}

    def taken(self, rows: Any, arrays: Mapping[str, Any]) -> dict[str, Any]:
        """The arrays of the rows named."""
        return {name: value[rows] if name in self.arrays else value for name, value in arrays.items()}

    def scaled(self, program: Program) -> Program:
        """The program, each site in the plate counting as often as stands for all rows."""

        def run(**arrays: Any) -> Any:
            return _Counted(program, self.plate, self.rows / len(arrays[self.arrays[0]]))(**arrays)

        return run

    def verify(self, model: Model, chart: str, space: Space, loc: np.ndarray) -> None:
        """Nothing, where the densities of all rows in batches add up to that of the model.

        Args:
            model: The model.
            chart: Its chart.
            space: The chart's latent sites.
            loc: A point with a finite density, (size,), unconstrained.

        Raises:
            ValueError: They do not, or the model does not run on a part of its rows.
        """
        program = self.scaled(model.bound(chart))
        order, batches = self.order(), self.rows // self.size

        def log_density(point: Any, rows: Any, arrays: Any) -> Any:
            return -potential_energy(program, (), self.taken(rows, arrays), space.unravel(point))

        def each(point: Any, order: Any, arrays: Any) -> Any:
            """Densities and gradients of batches that hold every row once, and how many rows each has."""
            both = jax.value_and_grad(log_density)
            whole = order[: batches * self.size].reshape(batches, self.size)
            values, gradients = jax.lax.map(lambda rows: both(point, rows, arrays), whole)
            counts = jnp.full(batches, self.size)
            if batches * self.size < self.rows:
                rest = both(point, order[batches * self.size :], arrays)
                values, gradients = jnp.append(values, rest[0]), jnp.concatenate([gradients, rest[1][None]])
                counts = jnp.append(counts, self.rows - batches * self.size)
            return jnp.concatenate([values[:, None], gradients], axis=1), counts

        def all_rows(point: Any, arrays: Any) -> Any:
            value, gradient = jax.value_and_grad(lambda at: model.log_density(space.unravel(at), arrays, chart))(point)
            return jnp.append(value, gradient)

        with jax.enable_x64(True):
            try:
                found, counts = (np.asarray(part) for part in jax.jit(each)(loc, order, model.arrays))
            except Exception as error:  # the callable is the user's, and may raise anything
                text = f"{type(error).__name__}: {str(error).strip()}".split("\n")[0]
                raise ValueError(
                    f"Expected model '{model.name}' to run on {self.size:,} of its {self.rows:,} rows; it stops with "
                    f"{text}: let the size of plate '{self.plate}', and of all that has a value for each row, follow "
                    "from an array's shape."
                ) from error
            expected = np.asarray(jax.jit(all_rows)(loc, model.arrays))
        shares = counts[:, None] / self.rows
        mean, largest = (shares * found).sum(0), (shares * np.abs(found)).sum(0)
        if not (np.abs(mean - expected) <= _ROUNDING * np.maximum(largest, 1.0)).all():
            raise ValueError(
                f"Expected log p(x, z) of model '{model.name}' to be a sum over plate '{self.plate}', so that batches "
                f"of its rows ({', '.join(self.arrays)} cut) have it and its gradient as their mean; got "
                f"{mean[0]:.6g} nats for {expected[0]:.6g} and a gradient that is off by up to "
                f"{np.abs(mean - expected)[1:].max():.2g}: only sites in the plate may depend on these arrays, and "
                "each row on its own entries. Name others with `minibatch=Minibatch(size, rows, plate, arrays)`."
            )


def find_minibatch(model: Model, size: int | Minibatch) -> Minibatch:
    """Batches of so many rows of the plate that all observed sites share; one that names plate and arrays as it is.

    Raises:
        ValueError: There is no such plate, it has latent sites of its own, no array has its length, or there are not
            so many rows.
    """
    if isinstance(size, Minibatch):
        lengths = {name: len(model.arrays[name]) for name in size.arrays if np.ndim(model.arrays.get(name, 0))}
        if not (
            size.arrays and list(lengths.values()) == [size.rows] * len(size.arrays) and 1 <= size.size <= size.rows
        ):
            raise ValueError(
                f"Expected a minibatch of some of {size.rows:,} rows, of which arrays of model '{model.name}' have one "
                f"entry each; got {size} for arrays of {', '.join(f'{k} {v:,}' for k, v in lengths.items()) or 'none'}."
            )
        return size
    observed = [model.sites[name] for name in model.observed]
    first = _plates(observed[0]) if observed else []
    shared = [plate for plate in first if all(plate in _plates(site) for site in observed)]
    inner = [plate for site in model.latents for plate in _plates(model.sites[site])]
    free = [plate for plate in shared if plate not in inner]
    if not free:
        local = ", ".join(site for site in model.latents if model.local(site))
        why = f"site {local} has a value for each row" if shared else "they share none"
        raise ValueError(
            f"Expected the observed sites of model '{model.name}' to share a plate without latent sites in it, of "
            f"whose rows minibatches can be made; {why}: put the observations in one `numpyro.plate`, or fit all rows "
            "at once."
        )
    for name, rows in free:
        arrays = tuple(key for key, value in model.arrays.items() if np.ndim(value) and len(value) == rows)
        if arrays:
            if not 1 <= size <= rows:
                raise ValueError(f"Expected minibatches of 1 to {rows:,} rows of plate '{name}'; got {size}.")
            return Minibatch(size, rows, name, arrays)
    raise ValueError(
        f"Expected an array of model '{model.name}' whose first axis is plate '{free[0][0]}' ({free[0][1]:,} rows); "
        f"there is none: give the observations and what goes with them one row each."
    )


def _plates(site: Site) -> list[tuple[str, int]]:
    return [(name, rows) for name, rows, _ in site.plates]


class _Counted(Messenger):
    """A program whose sites in one plate count several times."""

    def __init__(self, fn: Program, plate: str, times: float) -> None:
        super().__init__(fn)
        self.plate, self.times = plate, times

    def process_message(self, msg: Any) -> None:
        if msg["type"] == "sample" and any(frame.name == self.plate for frame in msg["cond_indep_stack"]):
            msg["scale"] = self.times if msg["scale"] is None else msg["scale"] * self.times
