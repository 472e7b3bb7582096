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
from toolkit.variational.space import Space

Program = Callable[..., Any]

_ROUNDING = 1e-8  # of a log density, summed over rows in another order


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

    def order(self) -> jax.Array:
        """The rows in a random order, (rows,), of which every batch is a window."""
        return jax.random.permutation(jax.random.PRNGKey(0), self.rows)

    def drawn(self, key: jax.Array, *, order: jax.Array, arrays: Mapping[str, Any]) -> dict[str, Any]:
        """The arrays of a random batch: a window of the order, which goes on at its beginning."""
        begin = jax.random.randint(key, (), 0, self.rows)
        return self.taken(order[(begin + jnp.arange(self.size)) % self.rows], arrays)

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
        batches = self.rows // self.size

        def log_density(rows: Any, arrays: Any) -> Any:
            return -potential_energy(program, (), self.taken(rows, arrays), space.unravel(loc))

        def summed(arrays: Any) -> Any:
            whole = jnp.arange(batches * self.size).reshape(batches, self.size)
            total = self.size * jax.lax.map(lambda rows: log_density(rows, arrays), whole).sum()
            rest = self.rows - batches * self.size
            if rest:
                total += rest * log_density(jnp.arange(self.rows - rest, self.rows), arrays)
            return total / self.rows

        with jax.enable_x64(True):
            try:
                found = float(jax.jit(summed)(model.arrays))
            except Exception as error:  # the callable is the user's, and may raise anything
                text = f"{type(error).__name__}: {str(error).strip()}".split("\n")[0]
                raise ValueError(
                    f"Expected model '{model.name}' to run on {self.size:,} of its {self.rows:,} rows; it stops with "
                    f"{text}: take the size of plate '{self.plate}' from an array's shape."
                ) from error
            expected = float(model.log_density(space.unravel(loc), model.arrays, chart))
        if not abs(found - expected) <= _ROUNDING * max(1.0, abs(expected)) * np.sqrt(self.rows):
            raise ValueError(
                f"Expected log p(x, z) of model '{model.name}' to be a sum over plate '{self.plate}', so that batches "
                f"of its rows ({', '.join(self.arrays)} cut) have it as their mean; got {found:.6g} nats for "
                f"{expected:.6g}: only sites in the plate may depend on these arrays."
            )


def find_minibatch(model: Model, size: int) -> Minibatch:
    """Batches of so many rows of the plate that all observed sites share.

    Raises:
        ValueError: There is no such plate, it has latent sites of its own, no array has its length, or there are not
            so many rows.
    """
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
